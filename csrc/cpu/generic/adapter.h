// The micro-kernels of the adapter family: what happens between its two products, and the statistics of a LayerNorm.
// csrc/cpu/adapter.cpp says how they and those of lora.h make up forward and backward.
#pragma once

#include "../scratch.h"
#include "../table.h"
#include "dropout.h"
#include "gemm.h"

namespace peftfast::cpu {
namespace {

// ---- activations -----------------------------------------------------------------------------------------------
// One value at a time and without a branch: compilers make vectors of the loops over them. Errors are below 4e-7 of
// the value. A NaN stays one.

// exp(x) for x in [-87, 88], the nearest of it beyond: 2^n exp(x - n log 2), with n * log 2 in two parts that are
// exact.
PEFTFAST_INLINE float exponential(float x) {
  constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + to_integer, n = shifted - to_integer;
  const float r = x - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * (r * r) + r + 1.0f) * bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);
}

// The larger of a sigmoid and its complement is made from the smaller, whose rounding errors count less.
struct Sigmoid {
  float value, complement;
};
PEFTFAST_INLINE Sigmoid sigmoid(float x) {
  const float e = exponential(x < 0.0f ? x : -x), smaller = e / (1.0f + e), larger = 1.0f - smaller;
  return {x < 0.0f ? smaller : larger, x < 0.0f ? larger : smaller};
}

// value(z), and slope(z) = value'(z).
struct Identity {
  PEFTFAST_INLINE static float value(float z) { return z; }
  PEFTFAST_INLINE static float slope(float) { return 1.0f; }
};

struct Relu {
  PEFTFAST_INLINE static float value(float z) { return z < 0.0f ? 0.0f : z; }
  PEFTFAST_INLINE static float slope(float z) { return z > 0.0f ? 1.0f : 0.0f; }
};

struct Silu {
  PEFTFAST_INLINE static float value(float z) { return z * sigmoid(z).value; }
  PEFTFAST_INLINE static float slope(float z) {
    const Sigmoid s = sigmoid(z);
    return s.value * (1.0f + z * s.complement);
  }
};

// z times the normal distribution function of z.
struct Gelu {
  PEFTFAST_INLINE static float value(float z) { return z * distribution(z, exponential(-0.5f * z * z)); }
  PEFTFAST_INLINE static float slope(float z) {
    const float bell = exponential(-0.5f * z * z);
    return distribution(z, bell) + z * bell * 0.398942280f;
  }

 private:
  // Below zero it is bell * q(u) with u = 1 / (1 + 0.4 |z| / sqrt 2), where a polynomial comes within 3e-8 of q.
  PEFTFAST_INLINE static float distribution(float z, float bell) {
    const float u = 1.0f / (1.0f + 0.282842712f * (z < 0.0f ? -z : z));
    float q = 0.013471580110490322f;
    q = q * u - 0.032682985067367554f;
    q = q * u - 0.042709074914455414f;
    q = q * u + 0.15215496718883514f;
    q = q * u - 0.04594797641038895f;
    q = q * u + 0.14047320187091827f;
    q = q * u + 0.0866173654794693f;
    q = q * u + 0.1161179319024086f;
    q = q * u + 0.11248917132616043f;
    q = q * u + 1.5842324501136318e-05f;
    return z < 0.0f ? bell * q : 1.0f - bell * q;
  }
};

// 0.5 z (1 + tanh(w)) = z sigmoid(2 w) with w = sqrt(2 / pi) (z + 0.044715 z^3).
struct GeluTanh {
  PEFTFAST_INLINE static float value(float z) { return z * sigmoid(inner(z)).value; }
  PEFTFAST_INLINE static float slope(float z) {
    const Sigmoid s = sigmoid(inner(z));
    return s.value + z * (s.value * s.complement) * twice * (1.0f + 3 * cubic * z * z);
  }

 private:
  static constexpr float twice = 1.59576912f, cubic = 0.044715f;
  PEFTFAST_INLINE static float inner(float z) { return twice * (z + cubic * z * z * z); }
};

struct Tanh {
  PEFTFAST_INLINE static float value(float z) {
    const float size = z < 0.0f ? -z : z, square = z * z;
    float p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const float small = p * square * z + z;
    const float large = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
    return size < 0.625f ? small : z < 0.0f ? -large : large;
  }
  PEFTFAST_INLINE static float slope(float z) {
    const float t = value(z);
    return 1.0f - t * t;
  }
};

template <class F>
void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::identity:
      return f(Identity{});
    case Activation::relu:
      return f(Relu{});
    case Activation::gelu:
      return f(Gelu{});
    case Activation::gelu_tanh:
      return f(GeluTanh{});
    case Activation::silu:
      return f(Silu{});
    case Activation::tanh:
      return f(Tanh{});
  }
}

// ---- the bottleneck --------------------------------------------------------------------------------------------

template <class S>
void bottleneck(const BottleneckArgs& args, int64_t begin, int64_t end) {
  const Segment& segment = *args.dropout.segments;
  const int64_t D = args.D;
  const float scale = args.scale * segment.keep_scale;
  with_activation(args.activation, [&](auto activation) {
    for (int64_t m = begin; m < end; ++m) {
      float* __restrict Z = args.Z + m * D, * __restrict A = args.A + m * D;
      if (args.bias != nullptr)
        for (int64_t j = 0; j < D; ++j) Z[j] += args.bias[j];
      for (int64_t j = 0; j < D; ++j) A[j] = scale * activation.value(Z[j]);
      if (segment.threshold) drop<S>(args.dropout, segment, m * D, D, A);
    }
  });
}

template <class S>
void bottleneck_backward(const BottleneckArgs& args, int64_t begin, int64_t end) {
  const Segment& segment = *args.dropout.segments;
  const int64_t D = args.D;
  const float keep_scale = segment.keep_scale, scale = args.scale * keep_scale;
  with_activation(args.activation, [&](auto activation) {
    for (int64_t m = begin; m < end; ++m) {
      const float* __restrict Z = args.Z + m * D;
      float* __restrict A = args.A + m * (D + 1), * __restrict V = args.V + m * D;
      for (int64_t j = 0; j < D; ++j) A[j] = keep_scale * activation.value(Z[j]);
      if (segment.threshold) drop<S>(args.dropout, segment, m * D, D, A), drop<S>(args.dropout, segment, m * D, D, V);
      A[D] = 1.0f;
      double dot = 0;
      for (int64_t j = 0; j < D; ++j) dot += static_cast<double>(A[j]) * V[j];
      args.dot[m] = static_cast<float>(dot);
      for (int64_t j = 0; j < D; ++j) V[j] *= scale * activation.slope(Z[j]);
    }
  });
}

// ---- the norm --------------------------------------------------------------------------------------------------

// The sum over a row of x - center, or of its squares, in chains as everywhere.
template <class S, bool squared, class T>
float sum_of(const T* x, int64_t Q, float center) {
  typename S::F sum = S::zero(), part = S::zero();
  float sums[4], rest = 0;
  int64_t q = 0;
  for (; q + S::width <= Q; q += S::width) {
    const typename S::F difference = S::add(S::load(x + q), S::set1(-center));
    part = squared ? S::fma(difference, difference, part) : S::add(part, difference);
    if (q / S::width % chain == chain - 1) sum = S::add(sum, part), part = S::zero();
  }
  for (; q < Q; ++q) {
    const float difference = to_float(x[q]) - center;
    rest += squared ? difference * difference : difference;
  }
  S::sum(S::add(sum, part), S::zero(), S::zero(), S::zero(), sums);
  return sums[0] + rest;
}

template <class S, class T>
void moments(const MomentsArgs& args, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(args.X) + m * args.ldx;
    const float count = static_cast<float>(args.Q);
    args.mean[m] = sum_of<S, false>(x, args.Q, 0.0f) / count;
    args.rstd[m] = 1.0f / std::sqrt(sum_of<S, true>(x, args.Q, args.mean[m]) / count + args.eps);
  }
}

}  // namespace
}  // namespace peftfast::cpu
