// Putting together what the experts of a token say. Products with experts are those of lora.cu.
#include "common.cuh"

namespace peftfast::cuda {
namespace {

constexpr int threads = 256;

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
