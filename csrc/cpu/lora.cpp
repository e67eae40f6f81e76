// Forward and backward of a linear layer with adapters, from the micro-kernels of generic/lora.h:
//
//   forward    U = s drop(X) A^T                       split over rows: dot products along K
//              Y = X W^T + bias + U B^T                split over panels of 64 columns (and blocks of rows)
//   backward   V = s G B                               split over rows
//              dX = G W + drop'(V A)                   split over panels, as Y
//              grad_A = V^T drop(X), grad_B = G^T U    split over panels; a thread sums all M rows of its columns
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
#include "isa.h"
#include "linear.h"
#include "scratch.h"
#include "table.h"

namespace peftfast::cpu {
namespace {

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
      widen(a.A, a.rank * K_, a.dtype, A32 + row * K_, threads);
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
      transpose(a.B, N_, a.rank, a.dtype, B32 + row * N_, threads);
    }
    return B32;
  }

 private:
  const LoraAdapter* adapters_;
  int count_;
  int64_t K_, N_, rank_ = 0;
  std::vector<float> scale_, dropped_scale_;
  std::vector<Segment> segments_;
  Dropout dropout_{};
  Segment whole_{};
};

}  // namespace

void lora_linear(const LoraLinearArgs& args, const Threads& threads) {
  if (args.M == 0 || args.N == 0) return;
  Adapters adapters(args.adapters, args.adapter_count, args.seed, args.K, args.N);
  const int64_t R = adapters.rank();
  down({{.args = {.X = args.X,
                  .ldx = args.ldx,
                  .Q = args.K,
                  .A = adapters.A(threads),
                  .scale = adapters.dropped_scale(),
                  .R = R,
                  .dropout = adapters.dropout(),
                  .U = args.U},
         .M = args.M}},
       args.dtype, threads);
  linear({{.M = args.M,
           .P = args.N,
           .Q = args.K,
           .X = args.X,
           .ldx = args.ldx,
           .W = args.W.dense,
           .ldw = args.W.ld,
           .reduction_contiguous = !args.W.transposed,
           .fourbit = args.W.fourbit.blocksize ? &args.W.fourbit : nullptr,
           .bias = args.bias,
           .U = args.U,
           .L = adapters.B_transposed(threads),
           .R = R,
           .dropout = adapters.no_dropout(),
           .Y = args.Y,
           .out = args.dtype}},
         args.W.compute, threads);
}

void lora_linear_backward(const LoraLinearBackwardArgs& backward, const Threads& threads) {
  const LoraLinearArgs& args = backward.of;
  Adapters adapters(args.adapters, args.adapter_count, args.seed, args.K, args.N);
  const int64_t R = adapters.rank(), M = args.M, K = args.K, N = args.N;
  const auto wants_A = [](const LoraAdapter& a) { return a.grad_A != nullptr; };
  const auto wants_B = [](const LoraAdapter& a) { return a.grad_B != nullptr; };
  const bool any_A = std::any_of(args.adapters, args.adapters + args.adapter_count, wants_A);
  const bool any_B = std::any_of(args.adapters, args.adapters + args.adapter_count, wants_B);

  thread_local Scratch scratch_V, scratch_D;
  float* V = nullptr;
  if (any_A || backward.dX != nullptr) {
    V = scratch_V.floats(M * R);
    down({{.args = {.X = backward.G,
                    .ldx = backward.ldg,
                    .Q = N,
                    .A = adapters.B_transposed(threads),
                    .scale = adapters.scale(),
                    .R = R,
                    .dropout = adapters.no_dropout(),
                    .U = V},
           .M = M}},
         args.dtype, threads);
  }
  if (backward.dX != nullptr)
    linear({{.M = M,
             .P = K,
             .Q = N,
             .X = backward.G,
             .ldx = backward.ldg,
             .W = args.W.dense,
             .ldw = args.W.ld,
             .reduction_contiguous = args.W.transposed,
             .fourbit = args.W.fourbit.blocksize ? &args.W.fourbit : nullptr,
             .U = V,
             .L = adapters.A(threads),
             .R = R,
             .dropout = adapters.dropout(),
             .Y = backward.dX,
             .out = args.dtype}},
           args.W.compute, threads);
  const auto gradient = [&](const OuterArgs& outer_args, bool of_A) {
    outer({outer_args}, args.dtype, threads);
    int64_t row = 0;
    for (int i = 0; i < args.adapter_count; row += args.adapters[i].rank, ++i) {
      const LoraAdapter& a = args.adapters[i];
      if (void* out = of_A ? a.grad_A : a.grad_B)
        write_gradient(outer_args.D + row * outer_args.P, a.rank, outer_args.P, a.dtype, !of_A, out, threads);
    }
  };
  float* D = scratch_D.floats(R * std::max(any_A ? K : 0, any_B ? N : 0));
  if (any_A)
    gradient({.V = V, .R = R, .X = args.X, .ldx = args.ldx, .M = M, .P = K, .dropout = adapters.dropout(), .D = D},
             true);
  if (any_B)
    gradient({.V = args.U,
              .R = R,
              .X = backward.G,
              .ldx = backward.ldg,
              .M = M,
              .P = N,
              .dropout = adapters.no_dropout(),
              .D = D},
             false);
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
