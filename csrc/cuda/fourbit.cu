// Quantization to 4 bits and back. Values, codes and scales are those of csrc/cpu, bit for bit.
//
// A thread decodes what makes 16 bytes, and four times so, at a stride: each store of a warp is 512 bytes in a row, and
// all of a thread's codes and scales, quantized or not, are on their way before the first is looked up. A warp
// quantizes a block.
#include <type_traits>

#include "weight.cuh"

namespace peftfast::cuda {
namespace {

constexpr int threads = 256;
constexpr int pieces = 4;  // of a thread
template <class T>
constexpr int64_t piece_codes = 16 / sizeof(T);

// For more than four blocks on a multiprocessor the compiler would spill.
template <class T>
__global__ void __launch_bounds__(threads, 4) decode_kernel(FourBitMatrix W, int64_t count, T* out, bool aligned) {
  constexpr int64_t codes = piece_codes<T>;
  using Word = std::conditional_t<codes == 8, uint32_t, uint16_t>;
  float* codebook = shared_memory<float>();
  fill_codebook(W.type, codebook);
  __syncthreads();
  const int lane = threadIdx.x % lanes;
  const auto first_of_piece = [&](int i) {
    return ((blockIdx.x * pieces + i) * int64_t{threads} + threadIdx.x) * codes;
  };
  uint32_t words[pieces];
  float scale[pieces];
#pragma unroll
  for (int i = 0; i < pieces; ++i) {
    const int64_t first = first_of_piece(i);
    words[i] = aligned && first + codes <= count ? *reinterpret_cast<const Word*>(W.packed + first / 2) : 0;
    scale[i] = first < count ? absmax_of(W, first) : 0;
  }
#pragma unroll
  for (int i = 0; i < pieces; ++i) {
    const int64_t first = first_of_piece(i);
    if (!aligned || first + codes > count) {
      for (int64_t j = first; j < count && j < first + codes; ++j) {
        const int code = j % 2 ? W.packed[j / 2] & 15 : W.packed[j / 2] >> 4;
        out[j] = from_float<T>(codebook[code * lanes + lane] * scale[i]);
      }
    } else if constexpr (codes == 4) {
      const auto value = [&](int shift) { return codebook[((words[i] >> shift) & 15) * lanes + lane] * scale[i]; };
      *reinterpret_cast<float4*>(out + first) = {value(4), value(0), value(12), value(8)};
    } else {
      uint32_t pairs[4];
      decode_eight<T>(words[i], scale[i], codebook, lane, pairs);
      *reinterpret_cast<uint4*>(out + first) = {pairs[0], pairs[1], pairs[2], pairs[3]};
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

template <class T>
void launch_decode(const FourBitMatrix& W, int64_t count, T* out, const Stream& stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(W.packed) % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  launch("decode", decode_kernel<T>, blocks_for(count, threads * pieces * piece_codes<T>), threads, codebook_bytes,
         stream, W, count, out, aligned);
}

}  // namespace

void decode(const FourBitMatrix& W, int64_t count, DType dtype, void* out, const Stream& stream) {
  if (dtype == DType::f32)
    launch_decode(W, count, static_cast<float*>(out), stream);
  else if (dtype == DType::bf16)
    launch_decode(W, count, static_cast<bf16*>(out), stream);
  else
    launch_decode(W, count, static_cast<f16*>(out), stream);
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
