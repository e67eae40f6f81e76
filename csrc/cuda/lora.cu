// Forward and backward of a linear layer with adapters, from the steps of steps.h:
//
//   forward    U = s drop(X) A^T,  Y = X W^T + bias + U B^T
//   backward   V = s G B,  dX = G W + drop'(V A),  grad_A = V^T drop(X),  grad_B = G^T U
#include <algorithm>

#include "steps.h"

namespace peftfast::cuda {
namespace {

// All adapters of a layer as one of rank R.
struct Adapters {
  Segments segments{};
  Factors A{}, B{}, grad_A{}, grad_B{};
  bool dropout = false, any_A = false, any_B = false;
  int64_t R = 0;

  Adapters(const LoraLinearArgs& args) {
    if (args.adapter_count > most_adapters)
      throw std::invalid_argument("a layer may have at most " + std::to_string(most_adapters) +
                                  " active adapters on a GPU, got " + std::to_string(args.adapter_count) + ".");
    segments.seed = args.seed;
    for (int i = 0; i < args.adapter_count; ++i) {
      const LoraAdapter& a = args.adapters[i];
      segments.list[segments.count++] = {static_cast<int>(R), static_cast<int>(R + a.rank), a.scaling,
                                         1.0f / (1.0f - a.dropout), philox::threshold_of(a.dropout)};
      const auto add = [&](Factors& to, const void* data, int64_t along_rank, int64_t along_column) {
        to.list[to.count++] = {const_cast<void*>(data), a.dtype, a.rank, {0, along_rank, along_column}};
      };
      add(A, a.A, args.K, 1), add(grad_A, a.grad_A, args.K, 1);
      add(B, a.B, 1, a.rank), add(grad_B, a.grad_B, 1, a.rank);
      R += a.rank;
      dropout |= a.dropout > 0;
      any_A |= a.grad_A != nullptr, any_B |= a.grad_B != nullptr;
    }
    for (Factors* factors : {&A, &grad_A}) factors->slots = 1, factors->R = R, factors->P = args.K;
    for (Factors* factors : {&B, &grad_B}) factors->slots = 1, factors->R = R, factors->P = args.N;
  }

  // Where A is fp32 already, it is not packed.
  const float* in_place() const {
    return A.count == 1 && A.list[0].dtype == DType::f32 ? static_cast<const float*>(A.list[0].data) : nullptr;
  }
};

Rows all_rows(int64_t M) { return {M, {}}; }

}  // namespace

void lora_linear(const LoraLinearArgs& args, const Stream& stream) {
  if (args.M == 0 || args.N == 0) return;
  const Adapters adapters(args);
  const int64_t R = adapters.R;
  const Workspace packed_A(stream, adapters.in_place() ? 0 : R * args.K * 4), packed_B(stream, R * args.N * 4);
  const float* A = adapters.in_place() ? adapters.in_place() : packed_A.as<float>();
  if (R > 0) {
    if (!adapters.in_place()) pack(adapters.A, packed_A.as<float>(), stream);
    pack(adapters.B, packed_B.as<float>(), stream);
  }
  down({.rows = all_rows(args.M),
        .dtype = args.dtype,
        .X = args.X,
        .ldx = args.ldx,
        .Q = args.K,
        .A = A,
        .R = R,
        .segments = adapters.segments,
        .dropout = adapters.dropout,
        .U = args.U},
       stream);
  linear({.rows = all_rows(args.M),
          .P = args.N,
          .Q = args.K,
          .dtype = args.dtype,
          .compute = args.W.compute,
          .X = args.X,
          .ldx = args.ldx,
          .W = args.W,
          .reduction_contiguous = !args.W.transposed,
          .bias = args.bias,
          .U = args.U,
          .L = packed_B.as<float>(),
          .R = R,
          .segments = adapters.segments,
          .dropout = false,
          .Y = args.Y},
         stream);
}

void lora_linear_backward(const LoraLinearBackwardArgs& backward, const Stream& stream) {
  const LoraLinearArgs& args = backward.of;
  const Adapters adapters(args);
  const int64_t R = adapters.R, M = args.M, K = args.K, N = args.N;
  const bool wants_V = R > 0 && (adapters.any_A || backward.dX != nullptr);
  const Workspace V(stream, wants_V ? M * R * 4 : 0), packed_B(stream, wants_V ? R * N * 4 : 0);
  const Workspace packed_A(stream, wants_V && backward.dX && !adapters.in_place() ? R * K * 4 : 0);
  if (wants_V && M > 0) {
    pack(adapters.B, packed_B.as<float>(), stream);
    down({.rows = all_rows(M),
          .dtype = args.dtype,
          .X = backward.G,
          .ldx = backward.ldg,
          .Q = N,
          .A = packed_B.as<float>(),
          .R = R,
          .segments = adapters.segments,
          .dropout = false,
          .U = V.as<float>()},
         stream);
  }
  if (backward.dX != nullptr && M > 0 && K > 0) {
    if (packed_A.as<float>()) pack(adapters.A, packed_A.as<float>(), stream);
    linear({.rows = all_rows(M),
            .P = K,
            .Q = N,
            .dtype = args.dtype,
            .compute = args.W.compute,
            .X = backward.G,
            .ldx = backward.ldg,
            .W = args.W,
            .reduction_contiguous = args.W.transposed,
            .U = V.as<float>(),
            .L = packed_A.as<float>() ? packed_A.as<float>() : adapters.in_place(),
            .R = R,
            .segments = adapters.segments,
            .dropout = adapters.dropout,
            .Y = backward.dX},
           stream);
  }
  if (adapters.any_A)
    outer({.rows = all_rows(M),
           .dtype = args.dtype,
           .slots = 1,
           .R = R,
           .P = K,
           .V = V.as<float>(),
           .X = args.X,
           .ldx = args.ldx,
           .segments = adapters.segments,
           .dropout = adapters.dropout},
          adapters.grad_A, stream);
  if (adapters.any_B)
    outer({.rows = all_rows(M),
           .dtype = args.dtype,
           .slots = 1,
           .R = R,
           .P = N,
           .V = args.U,
           .X = backward.G,
           .ldx = backward.ldg,
           .segments = adapters.segments,
           .dropout = false},
          adapters.grad_B, stream);
}

}  // namespace peftfast::cuda
