// Reading a 4-bit weight on the device: scales, single elements, and eight codes at a time.
#pragma once

#include "steps.h"

namespace peftfast::cuda {

// i / size. A size of blocks is a power of two (the operators accept no other), and a division of 64 bits takes tens of
// instructions.
__device__ __forceinline__ int64_t block_of(int64_t i, int64_t size) { return i >> (__ffsll(size) - 1); }

// The scale of the block of `element`. A product and a sum are rounded one by one, as everywhere in this format.
__device__ __forceinline__ float absmax_of(const FourBitMatrix& W, int64_t element) {
  const int64_t block = block_of(element, W.blocksize);
  if (W.nested_blocksize == 0) return W.absmax[block];
  const float scaled = W.nested_code[W.absmax_codes[block]] * W.nested_absmax[block_of(block, W.nested_blocksize)];
  return scaled + *W.nested_offset;
}

// The codebook once for each lane, so that no two lanes of a warp meet in a bank of shared memory: [code][lane].
constexpr int64_t codebook_bytes = 16 * lanes * 4;
__device__ inline void fill_codebook(FourBitType type, float* table) {
  for (int i = threadIdx.x; i < 16 * lanes; i += blockDim.x) {
    const float* values = fourbit::codebooks[0];
    const float* other = fourbit::codebooks[1];
    table[i] = type == FourBitType::nf4 ? values[i / lanes] : other[i / lanes];
  }
}

// Eight codes in a row, from four bytes, times their scale, as four pairs of T. Of a byte the high half comes first.
template <class T>
__device__ __forceinline__ void decode_eight(uint32_t codes, float scale, const float* table, int lane,
                                             uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float first = table[((codes >> (8 * i + 4)) & 15) * lanes + lane] * scale;
    const float second = table[((codes >> (8 * i)) & 15) * lanes + lane] * scale;
    pairs[i] = pack<T>(first, second);
  }
}

}  // namespace peftfast::cuda
