// Forward and backward of attention, from the micro-kernels of generic/attention.h. Forward splits the blocks of
// queries of all heads over the threads, backward the heads of keys, each with all the queries that meet it: every sum
// is made by one thread in one order, so the bits are the same for any number of threads.
#include "../attention.h"

#include <algorithm>

#include "parallel.h"
#include "scratch.h"
#include "table.h"

namespace peftfast::cpu {
namespace {

// V's rows in pairs, for all heads.
void pair_values(const AttentionArgs& args, uint16_t* pairs, const Threads& threads) {
  constexpr int64_t at_once = 256;
  const int64_t rows = (args.S + 1) / 2 * 2, parts = (args.S + at_once - 1) / at_once;
  parallel_for(threads, args.batch * args.kv_heads * parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % parts * at_once, head = i / parts;
      const void* X = args.V.at<uint16_t>(head / args.kv_heads, head % args.kv_heads, 0);
      table().pair_rows({.X = X, .ld = args.V.row, .D = args.D, .pairs = pairs + head * rows * args.D}, first,
                        std::min(first + at_once, args.S));
    }
  });
}

}  // namespace

void attention(const AttentionArgs& args, const Threads& threads) {
  thread_local Scratch scratch;
  uint16_t* pairs = nullptr;
  if (args.dtype == DType::bf16) {
    pairs = reinterpret_cast<uint16_t*>(scratch.floats(args.batch * args.kv_heads * ((args.S + 1) / 2) * args.D));
    pair_values(args, pairs, threads);
  }
  const int64_t blocks = args.batch * args.heads * ((args.T + panel_columns - 1) / panel_columns);
  parallel_for_each(threads, {{blocks, 1}}, [&](size_t, int64_t begin, int64_t end) {
    table().attention[static_cast<int>(args.dtype)](args, pairs, begin, end);
  });
}

void attention_backward(const AttentionBackwardArgs& backward, const Threads& threads) {
  const AttentionArgs& args = backward.of;
  const int64_t heads = args.batch * args.kv_heads, blocks = (args.T + panel_columns - 1) / panel_columns;
  if (heads == 0) return;
  const bool whole = heads >= threads.count;
  const int64_t apart = whole ? 1 : 2 * threads.count / heads;  // parts of a head
  const int64_t chunks = (args.S + keys_at_once - 1) / keys_at_once;
  const int64_t keys = std::max<int64_t>(1, (chunks + apart - 1) / apart) * keys_at_once;  // of a part
  std::vector<AttentionPart> parts;
  for (int64_t i = 0; i < heads; ++i) {
    AttentionPart all{i / args.kv_heads, i % args.kv_heads, 0, args.S, 0, blocks, true, whole};
    for (int64_t key = 0; key == 0 || key < args.S; key += keys, parts.push_back(all))
      all.key_begin = key, all.key_end = std::min(key + keys, args.S);
    if (whole) continue;
    all.key_begin = 0, all.of_keys = false, all.of_queries = true;
    const int64_t at_once = (blocks + apart - 1) / apart;
    for (int64_t block = 0; block < blocks; block += at_once, parts.push_back(all))
      all.block_begin = block, all.block_end = std::min(block + at_once, blocks);
  }
  parallel_for_each(threads, {{static_cast<int64_t>(parts.size()), 1}}, [&](size_t, int64_t begin, int64_t end) {
    for (; begin < end; ++begin) table().attention_backward[static_cast<int>(args.dtype)](backward, parts[begin]);
  });
}

}  // namespace peftfast::cpu
