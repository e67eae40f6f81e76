// The 4-bit format of bitsandbytes: what a code stands for, how a value becomes a code, where it is stored; and the
// kernels that make it and read it.
//
//   The matrix is flattened row by row and cut into blocks, whatever the rows are. A block's scale is the largest
//   magnitude in it, absmax; an element is the code whose value is nearest to element / absmax. Element 2i is the high
//   half of byte i, element 2i + 1 the low half.
//
// NF4 is Dettmers et al., QLoRA (NeurIPS 2023). FP4 is a sign, two bits of exponent and one of fraction over 12. A
// value on the boundary between two codes takes the lower one.
#pragma once

#include <cstdint>

#include "kernels.h"

#ifdef __CUDACC__
#define PEFTFAST_ON_BOTH __device__
#else
#define PEFTFAST_ON_BOTH
#endif

namespace peftfast::fourbit {

// codebook[code]
PEFTFAST_ON_BOTH constexpr float codebooks[2][16] = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12, 0.0f, -0.0625f / 12, -8.0f / 12,
     -1.0f, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12},
};

// order[i] is the code of the i-th smallest value; 8 (-0) counts as larger than 0.
PEFTFAST_ON_BOTH constexpr uint8_t orders[2][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3},
};

constexpr const float* codebook_of(FourBitType type) { return codebooks[static_cast<int>(type)]; }
constexpr const uint8_t* order_of(FourBitType type) { return orders[static_cast<int>(type)]; }

// Between the i-th smallest value and the next.
constexpr float bound(FourBitType type, int i) {
  return (codebook_of(type)[order_of(type)[i]] + codebook_of(type)[order_of(type)[i + 1]]) / 2;
}

// A block of zeros is scaled by this: 1 / absmax must stay finite.
constexpr float smallest_absmax = 1e-38f;

}  // namespace peftfast::fourbit

namespace peftfast {

// W -> packed and absmax, plain. absmax comes out not finite where W is not.
struct FourBitQuantizeArgs {
  int64_t count;
  DType dtype;
  const void* W;  // [count]
  FourBitType type;
  int64_t blocksize;
  uint8_t* packed;  // [(count + 1) / 2], out
  float* absmax;    // [ceil(count / blocksize)], out
};

// The second quantization: absmax -> 8-bit codes of absmax - offset.
struct AbsmaxQuantizeArgs {
  int64_t blocks;
  const float *absmax, *offset, *code;  // [blocks]; one; [256], ascending
  int64_t blocksize;
  uint8_t* codes;        // [blocks], out
  float* nested_absmax;  // [ceil(blocks / blocksize)], out
};

struct FourBitDequantizeArgs {
  int64_t count;
  FourBitMatrix W;
  DType dtype;
  void* out;  // [count], out
};

PEFTFAST_KERNEL(fourbit_quantize, FourBitQuantizeArgs)
PEFTFAST_KERNEL(fourbit_quantize_absmax, AbsmaxQuantizeArgs)
PEFTFAST_KERNEL(fourbit_dequantize, FourBitDequantizeArgs)

}  // namespace peftfast
