// Forward and backward of swiglu and rms_norm, and cross_entropy. All are bound by memory: 16 bytes at a time where
// rows allow it, each operand once (that of a norm and the logits twice), fp32 between.
//
//   swiglu         threads over the elements of a row, blocks over rows and pieces of them; with a sum over each row,
//                  blocks over rows
//   rms_norm       a row per block, or per warp where rows are short
//   weight         threads over columns, blocks over stretches of rows, whose sums a second launch adds up in order
//   cross_entropy  a row per block
#include "common.cuh"

namespace peftfast::cuda {
namespace {

constexpr int threads = 256;
constexpr int64_t short_row = 1024;

// ---- several values at once --------------------------------------------------------------------------------------

// As many values as fill whole words of 16 bytes. Where rows cannot be read in words, or end within one, `count` of
// them are, one by one, and the others are zero: sums have the same order, whatever the layout.
template <bool in_words, int width, class T>
__device__ __forceinline__ void load(const T* from, int64_t count, float (&values)[width]) {
  if constexpr (!in_words) {
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = i < count ? to_float(from[i]) : 0.0f;
  } else {
    constexpr int per_word = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < width; i += per_word) {
      const uint4 word = *reinterpret_cast<const uint4*>(from + i);
      const uint32_t parts[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4)
          values[i + j] = bit_cast<float>(parts[j]);
        else
          values[i + 2 * j] = first_of<T>(parts[j]), values[i + 2 * j + 1] = second_of<T>(parts[j]);
      }
    }
  }
}

template <bool in_words, int width, class T>
__device__ __forceinline__ void store(T* to, int64_t count, const float (&values)[width]) {
  if constexpr (!in_words) {
#pragma unroll
    for (int i = 0; i < width; ++i)
      if (i < count) to[i] = from_float<T>(values[i]);
  } else {
    constexpr int per_word = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < width; i += per_word) {
      uint32_t parts[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4)
          parts[j] = bit_cast<uint32_t>(values[i + j]);
        else
          parts[j] = pack<T>(values[i + 2 * j], values[i + 2 * j + 1]);
      }
      *reinterpret_cast<uint4*>(to + i) = {parts[0], parts[1], parts[2], parts[3]};
    }
  }
}

template <class T>
constexpr int width_of = 16 / sizeof(T);

// Calls body(T{}, std::bool_constant<words>{}).
template <class Body>
void with_type(DType dtype, bool words, Body body) {
  const auto with_words = [&](auto zero) {
    words ? body(zero, std::bool_constant<true>{}) : body(zero, std::bool_constant<false>{});
  };
  if (dtype == DType::f32)
    with_words(float{});
  else if (dtype == DType::bf16)
    with_words(bf16{});
  else
    with_words(f16{});
}

// Whether rows of what is there can be read in words: all of `columns` elements of `size` bytes.
struct Operand {
  const void* data;
  int64_t ld, size;
};
template <int count>
bool fills_words(int64_t columns, int64_t width, const Operand (&operands)[count]) {
  bool all = columns % width == 0;
  for (const Operand& operand : operands)
    all = all && reinterpret_cast<uintptr_t>(operand.data) % 16 == 0 && operand.ld * operand.size % 16 == 0;
  return all;
}

// ---- sums over a row ----------------------------------------------------------------------------------------------

// What the threads of a row, a warp or the whole block, have together. `of_warps` serves one call.
template <class Join>
__device__ __forceinline__ float over_row(float x, int row_threads, float* of_warps, Join join) {
  for (int bits = lanes / 2; bits > 0; bits /= 2) x = join(x, __shfl_xor_sync(whole_warp, x, bits));
  if (row_threads == lanes) return x;
  if (threadIdx.x % lanes == 0) of_warps[threadIdx.x / lanes] = x;
  __syncthreads();
  x = of_warps[0];
  for (int warp = 1; warp < threads / lanes; ++warp) x = join(x, of_warps[warp]);
  return x;
}

__device__ __forceinline__ float sum_over_row(float x, int row_threads, float* of_warps) {
  return over_row(x, row_threads, of_warps, [](float a, float b) { return a + b; });
}

// ---- swiglu ------------------------------------------------------------------------------------------------------

struct Activated {
  float value, slope;
};

// The larger of a sigmoid and its complement is made from the smaller, whose rounding errors count less.
struct Sigmoid {
  float value, complement;
};
__device__ __forceinline__ Sigmoid sigmoid(float x) {
  const float e = expf(-fabsf(x)), smaller = e / (1.0f + e), larger = 1.0f - smaller;
  return {x < 0.0f ? smaller : larger, x < 0.0f ? larger : smaller};
}

__device__ __forceinline__ Activated activated(Activation activation, float z) {
  switch (activation) {
    case Activation::relu:
      return {z < 0.0f ? 0.0f : z, z > 0.0f ? 1.0f : 0.0f};
    case Activation::gelu: {
      const float below = 0.5f * erfcf(-0.707106781f * z);
      return {z * below, below + z * (0.398942280f * expf(-0.5f * z * z))};
    }
    case Activation::gelu_tanh: {
      constexpr float twice = 1.59576912f, cubic = 0.044715f;
      const Sigmoid s = sigmoid(twice * (z + cubic * z * z * z));
      return {z * s.value, s.value + z * (s.value * s.complement) * twice * (1.0f + 3 * cubic * z * z)};
    }
    case Activation::silu: {
      const Sigmoid s = sigmoid(z);
      return {z * s.value, s.value * (1.0f + z * s.complement)};
    }
    case Activation::tanh: {
      const float t = tanhf(z);
      return {t, 1.0f - t * t};
    }
    default:
      return {z, 1.0f};
  }
}

template <class T, bool in_words, bool backward>
__global__ void __launch_bounds__(threads) swiglu_kernel(SwigluArgs args) {
  constexpr int width = width_of<T>;
  for (int64_t m = blockIdx.x; m < args.M; m += gridDim.x) {
    const float weight = args.weights ? args.weights[m] : 1.0f;
    float product = 0;
    for (int64_t i = (blockIdx.y * int64_t{threads} + threadIdx.x) * width; i < args.I;
         i += int64_t{threads} * gridDim.y * width) {
      float gate[width], up[width], G[width], first[width], second[width];
      load<in_words>(static_cast<const T*>(args.gate) + m * args.ld_gate + i, args.I - i, gate);
      load<in_words>(static_cast<const T*>(args.up) + m * args.ld_up + i, args.I - i, up);
      if constexpr (backward) load<in_words>(static_cast<const T*>(args.G) + m * args.ldg + i, args.I - i, G);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const Activated act = activated(args.activation, gate[j]);
        if constexpr (backward) {
          const float g = weight * G[j];
          first[j] = g * up[j] * act.slope, second[j] = g * act.value;
          product = fmaf(G[j], act.value * up[j], product);
        } else {
          first[j] = weight * (act.value * up[j]);
        }
      }
      if constexpr (backward) {
        if (args.grad_gate) store<in_words>(static_cast<T*>(args.grad_gate) + m * args.ld_grad + i, args.I - i, first);
        if (args.grad_up) store<in_words>(static_cast<T*>(args.grad_up) + m * args.ld_grad + i, args.I - i, second);
      } else {
        store<in_words>(static_cast<T*>(args.Y) + m * args.I + i, args.I - i, first);
      }
    }
    if constexpr (backward) {
      if (args.grad_weights) {
        const float sum = sum_over_row(product, threads, shared_memory<float>());
        if (threadIdx.x == 0) args.grad_weights[m] = sum;
        __syncthreads();  // what was shared serves the next row
      }
    }
  }
}

template <bool backward>
void launch_swiglu(const char* name, const SwigluArgs& args, const Stream& stream) {
  const int64_t size = size_of(args.dtype);
  const bool words = fills_words(args.I, 16 / size,
                                 {Operand{args.gate, args.ld_gate, size},
                                  {args.up, args.ld_up, size},
                                  {args.G, args.ldg, size},
                                  {args.Y, args.I, size},
                                  {args.grad_gate, args.ld_grad, size},
                                  {args.grad_up, args.ld_grad, size}});
  with_type(args.dtype, words, [&](auto zero, auto in_words) {
    constexpr int64_t most_rows = 1 << 16, most_pieces = (1 << 16) - 1;
    const int64_t pieces = args.grad_weights ? 1 : std::min(most_pieces, ceil_div(args.I, threads * 16 / size));
    const dim3 grid{static_cast<unsigned>(args.M < most_rows ? args.M : most_rows), static_cast<unsigned>(pieces), 1};
    launch(name, swiglu_kernel<decltype(zero), in_words.value, backward>, grid, threads,
           args.grad_weights ? threads / lanes * sizeof(float) : 0, stream, args);
  });
}

// ---- rms_norm ----------------------------------------------------------------------------------------------------

// 1 / sqrt(x), and a step of Newton's: rounded once.
__device__ __forceinline__ float reciprocal_root(float x) {
  const float y = 1.0f / sqrtf(x), h = x * y, rest = fmaf(x, y, -h);
  const float error = fmaf(-rest, y, fmaf(-h, y, 1.0f));
  return y > 0.0f && y < 3e38f ? fmaf(0.5f * y, error, y) : y;
}

template <class T>
__device__ __forceinline__ float normalized(float x, float rstd, bool cast_first) {
  return cast_first ? to_float(from_float<T>(x * rstd)) : x * rstd;
}

template <bool in_words, int width>
__device__ __forceinline__ void load_factors(const RmsNormArgs& args, int64_t h, float (&factors)[width]) {
  if (args.weight) load<in_words>(args.weight + h, args.H - h, factors);
#pragma unroll
  for (int j = 0; j < width; ++j) factors[j] = args.weight ? args.offset + factors[j] : 1.0f;
}

template <class T, class Out, bool in_words>
__global__ void __launch_bounds__(threads) rms_norm_kernel(RmsNormArgs args, int row_threads) {
  constexpr int width = width_of<T>;
  const int64_t m = blockIdx.x * int64_t{threads / row_threads} + threadIdx.x / row_threads;
  if (m >= args.M) return;  // whole warps; where a row takes a block, none
  const int64_t first = threadIdx.x % row_threads * width, step = row_threads * width;
  const T* x = static_cast<const T*>(args.X) + m * args.ldx;
  Out* y = static_cast<Out*>(args.Y) + m * args.H;
  float squares = 0;
  for (int64_t h = first; h < args.H; h += step) {
    float values[width];
    load<in_words>(x + h, args.H - h, values);
#pragma unroll
    for (int j = 0; j < width; ++j) squares = fmaf(values[j], values[j], squares);
  }
  const float rstd = reciprocal_root(
      sum_over_row(squares, row_threads, shared_memory<float>()) / static_cast<float>(args.H) + args.eps);
  if (first == 0) args.rstd[m] = rstd;
  for (int64_t h = first; h < args.H; h += step) {
    float values[width], factors[width];
    load<in_words>(x + h, args.H - h, values);
    load_factors<in_words>(args, h, factors);
#pragma unroll
    for (int j = 0; j < width; ++j) values[j] = normalized<T>(values[j], rstd, args.cast_first) * factors[j];
    store<in_words>(y + h, args.H - h, values);
  }
}

// With D = G (offset + weight):  dX = rstd (D - X rstd^2 mean(D X))
template <class T, class Out, bool in_words>
__global__ void __launch_bounds__(threads) rms_norm_backward_kernel(RmsNormArgs args, int row_threads) {
  constexpr int width = width_of<T>;
  const int64_t m = blockIdx.x * int64_t{threads / row_threads} + threadIdx.x / row_threads;
  if (m >= args.M) return;
  const int64_t first = threadIdx.x % row_threads * width, step = row_threads * width;
  const T* x = static_cast<const T*>(args.X) + m * args.ldx;
  const Out* G = static_cast<const Out*>(args.G) + m * args.ldg;
  T* dX = static_cast<T*>(args.dX) + m * args.H;
  float values[width], D[width], factors[width], dot = 0;
  for (int64_t h = first; h < args.H; h += step) {
    load<in_words>(x + h, args.H - h, values);
    load<in_words>(G + h, args.H - h, D);
    load_factors<in_words>(args, h, factors);
#pragma unroll
    for (int j = 0; j < width; ++j) dot = fmaf(D[j] * factors[j], values[j], dot);
  }
  const float rstd = args.rstd[m];
  const float along =
      rstd * (rstd * (sum_over_row(dot, row_threads, shared_memory<float>()) / static_cast<float>(args.H)));
  for (int64_t h = first; h < args.H; h += step) {
    load<in_words>(x + h, args.H - h, values);
    load<in_words>(G + h, args.H - h, D);
    load_factors<in_words>(args, h, factors);
#pragma unroll
    for (int j = 0; j < width; ++j) D[j] = rstd * fmaf(-along, values[j], D[j] * factors[j]);
    store<in_words>(dX + h, args.H - h, D);
  }
}

// sums[split, h] = the sum of G rstd X over the split's rows
template <class T, class Out>
__global__ void __launch_bounds__(threads) weight_kernel(RmsNormArgs args, int64_t rows_per_split, float* sums) {
  const int64_t h = blockIdx.y * int64_t{threads} + threadIdx.x, first = blockIdx.x * rows_per_split;
  if (h >= args.H) return;
  const T* X = static_cast<const T*>(args.X) + h;
  const Out* G = static_cast<const Out*>(args.G) + h;
  const int64_t end = first + rows_per_split < args.M ? first + rows_per_split : args.M;
  float sum = 0;
  for (int64_t m = first; m < end; ++m)
    sum = fmaf(to_float(G[m * args.ldg]), normalized<T>(to_float(X[m * args.ldx]), args.rstd[m], args.cast_first), sum);
  sums[blockIdx.x * args.H + h] = sum;
}

__global__ void __launch_bounds__(threads) sum_kernel(const float* sums, int64_t splits, int64_t H, float* out) {
  const int64_t h = blockIdx.x * int64_t{threads} + threadIdx.x;
  if (h >= H) return;
  float sum = 0, error = 0;
  for (int64_t split = 0; split < splits; ++split) add(sums[split * H + h], sum, error);
  out[h] = sum;
}

// Calls body(T{}, Out{}, in_words), where Out is T or fp32.
template <class Body>
void with_types(const RmsNormArgs& args, Body body) {
  const int64_t size = size_of(args.dtype), out_size = size_of(args.out);
  const bool words = fills_words(args.H, 16 / size,
                                 {Operand{args.X, args.ldx, size},
                                  {args.dX, args.H, size},
                                  {args.G, args.ldg, out_size},
                                  {args.Y, args.H, out_size},
                                  {args.weight, args.H, 4}});
  with_type(args.dtype, words, [&](auto zero, auto in_words) {
    args.out == DType::f32 ? body(zero, float{}, in_words) : body(zero, zero, in_words);
  });
}

struct Layout {
  int row_threads;
  dim3 grid;

  explicit Layout(const RmsNormArgs& args) : row_threads(args.H <= short_row ? lanes : threads) {
    grid = {static_cast<unsigned>(ceil_div(args.M, threads / row_threads)), 1, 1};
  }
};
constexpr int64_t shared_bytes = threads / lanes * sizeof(float);

// ---- cross_entropy -----------------------------------------------------------------------------------------------

// A scaled and perhaps capped logit, and its derivative by the scaled one.
struct Logit {
  float value, slope;
};
__device__ __forceinline__ Logit logit_of(float logit, float scale, float cap) {
  const float z = scale * logit;
  if (cap <= 0.0f) return {z, 1.0f};
  // 1 - tanh^2 of a tanh near 1 would be a few bits.
  const float x = z / cap, size = fabsf(x), e = expf(-2.0f * size), sum = 1.0f + e;
  const float t = size < 0.625f ? tanhf(x) : copysignf(1.0f - 2.0f * e / sum, x);
  return {cap * t, size < 0.8f ? 1.0f - t * t : 4.0f * e / (sum * sum)};
}

// One pass reads the logits for the largest and the sum of the powers, another writes the gradient.
template <class T, bool in_words>
__global__ void __launch_bounds__(threads) cross_entropy_kernel(CrossEntropyArgs args) {
  constexpr int width = width_of<T>;
  constexpr int64_t step = threads * width;
  const int64_t m = blockIdx.x, first = threadIdx.x * width, target = args.targets[m];
  T* row = static_cast<T*>(args.logits) + m * args.ld;
  const auto logit = [&](float x) { return logit_of(x, args.scale, args.cap); };
  const float infinity = bit_cast<float>(0x7f800000u);
  const bool hit = target >= 0 && target < args.V;
  const float at_target = hit ? logit(to_float(row[target])).value : bit_cast<float>(0x7fc00000u);
  float largest = -infinity, total = 0;
  for (int64_t v = first; v < args.V; v += step) {
    float values[width], most = largest, sum = 0;
    load<in_words>(row + v, args.V - v, values);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      values[j] = v + j < args.V ? logit(values[j]).value : -infinity;
      most = fmaxf(most, values[j]);
    }
    const float base = most > -infinity ? most : 0.0f;  // all that is there may be -inf
#pragma unroll
    for (int j = 0; j < width; ++j) sum += expf(values[j] - base);
    total = total * expf(largest - base) + sum;
    largest = most;
  }
  float* of_warps = shared_memory<float>();
  const float most = over_row(largest, threads, of_warps, [](float a, float b) { return fmaxf(a, b); });
  const float base = most > -infinity ? most : 0.0f;
  total = sum_over_row(total * expf(largest - base), threads, of_warps + threads / lanes);
  if (first == 0) args.losses[m] = logf(total) + (most - at_target);
  if (!args.want_gradient) return;
  const float weight = args.weights[args.weight_per_row ? m : 0] * args.scale, share = weight / total;
  for (int64_t v = first; v < args.V; v += step) {
    float values[width];
    load<in_words>(row + v, args.V - v, values);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const Logit z = logit(values[j]);
      values[j] = (share * expf(z.value - most) - (v + j == target ? weight : 0.0f)) * z.slope;
    }
    store<in_words>(row + v, args.V - v, values);
  }
}

}  // namespace

void swiglu(const SwigluArgs& args, const Stream& stream) { launch_swiglu<false>("swiglu", args, stream); }

void swiglu_backward(const SwigluArgs& args, const Stream& stream) {
  launch_swiglu<true>("swiglu_backward", args, stream);
}

void rms_norm(const RmsNormArgs& args, const Stream& stream) {
  const Layout layout(args);
  with_types(args, [&](auto zero, auto out, auto in_words) {
    launch("rms_norm", rms_norm_kernel<decltype(zero), decltype(out), in_words.value>, layout.grid, threads,
           shared_bytes, stream, args, layout.row_threads);
  });
}

void rms_norm_backward(const RmsNormArgs& args, const Stream& stream) {
  const Layout layout(args);
  with_types(args, [&](auto zero, auto out, auto in_words) {
    if (args.dX != nullptr)
      launch("rms_norm_backward", rms_norm_backward_kernel<decltype(zero), decltype(out), in_words.value>, layout.grid,
             threads, shared_bytes, stream, args, layout.row_threads);
    if (args.grad_weight == nullptr) return;
    constexpr int64_t fewest_rows = 64, most_splits = 1024;
    const int64_t rows_per_split = std::max(fewest_rows, ceil_div(args.M, most_splits));
    const int64_t splits = ceil_div(args.M, rows_per_split), columns = ceil_div(args.H, threads);
    const Workspace sums(stream, splits * args.H * 4);
    launch("rms_norm_weight", weight_kernel<decltype(zero), decltype(out)>,
           {static_cast<unsigned>(splits), static_cast<unsigned>(columns), 1}, threads, 0, stream, args, rows_per_split,
           sums.as<float>());
    launch("rms_norm_sum", sum_kernel, {static_cast<unsigned>(columns), 1, 1}, threads, 0, stream,
           static_cast<const float*>(sums.as<float>()), splits, args.H, args.grad_weight);
  });
}

void cross_entropy(const CrossEntropyArgs& args, const Stream& stream) {
  const int64_t size = size_of(args.dtype);
  const bool words = fills_words(args.V, 16 / size, {Operand{args.logits, args.ld, size}});
  with_type(args.dtype, words, [&](auto zero, auto in_words) {
    launch("cross_entropy", cross_entropy_kernel<decltype(zero), in_words.value>, {static_cast<unsigned>(args.M), 1, 1},
           threads, 2 * shared_bytes, stream, args);
  });
}

}  // namespace peftfast::cuda
