// The contract of the attention family, as kernels.h has that of the others.
//
// Letters:  T queries of a head    S keys and values    D features of each
#pragma once

#include "kernels.h"

namespace peftfast {

// Vectors of D elements, [batch, heads, tokens, D], strides in elements.
struct Vectors {
  const void* data;
  int64_t batch, head, row;

  template <class T>
  const T* at(int64_t b, int64_t h, int64_t t) const {
    return static_cast<const T*>(data) + b * batch + h * head + t * row;
  }
};

// Y = softmax(scale Q K^T) V for each head, over the keys that a query sees. heads / kv_heads of them share K and V.
struct AttentionArgs {
  int64_t batch, heads, kv_heads, T, S, D;  // T queries, S keys
  DType dtype;
  Vectors Q, K, V;
  const uint8_t* mask;      // [batch, heads, T, S], 1: is seen, rows contiguous; null: all are
  int64_t mask_strides[3];  // of the first three dimensions
  bool causal;              // query t sees no key beyond t
  float scale;              // positive
  void* Y;                  // [batch, T, heads, D], out; a query that sees nothing: zeros
  float* lse;               // [batch, heads, T], out: the logarithm of the sum that the softmax divides by; then 0
};

// From G = dL/dY.
struct AttentionBackwardArgs {
  AttentionArgs of;  // Y and lse are read
  Vectors G;
  void *dQ, *dK, *dV;  // [batch, T, heads, D]; [batch, S, kv_heads, D], out
};

PEFTFAST_KERNEL(attention, AttentionArgs)  // cpu:: only; so its backward
PEFTFAST_KERNEL(attention_backward, AttentionBackwardArgs)

}  // namespace peftfast
