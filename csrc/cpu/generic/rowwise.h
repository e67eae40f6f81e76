// The micro-kernels of the rowwise family: what stands between the products of a decoder layer, a row at a time. They
// are bound by memory, so that each reads its operands once; a row, or a block of one, is in the L1 cache when it is
// gone over again.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../table.h"
#include "adapter.h"
#include "gemm.h"
#include "moe.h"

namespace peftfast::cpu {
namespace {

// ---- swiglu ------------------------------------------------------------------------------------------------------

constexpr int64_t widened_at_once = 256;

// `count` values in fp32, in place or in the buffer.
template <class S, class T>
PEFTFAST_INLINE const float* widened(const T* x, int64_t count, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    convert<S>(x, count, buffer);
    return buffer;
  }
}

// Where `count` values for `out` are made in fp32, and how they get there. Without an `out` they get nowhere.
template <class S, class T>
class Narrowed {
 public:
  PEFTFAST_INLINE explicit Narrowed(T* out) : out_(out) {}
  PEFTFAST_INLINE float* data() {
    if constexpr (std::is_same_v<T, float>)
      if (out_ != nullptr) return out_;
    return buffer_;
  }
  PEFTFAST_INLINE void store(int64_t count) {
    if constexpr (!std::is_same_v<T, float>)
      if (out_ != nullptr) convert<S>(buffer_, count, out_);
  }

 private:
  T* out_;
  float buffer_[widened_at_once];
};

template <class T>
PEFTFAST_INLINE T* at(const void* matrix, int64_t index) {
  return matrix == nullptr ? nullptr : static_cast<T*>(const_cast<void*>(matrix)) + index;
}

template <class S, class T>
void swiglu(const SwigluArgs& args, int64_t begin, int64_t end) {
  with_activation(args.activation, [&](auto activation) {
    float of_gate[widened_at_once], of_up[widened_at_once];
    for (int64_t m = begin; m < end; ++m) {
      const float weight = args.weights ? args.weights[m] : 1.0f;
      for (int64_t i = 0; i < args.I; i += widened_at_once) {
        const int64_t count = std::min(widened_at_once, args.I - i);
        const float* __restrict gate = widened<S>(at<T>(args.gate, m * args.ld_gate + i), count, of_gate);
        const float* __restrict up = widened<S>(at<T>(args.up, m * args.ld_up + i), count, of_up);
        Narrowed<S, T> out(at<T>(args.Y, m * args.I + i));
        float* __restrict y = out.data();
        for (int64_t j = 0; j < count; ++j) y[j] = weight * (activation.value(gate[j]) * up[j]);
        out.store(count);
      }
    }
  });
}

// The sum of values that come in blocks: lanes in fp32 within a block, in double across blocks.
class SumOfBlocks {
 public:
  // x [widened_at_once] is overwritten; from `count` on it is not read.
  PEFTFAST_INLINE void add(float* x, int64_t count) {
    std::fill(x + count, x + widened_at_once, 0.0f);
    for (int64_t width = widened_at_once / 2; width >= lanes; width /= 2)
      for (int64_t j = 0; j < width; ++j) x[j] += x[j + width];
    for (int64_t j = 0; j < lanes; ++j) parts_[j] += static_cast<double>(x[j]);
  }
  PEFTFAST_INLINE double total() const {
    double total = 0;
    for (const double part : parts_) total += part;
    return total;
  }

 private:
  static constexpr int64_t lanes = 16;
  double parts_[lanes] = {};
};

template <class S, class T>
void swiglu_backward(const SwigluArgs& args, int64_t begin, int64_t end) {
  with_activation(args.activation, [&](auto activation) {
    float of_gate[widened_at_once], of_up[widened_at_once], of_G[widened_at_once], products[widened_at_once];
    for (int64_t m = begin; m < end; ++m) {
      const float weight = args.weights ? args.weights[m] : 1.0f;
      SumOfBlocks of_products;
      for (int64_t i = 0; i < args.I; i += widened_at_once) {
        const int64_t count = std::min(widened_at_once, args.I - i);
        const float* __restrict gate = widened<S>(at<T>(args.gate, m * args.ld_gate + i), count, of_gate);
        const float* __restrict up = widened<S>(at<T>(args.up, m * args.ld_up + i), count, of_up);
        const float* __restrict G = widened<S>(at<T>(args.G, m * args.ldg + i), count, of_G);
        Narrowed<S, T> of_grad_gate(at<T>(args.grad_gate, m * args.ld_grad + i));
        Narrowed<S, T> of_grad_up(at<T>(args.grad_up, m * args.ld_grad + i));
        float* __restrict grad_gate = of_grad_gate.data();
        float* __restrict grad_up = of_grad_up.data();
        for (int64_t j = 0; j < count; ++j) {
          const float value = activation.value(gate[j]), g = weight * G[j];
          grad_gate[j] = g * up[j] * activation.slope(gate[j]);
          grad_up[j] = g * value;
          products[j] = G[j] * (value * up[j]);
        }
        of_grad_gate.store(count), of_grad_up.store(count);
        if (args.grad_weights != nullptr) of_products.add(products, count);
      }
      if (args.grad_weights != nullptr) args.grad_weights[m] = static_cast<float>(of_products.total());
    }
  });
}

// ---- rms_norm ----------------------------------------------------------------------------------------------------

// The sum of term(h) over a row of H, a vector at a time, in four chains side by side; past its end terms are zero.
template <class S, class Term>
PEFTFAST_INLINE float sum_over(int64_t H, Term term) {
  typename S::F total = S::zero();
  for (int64_t h = 0; h < H;) {
    typename S::F part[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
    for (const int64_t stop = std::min(H, h + 4 * S::width * chain); h < stop; h += 4 * S::width)
      for (int i = 0; i < 4; ++i)
        if (h + i * S::width < H) part[i] = term(h + i * S::width, part[i]);
    total = S::add(total, S::add(S::add(part[0], part[1]), S::add(part[2], part[3])));
  }
  float sums[4];
  S::sum(total, S::zero(), S::zero(), S::zero(), sums);
  return sums[0];
}

// x, rounded to T.
template <class S, class T>
PEFTFAST_INLINE typename S::F rounded(typename S::F x) {
  if constexpr (std::is_same_v<T, float>) return x;
  T values[S::width];
  S::store(values, x);
  return S::load(values);
}

// offset + weight
template <class S>
PEFTFAST_INLINE typename S::F factor_at(const RmsNormArgs& args, int64_t h) {
  return S::add(S::set1(args.offset), load_at<S>(args.weight, h, args.H));
}

template <class S, class T, class Out>
void rms_norm_into(const RmsNormArgs& args, int64_t begin, int64_t end) {
  const int64_t H = args.H;
  for (int64_t m = begin; m < end; ++m) {
    const T* x = at<T>(args.X, m * args.ldx);
    Out* y = at<Out>(args.Y, m * H);
    const float squares = sum_over<S>(H, [&](int64_t h, typename S::F sum) {
      const typename S::F v = load_at<S>(x, h, H);
      return S::fma(v, v, sum);
    });
    args.rstd[m] = static_cast<float>(1.0 / std::sqrt(static_cast<double>(squares) / H + args.eps));
    const typename S::F rstd = S::set1(args.rstd[m]);
    for (int64_t h = 0; h < H; h += S::width) {
      typename S::F v = S::mul(load_at<S>(x, h, H), rstd);
      if (args.cast_first) v = rounded<S, T>(v);
      if (args.weight != nullptr) v = S::mul(v, factor_at<S>(args, h));
      store_at<S>(y, h, H, v);
    }
  }
}

template <class S, class T>
void rms_norm(const RmsNormArgs& args, int64_t begin, int64_t end) {
  args.out == DType::f32 ? rms_norm_into<S, T, float>(args, begin, end) : rms_norm_into<S, T, T>(args, begin, end);
}

// With D = G (offset + weight):  dX = rstd (D - X rstd^2 mean(D X)),  grad_weight = sum over rows of G rstd X
template <class S, class T, class Out>
void rms_norm_backward_from(const RmsNormArgs& args, int64_t begin, int64_t end, float* sums) {
  const int64_t H = args.H;
  for (int64_t m = begin; m < end; ++m) {
    const T* x = at<T>(args.X, m * args.ldx);
    const Out* G = at<Out>(args.G, m * args.ldg);
    T* dX = at<T>(args.dX, m * H);
    const auto D = [&](int64_t h) {
      const typename S::F g = load_at<S>(G, h, H);
      return args.weight != nullptr ? S::mul(g, factor_at<S>(args, h)) : g;
    };
    const float r = args.rstd[m];
    const typename S::F rstd = S::set1(r);
    if (dX != nullptr) {
      const float dot =
          sum_over<S>(H, [&](int64_t h, typename S::F sum) { return S::fma(D(h), load_at<S>(x, h, H), sum); });
      const typename S::F along = S::set1(-r * (r * (dot / static_cast<float>(H))));
      for (int64_t h = 0; h < H; h += S::width)
        store_at<S>(dX, h, H, S::mul(rstd, S::fma(load_at<S>(x, h, H), along, D(h))));
    }
    if (sums != nullptr)
      for (int64_t h = 0; h < H; h += S::width) {
        typename S::F v = S::mul(load_at<S>(x, h, H), rstd);
        if (args.cast_first) v = rounded<S, T>(v);
        store_at<S>(sums, h, H, S::fma(load_at<S>(G, h, H), v, load_at<S>(sums, h, H)));
      }
  }
}

template <class S, class T>
void rms_norm_backward(const RmsNormArgs& args, int64_t begin, int64_t end, float* sums) {
  args.out == DType::f32 ? rms_norm_backward_from<S, T, float>(args, begin, end, sums)
                         : rms_norm_backward_from<S, T, T>(args, begin, end, sums);
}

// ---- cross_entropy -----------------------------------------------------------------------------------------------

template <class S, class T, bool capped>
void cross_entropy_of(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  const float scale = args.scale, cap = args.cap, within = capped ? 1.0f / cap : 1.0f;
  const auto capped_value = [&](float z) { return capped ? cap * Tanh::value(within * z) : z; };
  // exp(x) for x <= 0; that of -inf is 0.
  const auto power = [](float x) { return x < -87.0f ? 0.0f : exponential(x); };
  float of_logits[widened_at_once], z[widened_at_once], most[widened_at_once], slope[widened_at_once];
  for (int64_t m = begin; m < end; ++m) {
    T* row = at<T>(args.logits, m * args.ld);
    // Calls body(v, count) for blocks of columns, with z = scale * logits.
    const auto over_blocks = [&](auto body) {
      for (int64_t v = 0; v < args.V; v += widened_at_once) {
        const int64_t count = std::min(widened_at_once, args.V - v);
        const float* __restrict logits = widened<S>(row + v, count, of_logits);
        for (int64_t j = 0; j < count; ++j) z[j] = scale * logits[j];
        body(v, count);
      }
    };
    // The cap keeps the order of the logits.
    std::fill(most, most + widened_at_once, lowest);
    over_blocks([&](int64_t, int64_t count) {
      for (int64_t j = 0; j < count; ++j) most[j] = z[j] > most[j] ? z[j] : most[j];
    });
    const float largest = capped_value(*std::max_element(most, most + widened_at_once));

    SumOfBlocks of_powers;
    over_blocks([&](int64_t, int64_t count) {
      for (int64_t j = 0; j < count; ++j) z[j] = power(capped_value(z[j]) - largest);
      of_powers.add(z, count);
    });
    const double total = of_powers.total();

    const int64_t target = args.targets[m];
    const bool hit = target >= 0 && target < args.V;
    args.losses[m] = hit ? static_cast<float>(std::log(total) + (largest - capped_value(scale * to_float(row[target]))))
                         : std::numeric_limits<float>::quiet_NaN();
    if (!args.want_gradient) continue;
    const float weight = args.weights[args.weight_per_row ? m : 0] * scale;
    const float share = static_cast<float>(weight / total);
    over_blocks([&](int64_t v, int64_t count) {
      for (int64_t j = 0; j < count; ++j) {
        if (capped) {  // 1 - tanh^2; of a tanh near 1 that difference would be a few bits
          const float x = within * z[j], size = x < 0.0f ? -x : x, t = Tanh::value(x);
          const float e = exponential(-2.0f * size), sum = 1.0f + e;
          slope[j] = size < 0.8f ? 1.0f - t * t : 4.0f * e / (sum * sum);
        }
        z[j] = share * power(capped_value(z[j]) - largest);
      }
      if (target >= v && target < v + count) z[target - v] -= weight;
      if (capped)
        for (int64_t j = 0; j < count; ++j) z[j] *= slope[j];
      if constexpr (std::is_same_v<T, float>)
        std::copy(z, z + count, row + v);
      else
        convert<S>(z, count, row + v);
    });
  }
}

template <class S, class T>
void cross_entropy(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  args.cap > 0.0f ? cross_entropy_of<S, T, true>(args, begin, end) : cross_entropy_of<S, T, false>(args, begin, end);
}

}  // namespace
}  // namespace peftfast::cpu
