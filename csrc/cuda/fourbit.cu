// Quantization to 4 bits and back. A thread decodes 32 codes: 16 bytes in, one scale, quantized or not, 64 bytes out. A
// warp quantizes a block. Values, codes and scales are those of csrc/cpu, bit for bit.
#include "weight.cuh"

namespace peftfast::cuda {
namespace {

constexpr int threads = 256;
constexpr int64_t codes_per_thread = 32;

template <class T>
__global__ void __launch_bounds__(threads) decode_kernel(FourBitMatrix W, int64_t count, T* out) {
  float* codebook = shared_memory<float>();
  fill_codebook(W.type, codebook);
  __syncthreads();
  const int lane = threadIdx.x % lanes;
  const int64_t first = (blockIdx.x * int64_t{threads} + threadIdx.x) * codes_per_thread;
  if (first >= count) return;
  const float scale = absmax_of(W, first);
  if (count - first < codes_per_thread || reinterpret_cast<uintptr_t>(W.packed) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(out) % 16 != 0) {
    for (int64_t i = first; i < count && i < first + codes_per_thread; ++i) {
      const int code = i % 2 ? W.packed[i / 2] & 15 : W.packed[i / 2] >> 4;
      out[i] = from_float<T>(codebook[code * lanes + lane] * scale);
    }
    return;
  }
  const uint4 codes = *reinterpret_cast<const uint4*>(W.packed + first / 2);
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      float values[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[2 * j] = codebook[((words[i] >> (8 * j + 4)) & 15) * lanes + lane] * scale;
        values[2 * j + 1] = codebook[((words[i] >> (8 * j)) & 15) * lanes + lane] * scale;
      }
      float4* to = reinterpret_cast<float4*>(out + first + 8 * i);
      to[0] = {values[0], values[1], values[2], values[3]};
      to[1] = {values[4], values[5], values[6], values[7]};
    } else {
      uint32_t pairs[4];
      decode_eight<T>(words[i], scale, codebook, lane, pairs);
      *reinterpret_cast<uint4*>(out + first + 8 * i) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
}

__global__ void __launch_bounds__(threads) quantize_kernel(FourBitQuantizeArgs args, int64_t blocks) {
  const int64_t block = blockIdx.x * int64_t{threads / lanes} + threadIdx.x / lanes;
  if (block >= blocks) return;
  const int lane = threadIdx.x % lanes;
  const int64_t first = block * args.blocksize;
  const int64_t count = first + args.blocksize < args.count ? args.blocksize : args.count - first;
  const bool whole = count == args.blocksize;
  uint32_t bits = 0;  // of the largest magnitude: an infinity or a NaN wins
  for (int64_t i = lane; i < count; i += lanes) {
    const uint32_t own = bit_cast<uint32_t>(load_as_float(args.W, first + i, args.dtype)) & 0x7fffffffu;
    bits = own > bits ? own : bits;
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(whole_warp, bits, step);
    bits = other > bits ? other : bits;
  }
  const float absmax = bit_cast<float>(bits);
  const float divisor = absmax < fourbit::smallest_absmax ? fourbit::smallest_absmax : absmax;
  // bitsandbytes divides in a block that is not full, and keeps the divisor; others are multiplied by the inverse.
  if (lane == 0) args.absmax[block] = whole ? absmax : divisor;
  const float inverse = 1.0f / divisor;
  const int type = static_cast<int>(args.type);
  for (int64_t i = 2 * lane; i < count; i += 2 * lanes) {
    int pair[2] = {};
    for (int j = 0; j < 2; ++j) {
      float value = 0;
      if (i + j < count) {
        value = load_as_float(args.W, first + i + j, args.dtype);
        value = whole ? value * inverse : value / divisor;
      }
      int above = 0;
#pragma unroll
      for (int k = 0; k < 15; ++k)
        above += value > (type == 0 ? fourbit::bound(FourBitType::nf4, k) : fourbit::bound(FourBitType::fp4, k));
      pair[j] = type == 0 ? above : fourbit::orders[1][above];
    }
    args.packed[(first + i) / 2] = static_cast<uint8_t>(pair[0] << 4 | pair[1]);
  }
}

// The code whose value is nearest to x in [-1, 1], which is first placed on a grid of 65536 points, as bitsandbytes
// does.
__device__ inline uint8_t nearest_code(const float* code, float x) {
  constexpr int grid = 65536;
  const float unit = ((x > -1 ? (x < 1 ? x : 1.0f) : -1.0f) + 1.0f) * 0.5f;  // NaN becomes -1
  const int point = static_cast<int>(static_cast<float>(static_cast<double>(unit) * (grid - 1) + 0.5));
  const float at = -1.0f + 2.0f * static_cast<float>(point) / (grid - 1);
  int low = 0, high = 255;  // the first code whose bound to the next is not below the point
  while (low < high) {
    const int middle = (low + high) / 2;
    if (0.5f * (code[middle] + code[middle + 1]) < at)
      low = middle + 1;
    else
      high = middle;
  }
  return static_cast<uint8_t>(low);
}

__global__ void __launch_bounds__(threads) quantize_absmax_kernel(AbsmaxQuantizeArgs args) {
  const int64_t block = blockIdx.x * int64_t{threads / lanes} + threadIdx.x / lanes;
  const int64_t first = block * args.blocksize;
  if (first >= args.blocks) return;
  const int lane = threadIdx.x % lanes;
  const int64_t last = first + args.blocksize < args.blocks ? first + args.blocksize : args.blocks;
  float absmax = 0;
  for (int64_t i = first + lane; i < last; i += lanes) {
    const float distance = fabsf(args.absmax[i] - *args.offset);
    absmax = absmax < distance ? distance : absmax;
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(whole_warp, absmax, step);
    absmax = absmax < other ? other : absmax;
  }
  if (lane == 0) args.nested_absmax[block] = absmax;
  const float inverse = 1.0f / absmax;
  for (int64_t i = first + lane; i < last; i += lanes)
    args.codes[i] = absmax == 0 ? 0 : nearest_code(args.code, (args.absmax[i] - *args.offset) * inverse);
}

dim3 blocks_for(int64_t count, int64_t per_block) { return {static_cast<unsigned>(ceil_div(count, per_block)), 1, 1}; }

}  // namespace

void decode(const FourBitMatrix& W, int64_t count, DType dtype, void* out, const Stream& stream) {
  const dim3 grid = blocks_for(count, threads * codes_per_thread);
  if (dtype == DType::f32)
    launch("decode", decode_kernel<float>, grid, threads, codebook_bytes, stream, W, count, static_cast<float*>(out));
  else if (dtype == DType::bf16)
    launch("decode", decode_kernel<bf16>, grid, threads, codebook_bytes, stream, W, count, static_cast<bf16*>(out));
  else
    launch("decode", decode_kernel<f16>, grid, threads, codebook_bytes, stream, W, count, static_cast<f16*>(out));
}

void fourbit_dequantize(const FourBitDequantizeArgs& args, const Stream& stream) {
  decode(args.W, args.count, args.dtype, args.out, stream);
}

void fourbit_quantize(const FourBitQuantizeArgs& args, const Stream& stream) {
  const int64_t blocks = ceil_div(args.count, args.blocksize);
  launch("quantize", quantize_kernel, blocks_for(blocks, threads / lanes), threads, 0, stream, args, blocks);
}

void fourbit_quantize_absmax(const AbsmaxQuantizeArgs& args, const Stream& stream) {
  launch("quantize_absmax", quantize_absmax_kernel, blocks_for(ceil_div(args.blocks, args.blocksize), threads / lanes),
         threads, 0, stream, args);
}

}  // namespace peftfast::cuda
