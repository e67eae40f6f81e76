// Forward and backward of a bottleneck adapter, from the micro-kernels of generic/lora.h and generic/adapter.h. The
// rows of the standard norm are x' = (x - mean) / deviation; norm(x) = weight * x' + bias.
//
//   forward    Z = norm(X) down^T + down_bias, A = scaling * dropout(activation(Z))    split over rows
//              Y = residual + A up^T + scaling * up_bias                               split over panels of 64 columns
//   backward   V = G up, then V = dL/dZ                                                split over rows
//              grad_up, grad_up_bias = G^T [A, 1], E = V^T X', dX = V down + ...       split over panels
//
// The norm's weight and bias go into the first product: with down' = down * weight,
//
//   norm(X) down^T = X' down'^T + down bias
//   grad_down = E * weight + (sum of V) bias^T,  grad_norm_weight = sum of E * down,  grad_norm_bias = down^T sum of V
//
// so nothing of the size of X is made for it. X' has rows of mean zero: taking the mean out of the rows of down'
// changes no product with it, and V down' is then the part of X's gradient that has mean zero. What is left of the
// norm's backward takes out of it the part along x', of size V . (Z - its constant) / H, a product of the bottleneck's
// size.
//
// Every element is computed by one thread in an order that the split does not change: the same bits for any number of
// threads.
#include <algorithm>
#include <vector>

#include "../kernels.h"
#include "../philox.h"
#include "linear.h"
#include "scratch.h"
#include "table.h"

namespace peftfast::cpu {
namespace {

constexpr int64_t rows_at_once = 16;  // of the bottleneck: work that is worth a thread

// What forward and backward have in common.
class Bottleneck {
 public:
  Bottleneck(const BottleneckAdapterArgs& args, const Threads& threads)
      : args_(args),
        threads_(threads),
        ones_(args.D, 1.0f),
        z_constant_(args.D, 0.0f),
        segment_{0, args.D, philox::threshold_of(args.dropout), 0, 1.0f / (1.0f - args.dropout)},
        whole_{0, args.D, 0, 0, 1.0f} {
    if (args.down_bias != nullptr) std::copy_n(args.down_bias, args.D, z_constant_.begin());
    const philox::Key key = philox::key_of(segment_.threshold ? *args.seed : 0);
    dropout_ = {&segment_, 1, key.low, key.high};
    thread_local Scratch of_down, of_up, of_moments;
    down_ = static_cast<const float*>(args.down);
    if (args.parameters != DType::f32 || args.norm_weight != nullptr) {
      float* out = of_down.floats(args.D * args.H);
      widen(args.down, args.D * args.H, args.parameters, out, threads);
      down_ = out;
      if (args.norm_weight != nullptr) fold_norm(out, of_moments.floats(2 * args.M));
    }
    float* up = of_up.floats(args.D * args.H);
    transpose(args.up, args.H, args.D, args.parameters, up, threads);
    up_ = up;
  }

  const float* down() const { return down_; }         // [D, H]; with a norm: times its weight, rows of mean zero
  const float* up_transposed() const { return up_; }  // [D, H]
  const float* ones() const { return ones_.data(); }  // [D]
  const float* z_constant() const { return z_constant_.data(); }  // [D], what Z has beside the product with x'
  RowNorm norm() const { return norm_; }
  Dropout dropout() const { return dropout_; }
  Dropout no_dropout() const { return {&whole_, 1, 0, 0}; }

 private:
  void fold_norm(float* down, float* mean_rstd) {
    const int64_t M = args_.M, H = args_.H;
    parallel_for(threads_, args_.D, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        float* row = down + j * H;
        double bias = 0, mean = 0;
        for (int64_t h = 0; args_.norm_bias != nullptr && h < H; ++h)
          bias += static_cast<double>(row[h]) * args_.norm_bias[h];
        z_constant_[j] += static_cast<float>(bias);
        for (int64_t h = 0; h < H; ++h) row[h] *= args_.norm_weight[h], mean += row[h];
        for (int64_t h = 0; h < H; ++h) row[h] -= static_cast<float>(mean / H);
      }
    });
    norm_ = {mean_rstd, mean_rstd + M};
    const MomentsArgs moments{args_.X, args_.ldx, H, args_.norm_eps, mean_rstd, mean_rstd + M};
    parallel_for(threads_, M, [&](int64_t begin, int64_t end) {
      table().moments[static_cast<int>(args_.dtype)](moments, begin, end);
    });
  }

  const BottleneckAdapterArgs& args_;
  const Threads& threads_;
  std::vector<float> ones_, z_constant_;
  Segment segment_, whole_;
  Dropout dropout_{};
  RowNorm norm_{};
  const float *down_ = nullptr, *up_ = nullptr;
};

// From E [D, H] and the sum of V [D]: the gradients of the norm, and that of down in place of E.
void norm_gradients(const BottleneckAdapterBackwardArgs& backward, float* E, const float* sum, const Threads& threads) {
  const BottleneckAdapterArgs& args = backward.of;
  const int64_t H = args.H, D = args.D;
  thread_local Scratch scratch;
  const float* down = static_cast<const float*>(args.down);
  if (args.parameters != DType::f32) {
    float* out = scratch.floats(D * H);
    widen(args.down, D * H, args.parameters, out, threads);
    down = out;
  }
  constexpr int64_t chunk = 256;
  parallel_for(threads, (H + chunk - 1) / chunk, [&](int64_t begin, int64_t end) {
    begin *= chunk, end = std::min(end * chunk, H);
    float *weight = backward.grad_norm_weight, *bias = backward.grad_norm_bias;
    if (weight) std::fill(weight + begin, weight + end, 0.0f);
    if (bias) std::fill(bias + begin, bias + end, 0.0f);
    for (int64_t j = 0; j < D; ++j)
      for (int64_t h = begin; h < end; ++h) {
        float& e = E[j * H + h];
        if (weight) weight[h] += down[j * H + h] * e;
        if (bias) bias[h] += down[j * H + h] * sum[j];
        e = args.norm_weight[h] * e + (args.norm_bias ? args.norm_bias[h] * sum[j] : 0.0f);
      }
  });
}

template <class Body>
void over_rows(const Threads& threads, int64_t M, Body body) {
  parallel_for(threads, (M + rows_at_once - 1) / rows_at_once,
               [&](int64_t begin, int64_t end) { body(begin * rows_at_once, std::min(end * rows_at_once, M)); });
}

}  // namespace

void bottleneck_adapter(const BottleneckAdapterArgs& args, const Threads& threads) {
  const int64_t M = args.M, H = args.H, D = args.D;
  const Bottleneck adapter(args, threads);
  thread_local Scratch of_A, of_bias;
  float *A = of_A.floats(M * D), *bias = of_bias.floats(H);
  down({{.args = {.X = args.X,
                  .ldx = args.ldx,
                  .Q = H,
                  .A = adapter.down(),
                  .scale = adapter.ones(),
                  .R = D,
                  .dropout = adapter.no_dropout(),
                  .U = args.Z,
                  .norm = adapter.norm()},
         .M = M}},
       args.dtype, threads);
  over_rows(threads, M, [&](int64_t begin, int64_t end) {
    table().bottleneck({.activation = args.activation,
                        .D = D,
                        .bias = adapter.z_constant(),
                        .dropout = adapter.dropout(),
                        .scale = args.scaling,
                        .Z = args.Z,
                        .A = A},
                       begin, end);
  });
  for (int64_t h = 0; args.up_bias != nullptr && h < H; ++h) bias[h] = args.scaling * args.up_bias[h];
  linear({{.M = M,
           .P = H,
           .bias = args.up_bias ? bias : nullptr,
           .U = A,
           .L = adapter.up_transposed(),
           .R = D,
           .dropout = adapter.no_dropout(),
           .Y = args.Y,
           .out = args.dtype,
           .addends = {{.X = args.residual, .ld = args.ld_residual}}}},
         args.dtype, threads);
}

void bottleneck_adapter_backward(const BottleneckAdapterBackwardArgs& backward, const Threads& threads) {
  const BottleneckAdapterArgs& args = backward.of;
  const int64_t M = args.M, H = args.H, D = args.D;
  const bool norm = args.norm_weight != nullptr;
  const Bottleneck adapter(args, threads);
  thread_local Scratch of_V, of_A, of_rows, of_sums, of_D;
  float *V = of_V.floats(M * D), *A = of_A.floats(M * (D + 1)), *rows = of_rows.floats(M);
  down({{.args = {.X = backward.G,
                  .ldx = backward.ldg,
                  .Q = H,
                  .A = adapter.up_transposed(),
                  .scale = adapter.ones(),
                  .R = D,
                  .dropout = adapter.no_dropout(),
                  .U = V},
         .M = M}},
       args.dtype, threads);
  over_rows(threads, M, [&](int64_t begin, int64_t end) {
    table().bottleneck_backward({.activation = args.activation,
                                 .D = D,
                                 .dropout = adapter.dropout(),
                                 .scale = args.scaling,
                                 .Z = args.Z,
                                 .A = A,
                                 .V = V,
                                 .dot = rows},
                                begin, end);
  });

  if (backward.grad_up || backward.grad_up_bias || backward.grad_scaling) {
    float* grads = of_D.floats((D + 1) * H);  // of up^T, and the sum of G
    const Segment parts[] = {{0, D, 0, 0, args.scaling}, {D, D + 1, 0, 0, 1.0f}};
    outer({{.V = A,
            .R = D + 1,
            .X = backward.G,
            .ldx = backward.ldg,
            .M = M,
            .P = H,
            .dropout = {parts, 2, 0, 0},
            .D = grads}},
          args.dtype, threads);
    const float* sum = grads + D * H;
    if (backward.grad_up) write_gradient(grads, D, H, args.parameters, true, backward.grad_up, threads);
    if (backward.grad_up_bias)
      for (int64_t h = 0; h < H; ++h) backward.grad_up_bias[h] = args.scaling * sum[h];
    if (backward.grad_scaling) {
      double total = 0;
      for (int64_t m = 0; m < M; ++m) total += rows[m];
      for (int64_t h = 0; args.up_bias != nullptr && h < H; ++h) total += static_cast<double>(args.up_bias[h]) * sum[h];
      *backward.grad_scaling = static_cast<float>(total);
    }
  }

  if (backward.grad_down || backward.grad_down_bias || backward.grad_norm_weight || backward.grad_norm_bias) {
    float* sum = of_sums.floats(D);  // of V
    const std::vector<float> ones(M, 1.0f);
    const Segment one{0, 1, 0, 0, 1.0f};
    outer({{.V = ones.data(), .R = 1, .X = V, .ldx = D, .M = M, .P = D, .dropout = {&one, 1, 0, 0}, .D = sum}},
          DType::f32, threads);
    if (backward.grad_down_bias) std::copy_n(sum, D, backward.grad_down_bias);
    if (backward.grad_down || norm) {
      float* E = of_D.floats(D * H);
      outer({{.V = V,
              .R = D,
              .X = args.X,
              .ldx = args.ldx,
              .M = M,
              .P = H,
              .dropout = adapter.no_dropout(),
              .D = E,
              .norm = adapter.norm()}},
            args.dtype, threads);
      if (norm) norm_gradients(backward, E, sum, threads);
      if (backward.grad_down) write_gradient(E, D, H, args.parameters, false, backward.grad_down, threads);
    }
  }

  if (backward.dX == nullptr) return;
  float* along = rows;
  if (norm)  // V becomes what meets down', and `along` the part along x - mean
    for (int64_t m = 0; m < M; ++m) {
      const float rstd = adapter.norm().rstd[m];
      double dot = 0;
      for (int64_t j = 0; j < D; ++j) {
        dot += static_cast<double>(V[m * D + j]) * (args.Z[m * D + j] - adapter.z_constant()[j]);
        V[m * D + j] *= rstd;
      }
      along[m] = static_cast<float>(-dot / H) * rstd * rstd;
    }
  linear({{.M = M,
           .P = H,
           .U = V,
           .L = adapter.down(),
           .R = D,
           .dropout = adapter.no_dropout(),
           .Y = backward.dX,
           .out = args.dtype,
           .addends = {{.X = backward.residual_is_X ? backward.G : nullptr, .ld = backward.ldg},
                       {.X = norm ? args.X : nullptr, .ld = args.ldx, .scale = along, .center = adapter.norm().mean}}}},
         args.dtype, threads);
}

}  // namespace peftfast::cpu
