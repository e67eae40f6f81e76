// Forward and backward of swiglu and rms_norm, and cross_entropy, over rows. Elements and rows are computed alike
// whoever computes them, and the sums over rows for a norm's weight are those of rows_at_once rows, then those of the
// sums in their order: the same bits for any number of threads.
#include <algorithm>

#include "parallel.h"
#include "scratch.h"
#include "table.h"

namespace peftfast::cpu {
namespace {

constexpr int64_t work_at_once = 8192;  // elements that are worth a thread
constexpr int64_t rows_at_once = 16;    // of a norm whose weight is trained
constexpr int64_t columns_at_once = 64;

template <class Body>
void over_rows(const Threads& threads, int64_t M, int64_t at_once, Body body) {
  parallel_for(threads, (M + at_once - 1) / at_once,
               [&](int64_t begin, int64_t end) { body(begin * at_once, std::min(end * at_once, M)); });
}

int64_t rows_worth_a_thread(int64_t columns) {
  return std::max<int64_t>(1, work_at_once / std::max<int64_t>(1, columns));
}

}  // namespace

void swiglu(const SwigluArgs& args, const Threads& threads) {
  over_rows(threads, args.M, rows_worth_a_thread(args.I),
            [&](int64_t begin, int64_t end) { table().swiglu[static_cast<int>(args.dtype)](args, begin, end); });
}

void swiglu_backward(const SwigluArgs& args, const Threads& threads) {
  over_rows(threads, args.M, rows_worth_a_thread(args.I), [&](int64_t begin, int64_t end) {
    table().swiglu_backward[static_cast<int>(args.dtype)](args, begin, end);
  });
}

void rms_norm(const RmsNormArgs& args, const Threads& threads) {
  over_rows(threads, args.M, rows_worth_a_thread(args.H),
            [&](int64_t begin, int64_t end) { table().rms_norm[static_cast<int>(args.dtype)](args, begin, end); });
}

void rms_norm_backward(const RmsNormArgs& args, const Threads& threads) {
  const auto micro_kernel = table().rms_norm_backward[static_cast<int>(args.dtype)];
  if (args.grad_weight == nullptr) {
    over_rows(threads, args.M, rows_worth_a_thread(args.H),
              [&](int64_t begin, int64_t end) { micro_kernel(args, begin, end, nullptr); });
    return;
  }
  const int64_t H = args.H, blocks = (args.M + rows_at_once - 1) / rows_at_once;
  thread_local Scratch scratch;
  float* sums = scratch.floats(blocks * H);
  parallel_for(threads, blocks, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* of_block = sums + block * H;
      std::fill(of_block, of_block + H, 0.0f);
      micro_kernel(args, block * rows_at_once, std::min((block + 1) * rows_at_once, args.M), of_block);
    }
  });
  over_rows(threads, H, columns_at_once, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += columns_at_once) {
      const int64_t count = std::min(columns_at_once, end - begin);
      double total[columns_at_once] = {};
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t h = 0; h < count; ++h) total[h] += sums[block * H + begin + h];
      for (int64_t h = 0; h < count; ++h) args.grad_weight[begin + h] = static_cast<float>(total[h]);
    }
  });
}

void cross_entropy(const CrossEntropyArgs& args, const Threads& threads) {
  over_rows(threads, args.M, rows_worth_a_thread(args.V),
            [&](int64_t begin, int64_t end) { table().cross_entropy[static_cast<int>(args.dtype)](args, begin, end); });
}

}  // namespace peftfast::cpu
