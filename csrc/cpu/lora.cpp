// Forward and backward of a linear layer with adapters, from the micro-kernels of generic/lora.h:
//
//   forward    U = s drop(X) A^T        split over rows: dot products along K
//              Y = X W^T + bias + U B^T    split over panels of 64 columns (and blocks of rows)
//   backward   V = s G B                split over rows
//              dX = G W + drop'(V A)       split over panels, as Y
//              grad_A = V^T drop(X), grad_B = G^T U    split over panels of columns; every thread sums all M rows of
//              its
//                                       own columns
//
// Every element is computed by one thread in an order that the split does not change: the same bits for any number of
// threads. The low-rank part is fp32 throughout; the adapters are brought to fp32 [R, K] and [R, N] once per call.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "../kernels.h"
#include "../philox.h"
#include "generic/convert.h"
#include "parallel.h"
#include "scratch.h"
#include "table.h"

namespace peftfast::cpu {
namespace {

constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// All adapters of a layer as one of rank R.
class Adapters {
 public:
  Adapters(const LoraAdapter* adapters, int count, const int64_t* seed, int64_t K, int64_t N)
      : adapters_(adapters), count_(count), K_(K), N_(N) {
    const bool any_dropout = std::any_of(adapters, adapters + count, [](auto& a) { return a.dropout > 0; });
    for (int i = 0; i < count; ++i) {
      const LoraAdapter& a = adapters[i];
      const Segment segment{rank_, rank_ + a.rank, philox::threshold_of(a.dropout), static_cast<uint32_t>(i),
                            1.0f / (1.0f - a.dropout)};
      if (a.rank > 0 && (segments_.empty() || any_dropout))
        segments_.push_back(segment);
      else if (a.rank > 0)
        segments_.back().end = segment.end;  // nothing drops: one run of ranks
      rank_ += a.rank;
      scale_.insert(scale_.end(), a.rank, a.scaling);
      dropped_scale_.insert(dropped_scale_.end(), a.rank, a.scaling * segment.keep_scale);
    }
    const philox::Key key = philox::key_of(any_dropout ? *seed : 0);
    dropout_ = {segments_.data(), static_cast<int>(segments_.size()), key.low, key.high};
    whole_ = {0, rank_, 0, 0, 1.0f};
  }

  int64_t rank() const { return rank_; }
  const float* scale() const { return scale_.data(); }                  // scaling of each rank
  const float* dropped_scale() const { return dropped_scale_.data(); }  // scaling / (1 - dropout)
  Dropout dropout() const { return dropout_; }
  Dropout no_dropout() const { return {&whole_, rank_ > 0 ? 1 : 0, 0, 0}; }

  // A in fp32 [R, K]: the caller's own memory where it already is.
  const float* A(const Threads& threads) {
    if (count_ == 1 && adapters_[0].dtype == DType::f32) return static_cast<const float*>(adapters_[0].A);
    thread_local Scratch scratch;
    float* A32 = scratch.floats(rank_ * K_);
    int64_t row = 0;
    for (int i = 0; i < count_; row += adapters_[i].rank, ++i) {
      const LoraAdapter& a = adapters_[i];
      float* out = A32 + row * K_;
      parallel_for(threads, (a.rank * K_ + chunk - 1) / chunk, [&](int64_t begin, int64_t end) {
        const char* source = static_cast<const char*>(a.A) + begin * chunk * size_of(a.dtype);
        const int64_t n = std::min(end * chunk, a.rank * K_) - begin * chunk;
        table().convert[static_cast<int>(a.dtype)](source, n, DType::f32, out + begin * chunk);
      });
    }
    return A32;
  }

  // B^T in fp32 [R, N].
  const float* B_transposed(const Threads& threads) {
    thread_local Scratch scratch;
    float* B32 = scratch.floats(rank_ * N_);
    int64_t row = 0;
    for (int i = 0; i < count_; row += adapters_[i].rank, ++i) {
      const LoraAdapter& a = adapters_[i];
      const TransposeArgs args{a.B, a.rank, B32 + row * N_, N_};
      parallel_for(threads, (N_ + rows - 1) / rows, [&](int64_t begin, int64_t end) {
        table().transpose[static_cast<int>(a.dtype)](args, begin * rows, std::min(end * rows, N_));
      });
    }
    return B32;
  }

 private:
  static constexpr int64_t chunk = 16384, rows = 512;  // of work that is worth a thread

  const LoraAdapter* adapters_;
  int count_;
  int64_t K_, N_, rank_ = 0;
  std::vector<float> scale_, dropped_scale_;
  std::vector<Segment> segments_;
  Dropout dropout_{};
  Segment whole_{};
};

void down(const DownArgs& args, DType dtype, int64_t M, const Threads& threads) {
  if (args.R == 0) return;
  constexpr int64_t rows = 12;  // a multiple of every register tile
  parallel_for(threads, (M + rows - 1) / rows, [&](int64_t begin, int64_t end) {
    table().down[static_cast<int>(dtype)](args, begin * rows, std::min(end * rows, M));
  });
}

// The dtype that X and a 4-bit weight are multiplied in. fp32 is never less accurate, and costs nothing more where
// there is no instruction for 16 bits; few rows are bound by the reading of the weight.
DType product_dtype(const LinearArgs& args, DType dtype, DType wanted) {
  if (args.M <= few_rows && args.reduction_contiguous) return DType::f32;
  if (wanted == dtype) return dtype;
  return dtype == DType::f32 && wanted == DType::bf16 && table().bf16_dot ? DType::bf16 : DType::f32;
}

void linear(LinearArgs args, DType dtype, const BaseWeight& W, const Threads& threads) {
  if (W.fourbit.blocksize != 0) {
    args.fourbit = &W.fourbit;
    args.bf16_codes = W.compute == DType::bf16;
    const DType product = product_dtype(args, dtype, W.compute);
    if (product != dtype) {
      thread_local Scratch scratch;
      char* converted = reinterpret_cast<char*>(scratch.floats(args.M * args.Q));
      const int64_t row_size = args.Q * size_of(product);
      parallel_for(threads, args.M, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m)
          table().convert[static_cast<int>(dtype)](static_cast<const char*>(args.X) + m * args.ldx * size_of(dtype),
                                                   args.Q, product, converted + m * row_size);
      });
      args.X = converted, args.ldx = args.Q, dtype = product;
    }
    const int64_t arranged_size = table().arranged_size(args.Q);
    if (args.M <= few_rows && args.reduction_contiguous && arranged_size > 0) {
      thread_local Scratch scratch;
      float* arranged = scratch.floats(args.M * arranged_size);
      for (int64_t m = 0; m < args.M; ++m)
        table().arrange(static_cast<const float*>(args.X) + m * args.ldx, args.Q, args.bf16_codes,
                        arranged + m * arranged_size);
      args.X = arranged, args.ldx = arranged_size;
    }
  }
  const int64_t panels = (args.P + panel_columns - 1) / panel_columns;
  // Rows are parted only to bound the memory of parked accumulators, or when there are too few panels to go round: each
  // part packs the panel again.
  int64_t parts = (args.M + 2047) / 2048;
  while (parts * panels < 2 * threads.count && args.M / (parts + 1) >= 192) ++parts;
  const int64_t rows = round_up((args.M + parts - 1) / std::max<int64_t>(parts, 1), 12);
  parallel_for(threads, panels * parts, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % parts * rows;
      if (first < args.M)
        table().linear[static_cast<int>(dtype)](args, item / parts * panel_columns, first,
                                                std::min(first + rows, args.M));
    }
  });
}

void outer(const OuterArgs& args, DType dtype, const Threads& threads) {
  parallel_for(threads, (args.P + panel_columns - 1) / panel_columns, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      table().outer[static_cast<int>(dtype)](args, panel * panel_columns);
  });
}

template <class T>
void narrow(const float* D, int64_t rank, int64_t P, bool transposed, T* out, int64_t begin, int64_t end) {
  for (int64_t j = 0; j < rank; ++j)
    for (int64_t p = begin; p < end; ++p) out[transposed ? p * rank + j : j * P + p] = from_float<T>(D[j * P + p]);
}

// The gradient of one adapter's factor from its rows of D [R, P]: as they are for A, transposed for B.
void write_gradient(const float* D, int64_t rank, int64_t P, DType dtype, bool transposed, void* out,
                    const Threads& threads) {
  constexpr int64_t chunk = 1024;
  parallel_for(threads, (P + chunk - 1) / chunk, [&](int64_t begin, int64_t end) {
    begin *= chunk, end = std::min(end * chunk, P);
    if (dtype == DType::f32) narrow(D, rank, P, transposed, static_cast<float*>(out), begin, end);
    if (dtype == DType::bf16) narrow(D, rank, P, transposed, static_cast<bf16*>(out), begin, end);
    if (dtype == DType::f16) narrow(D, rank, P, transposed, static_cast<f16*>(out), begin, end);
  });
}

}  // namespace

void lora_linear(const LoraLinearArgs& args, const Threads& threads) {
  if (args.M == 0 || args.N == 0) return;
  Adapters adapters(args.adapters, args.adapter_count, args.seed, args.K, args.N);
  const int64_t R = adapters.rank();
  down({args.X, args.ldx, args.K, adapters.A(threads), adapters.dropped_scale(), R, adapters.dropout(), args.U},
       args.dtype, args.M, threads);
  linear({args.M, args.N, args.K, args.X, args.ldx, args.W.dense, args.W.ld, !args.W.transposed, nullptr, args.bias,
          args.U, adapters.B_transposed(threads), R, adapters.no_dropout(), args.Y, args.dtype, false},
         args.dtype, args.W, threads);
}

void lora_linear_backward(const LoraLinearBackwardArgs& args, const Threads& threads) {
  Adapters adapters(args.adapters, args.adapter_count, args.seed, args.K, args.N);
  const int64_t R = adapters.rank(), M = args.M, K = args.K, N = args.N;
  const auto wants_A = [](const LoraAdapter& a) { return a.grad_A != nullptr; };
  const auto wants_B = [](const LoraAdapter& a) { return a.grad_B != nullptr; };
  const bool any_A = std::any_of(args.adapters, args.adapters + args.adapter_count, wants_A);
  const bool any_B = std::any_of(args.adapters, args.adapters + args.adapter_count, wants_B);

  thread_local Scratch scratch_V, scratch_D;
  float* V = nullptr;
  if (any_A || args.dX != nullptr) {
    V = scratch_V.floats(M * R);
    down({args.G, args.ldg, N, adapters.B_transposed(threads), adapters.scale(), R, adapters.no_dropout(), V},
         args.dtype, M, threads);
  }
  if (args.dX != nullptr)
    linear({M, K, N, args.G, args.ldg, args.W.dense, args.W.ld, args.W.transposed, nullptr, nullptr, V,
            adapters.A(threads), R, adapters.dropout(), args.dX, args.dtype, false},
           args.dtype, args.W, threads);
  const auto gradient = [&](const OuterArgs& outer_args, bool of_A) {
    outer(outer_args, args.dtype, threads);
    int64_t row = 0;
    for (int i = 0; i < args.adapter_count; row += args.adapters[i].rank, ++i) {
      const LoraAdapter& a = args.adapters[i];
      if (void* out = of_A ? a.grad_A : a.grad_B)
        write_gradient(outer_args.D + row * outer_args.P, a.rank, outer_args.P, a.dtype, !of_A, out, threads);
    }
  };
  float* D = scratch_D.floats(R * std::max(any_A ? K : 0, any_B ? N : 0));
  if (any_A) gradient({V, R, args.X, args.ldx, M, K, adapters.dropout(), D}, true);
  if (any_B) gradient({args.U, R, args.G, args.ldg, M, N, adapters.no_dropout(), D}, false);
}

double machine_peak(DType dtype, const Threads& threads) {
  constexpr int64_t iterations = 4'000'000;
  double best = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    std::atomic<double> flops{0};
    const auto start = std::chrono::steady_clock::now();
    parallel_for(threads, threads.count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double done = table().flops_of_loop[static_cast<int>(dtype)](iterations);
        for (double sum = flops; !flops.compare_exchange_weak(sum, sum + done);) {
        }
      }
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, flops / seconds.count());
  }
  return best;
}

}  // namespace peftfast::cpu
