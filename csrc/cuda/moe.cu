// Forward and backward of linear layers over groups of rows, each with its own weight and adapter, and the combining of
// what a token's experts say. Offsets, experts and slots are read on the device, so nothing waits for the host.
#include "steps.h"

namespace peftfast::cuda {
namespace {

constexpr int threads = 256;

// The stack of adapters as one segment.
struct Stack {
  Segments segments{};
  Factors A{}, B{}, grad_A{}, grad_B{};
  bool dropout;

  Stack(const GroupedLinearArgs& args) : dropout(args.lora.dropout > 0) {
    const LoraStack& lora = args.lora;
    const int64_t r = lora.rank;
    segments.seed = args.seed;
    if (r > 0)
      segments.list[segments.count++] = {0, static_cast<int>(r), lora.scaling, 1.0f / (1.0f - lora.dropout),
                                         philox::threshold_of(lora.dropout)};
    const auto one = [&](const void* data, int64_t P, int64_t slot, int64_t rank, int64_t column) {
      Factors factors{1, {{const_cast<void*>(data), lora.dtype, r, {slot, rank, column}}}, lora.slots, r, P};
      return factors;
    };
    A = one(lora.A, args.K, r * args.K, args.K, 1);
    grad_A = one(lora.grad_A, args.K, r * args.K, args.K, 1);
    B = one(lora.B, args.N, lora.B_strides[0], lora.B_strides[2], lora.B_strides[1]);
    grad_B = one(lora.grad_B, args.N, r * args.N, 1, r);
  }

  const float* in_place() const {
    return A.list[0].dtype == DType::f32 ? static_cast<const float*>(A.list[0].data) : nullptr;
  }
};

template <class T>
__global__ void __launch_bounds__(threads) combine_kernel(CombineArgs args) {
  const T* X = static_cast<const T*>(args.X);
  T* Y = static_cast<T*>(args.Y);
  const int64_t token = blockIdx.x;
  for (int64_t h = threadIdx.x; h < args.H; h += threads) {
    float sum = 0;
    for (int64_t k = 0; k < args.top_k; ++k) {
      const int64_t i = token * args.top_k + k;
      sum = fmaf(args.weights ? args.weights[i] : 1.0f, to_float(X[args.places[i] * args.H + h]), sum);
    }
    Y[token * args.H + h] = from_float<T>(sum);
  }
}

// A block takes a token, a warp one of its experts at a time.
template <class T>
__global__ void __launch_bounds__(threads) combine_backward_kernel(CombineBackwardArgs backward) {
  const CombineArgs& args = backward.of;
  const T* X = static_cast<const T*>(args.X);
  const T* G = static_cast<const T*>(backward.G);
  T* dX = static_cast<T*>(backward.dX);
  const int64_t token = blockIdx.x;
  const int lane = threadIdx.x % lanes;
  for (int64_t k = threadIdx.x / lanes; k < args.top_k; k += threads / lanes) {
    const int64_t i = token * args.top_k + k, row = args.places[i];
    const float weight = args.weights ? args.weights[i] : 1.0f;
    float dot = 0;
    for (int64_t h = lane; h < args.H; h += lanes) {
      const float g = to_float(G[token * args.H + h]);
      dX[row * args.H + h] = from_float<T>(weight * g);
      if (backward.grad_weights) dot = fmaf(to_float(X[row * args.H + h]), g, dot);
    }
    if (backward.grad_weights == nullptr) continue;
    for (int bits = lanes / 2; bits > 0; bits /= 2) dot += __shfl_xor_sync(whole_warp, dot, bits);
    if (lane == 0) backward.grad_weights[i] = dot;
  }
}

}  // namespace

void grouped_linear(const GroupedLinearArgs& args, const Stream& stream) {
  if (args.M == 0) return;
  const Stack stack(args);
  const int64_t r = args.lora.rank, slots = args.lora.slots;
  const Workspace packed_A(stream, stack.in_place() ? 0 : slots * r * args.K * 4);
  const Workspace packed_B(stream, slots * r * args.N * 4);
  if (r > 0 && !stack.in_place()) pack(stack.A, packed_A.as<float>(), stream);
  if (r > 0) pack(stack.B, packed_B.as<float>(), stream);
  const Rows rows{args.M, args.groups};
  down({.rows = rows,
        .dtype = args.dtype,
        .X = args.X,
        .ldx = args.ldx,
        .Q = args.K,
        .A = stack.in_place() ? stack.in_place() : packed_A.as<float>(),
        .R = r,
        .segments = stack.segments,
        .dropout = stack.dropout,
        .U = args.U},
       stream);
  if (args.N == 0) return;
  linear({.rows = rows,
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
          .R = r,
          .segments = stack.segments,
          .dropout = false,
          .Y = args.Y},
         stream);
}

void grouped_linear_backward(const GroupedLinearBackwardArgs& backward, const Stream& stream) {
  const GroupedLinearArgs& args = backward.of;
  const Stack stack(args);
  const int64_t r = args.lora.rank, slots = args.lora.slots, K = args.K, N = args.N;
  const Rows rows{args.M, args.groups};
  const bool wants_V = r > 0 && args.M > 0 && (args.lora.grad_A || backward.dX);
  const Workspace V(stream, wants_V ? args.M * r * 4 : 0), packed_B(stream, wants_V ? slots * r * N * 4 : 0);
  const Workspace packed_A(stream, wants_V && backward.dX && !stack.in_place() ? slots * r * K * 4 : 0);
  if (wants_V) {
    pack(stack.B, packed_B.as<float>(), stream);
    down({.rows = rows,
          .dtype = args.dtype,
          .X = backward.G,
          .ldx = backward.ldg,
          .Q = N,
          .A = packed_B.as<float>(),
          .R = r,
          .segments = stack.segments,
          .dropout = false,
          .U = V.as<float>()},
         stream);
  }
  if (backward.dX && args.M > 0 && K > 0) {
    if (packed_A.as<float>()) pack(stack.A, packed_A.as<float>(), stream);
    linear({.rows = rows,
            .P = K,
            .Q = N,
            .dtype = args.dtype,
            .compute = args.W.compute,
            .X = backward.G,
            .ldx = backward.ldg,
            .W = args.W,
            .reduction_contiguous = args.W.transposed,
            .U = V.as<float>(),
            .L = packed_A.as<float>() ? packed_A.as<float>() : stack.in_place(),
            .R = r,
            .segments = stack.segments,
            .dropout = stack.dropout,
            .Y = backward.dX},
           stream);
  }
  if (args.lora.grad_A)
    outer({.rows = rows,
           .dtype = args.dtype,
           .slots = slots,
           .R = r,
           .P = K,
           .V = V.as<float>(),
           .X = args.X,
           .ldx = args.ldx,
           .segments = stack.segments,
           .dropout = stack.dropout},
          stack.grad_A, stream);
  if (args.lora.grad_B)
    outer({.rows = rows,
           .dtype = args.dtype,
           .slots = slots,
           .R = r,
           .P = N,
           .V = args.U,
           .X = backward.G,
           .ldx = backward.ldg,
           .segments = stack.segments,
           .dropout = false},
          stack.grad_B, stream);
}

void combine(const CombineArgs& args, const Stream& stream) {
  const dim3 grid{static_cast<unsigned>(args.H > 0 ? args.tokens : 0), 1, 1};
  const auto kernel = args.dtype == DType::f32    ? combine_kernel<float>
                      : args.dtype == DType::bf16 ? combine_kernel<bf16>
                                                  : combine_kernel<f16>;
  launch("combine", kernel, grid, threads, 0, stream, args);
}

void combine_backward(const CombineBackwardArgs& args, const Stream& stream) {
  const auto kernel = args.of.dtype == DType::f32    ? combine_backward_kernel<float>
                      : args.of.dtype == DType::bf16 ? combine_backward_kernel<bf16>
                                                     : combine_backward_kernel<f16>;
  launch("combine_backward", kernel, {static_cast<unsigned>(args.of.tokens), 1, 1}, threads, 0, stream, args);
}

}  // namespace peftfast::cuda
