// The micro-kernels of the moe family: what the experts of a token say, put together. The products of the experts are
// those of lora.h and fourbit.h.
#pragma once

#include "../table.h"
#include "gemm.h"

namespace peftfast::cpu {
namespace {

template <class S, class T>
PEFTFAST_INLINE typename S::F load_at(const T* row, int64_t h, int64_t H) {
  return h + S::width <= H ? S::load(row + h) : load_first<S>(row + h, H - h);
}

template <class S, class T>
PEFTFAST_INLINE void store_at(T* row, int64_t h, int64_t H, typename S::F x) {
  h + S::width <= H ? S::store(row + h, x) : store_first<S>(row + h, x, H - h);
}

template <class S, class T>
void combine(const CombineArgs& args, int64_t begin, int64_t end) {
  const T* X = static_cast<const T*>(args.X);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t* places = args.places + t * args.top_k;
    const float* weights = args.weights ? args.weights + t * args.top_k : nullptr;
    for (int64_t h = 0; h < args.H; h += S::width) {
      typename S::F sum = S::zero();
      for (int64_t k = 0; k < args.top_k; ++k)
        sum = S::fma(S::set1(weights ? weights[k] : 1.0f), load_at<S>(X + places[k] * args.H, h, args.H), sum);
      store_at<S>(static_cast<T*>(args.Y) + t * args.H, h, args.H, sum);
    }
  }
}

template <class S, class T>
void combine_backward(const CombineBackwardArgs& args, int64_t begin, int64_t end) {
  const CombineArgs& of = args.of;
  for (int64_t t = begin; t < end; ++t) {
    const T* G = static_cast<const T*>(args.G) + t * of.H;
    for (int64_t k = 0; k < of.top_k; ++k) {
      const int64_t place = of.places[t * of.top_k + k] * of.H;
      const typename S::F weight = S::set1(of.weights ? of.weights[t * of.top_k + k] : 1.0f);
      T* dX = static_cast<T*>(args.dX) + place;
      for (int64_t h = 0; h < of.H; h += S::width) store_at<S>(dX, h, of.H, S::mul(weight, load_at<S>(G, h, of.H)));
      if (args.grad_weights == nullptr) continue;
      const T* X = static_cast<const T*>(of.X) + place;
      typename S::F sum = S::zero(), partial = S::zero();
      for (int64_t h = 0; h < of.H; h += S::width) {
        partial = S::fma(load_at<S>(G, h, of.H), load_at<S>(X, h, of.H), partial);
        if (h / S::width % chain == chain - 1) sum = S::add(sum, partial), partial = S::zero();
      }
      float sums[4];
      S::sum(S::add(sum, partial), S::zero(), S::zero(), S::zero(), sums);
      args.grad_weights[t * of.top_k + k] = sums[0];
    }
  }
}

}  // namespace
}  // namespace peftfast::cpu
