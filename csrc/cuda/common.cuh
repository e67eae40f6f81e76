// What all kernels here share: storage types, tensor-core and copy instructions, dropout, groups of rows, launches.
//
// Each instruction has two bodies: PTX for GPUs from sm_80 on, and plain C++ for the emulation, where it also says what
// the instruction does. Everything above them is written once and runs in both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../fourbit_format.h"
#include "../hosts.h"
#include "../kernels.h"
#include "../philox.h"

#ifdef PEFTFAST_EMULATE_CUDA
#include "../cpu/generic/convert.h"
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace peftfast::cuda {

constexpr uint32_t whole_warp = 0xffffffffu;
constexpr int lanes = 32;

// ---- numbers ------------------------------------------------------------------------------------------------------

#ifdef PEFTFAST_EMULATE_CUDA
using cpu::from_float;
using cpu::to_float;
using peftfast::bf16;
using peftfast::f16;
template <class To, class From>
To bit_cast(From from) {
  return cpu::bit_cast<To>(from);
}
// The nearest number of 10 fraction bits, ties away from zero; as bits of an fp32.
inline uint32_t to_tf32(float x) { return (bit_cast<uint32_t>(x) + 0x1000u) & 0xffffe000u; }
#else
using bf16 = __nv_bfloat16;
using f16 = __half;
template <class To, class From>
__device__ __forceinline__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(x);
  else
    return __float2half_rn(x);
}
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
#endif

// sum += x, where `error` carries what the sum was too small to take (Kahan).
__device__ __forceinline__ void add(float x, float& sum, float& error) {
  const float corrected = x - error, larger = sum + corrected;
  error = (larger - sum) - corrected;
  sum = larger;
}

// Two values in a register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  return static_cast<uint32_t>(bit_cast<uint16_t>(from_float<T>(first))) |
         static_cast<uint32_t>(bit_cast<uint16_t>(from_float<T>(second))) << 16;
}
template <class T>
__device__ __forceinline__ float first_of(uint32_t pair) {
  return to_float(bit_cast<T>(static_cast<uint16_t>(pair)));
}
template <class T>
__device__ __forceinline__ float second_of(uint32_t pair) {
  return to_float(bit_cast<T>(static_cast<uint16_t>(pair >> 16)));
}

// Any dtype at run time: for kernels whose speed does not matter.
__device__ inline float load_as_float(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  if (dtype == DType::bf16) return to_float(static_cast<const bf16*>(data)[i]);
  return to_float(static_cast<const f16*>(data)[i]);
}
__device__ inline void store_float(void* data, int64_t i, DType dtype, float value) {
  if (dtype == DType::f32)
    static_cast<float*>(data)[i] = value;
  else if (dtype == DType::bf16)
    static_cast<bf16*>(data)[i] = from_float<bf16>(value);
  else
    static_cast<f16*>(data)[i] = from_float<f16>(value);
}

// Up to eight values of 16 bits in a row from `data`, zeros after the first `count`.
struct Eight {
  uint32_t pair[4];
};
template <class T>
__device__ __forceinline__ Eight load_eight(const T* data, int64_t count, bool aligned) {
  Eight out;
  if (aligned && count >= 8) {
    const uint4 v = *reinterpret_cast<const uint4*>(data);
    out.pair[0] = v.x, out.pair[1] = v.y, out.pair[2] = v.z, out.pair[3] = v.w;
    return out;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < count ? bit_cast<uint16_t>(data[2 * i]) : 0;
    const uint32_t high = 2 * i + 1 < count ? bit_cast<uint16_t>(data[2 * i + 1]) : 0;
    out.pair[i] = low | high << 16;
  }
  return out;
}

// ---- instructions -------------------------------------------------------------------------------------------------
// Lane 4 g + t of a warp holds of a product D += A B: D[g][2t, 2t+1], D[g + 8][2t, 2t+1].

// A [16, 16]: A[g][2t, 2t+1], A[g+8][2t, 2t+1], A[g][2t+8, 2t+9], A[g+8][2t+8, 2t+9]; B [16, 8]: B[2t, 2t+1][g],
// B[2t+8, 2t+9][g]. In `T`, fp32 sums.
template <class T>
__device__ __forceinline__ void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef PEFTFAST_EMULATE_CUDA
  struct Data {
    float* d;
    uint32_t a[4], b[2];
  } data{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::with_warp("multiply_16x8x16", &data, [](void* const* of) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < lanes; ++lane) {
      const Data& from = *static_cast<Data*>(of[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        A[g + i % 2 * 8][2 * t + i / 2 * 8] = first_of<T>(from.a[i]);
        A[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = second_of<T>(from.a[i]);
      }
      for (int i = 0; i < 2; ++i)
        B[2 * t + i * 8][g] = first_of<T>(from.b[i]), B[2 * t + i * 8 + 1][g] = second_of<T>(from.b[i]);
    }
    for (int lane = 0; lane < lanes; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float& sum = static_cast<Data*>(of[lane])->d[i];
        double exact = sum;
        for (int k = 0; k < 16; ++k) exact += static_cast<double>(A[row][k]) * B[k][column];
        sum = emulation::cut_off(exact);
      }
  });
#else
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// A [16, 8] in tf32: A[g][t], A[g+8][t], A[g][t+4], A[g+8][t+4]; B [8, 8]: B[t][g], B[t+4][g].
__device__ __forceinline__ void multiply_16x8x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef PEFTFAST_EMULATE_CUDA
  struct Data {
    float* d;
    uint32_t a[4], b[2];
  } data{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::with_warp("multiply_16x8x8", &data, [](void* const* of) {
    float A[16][8], B[8][8];
    const auto tf32 = [](uint32_t bits) { return bit_cast<float>(bits & 0xffffe000u); };
    for (int lane = 0; lane < lanes; ++lane) {
      const Data& from = *static_cast<Data*>(of[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) A[g + i % 2 * 8][t + i / 2 * 4] = tf32(from.a[i]);
      for (int i = 0; i < 2; ++i) B[t + i * 4][g] = tf32(from.b[i]);
    }
    for (int lane = 0; lane < lanes; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float& sum = static_cast<Data*>(of[lane])->d[i];
        double exact = sum;
        for (int k = 0; k < 8; ++k) exact += static_cast<double>(A[row][k]) * B[k][column];
        sum = emulation::cut_off(exact);
      }
  });
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four 8 x 8 matrices of 16-bit values from shared memory: lane 8 i + j points to row j of matrix i; lane 4 g + t gets
// [g][2t, 2t+1] of each, or [2t, 2t+1][g] when `transposed`.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
#ifdef PEFTFAST_EMULATE_CUDA
  struct Data {
    const uint16_t* row;
    uint32_t* out;
  } data{static_cast<const uint16_t*>(row), out};
  emulation::with_warp("load_matrices", &data, [](void* const* of) {
    for (int lane = 0; lane < lanes; ++lane)
      for (int i = 0; i < 4; ++i) {
        const auto at = [&](int r, int c) -> uint32_t { return static_cast<Data*>(of[8 * i + r])->row[c]; };
        const int g = lane / 4, t = lane % 4;
        static_cast<Data*>(of[lane])->out[i] =
            transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
      }
  });
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
#endif
}

// 16 bytes to shared memory without a register between; of the source only the first `bytes`, then zeros.
__device__ __forceinline__ void copy_16_bytes(void* to, const void* from, int bytes) {
#ifdef PEFTFAST_EMULATE_CUDA
  emulation::copy_later(to, from, bytes);
#else
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(bytes)
      : "memory");
#endif
}
__device__ __forceinline__ void commit_copies() {
#ifdef PEFTFAST_EMULATE_CUDA
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most `groups` of the last commits are under way.
template <int groups>
__device__ __forceinline__ void wait_for_copies() {
#ifdef PEFTFAST_EMULATE_CUDA
  emulation::wait_for_copies(groups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

// Up to eight values of 16 bits in a row to shared memory, zeros after the first `count`; aligned ones arrive later.
template <class T>
__device__ __forceinline__ void fetch(char* to, const T* from, int64_t count, bool aligned) {
  if (aligned) {
    const int valid = static_cast<int>(count < 0 ? 0 : count < 8 ? count : 8);
    copy_16_bytes(to, from, 2 * valid);
  } else {
    const Eight v = load_eight(from, count, false);
    *reinterpret_cast<uint4*>(to) = {v.pair[0], v.pair[1], v.pair[2], v.pair[3]};
  }
}

template <class T = char>
__device__ __forceinline__ T* shared_memory() {
#ifdef PEFTFAST_EMULATE_CUDA
  return reinterpret_cast<T*>(emulation::shared());
#else
  extern __shared__ __align__(16) char of_block[];
  return reinterpret_cast<T*>(of_block);
#endif
}

// ---- dropout ------------------------------------------------------------------------------------------------------

// Up to sixteen ranks of one adapter; the ranks of all adapters of a layer lie side by side.
struct RankTile {
  int first, end;
  float scaling, keep_scale;    // keep_scale: 1 / (1 - dropout)
  uint32_t adapter, threshold;  // of philox.h; threshold 0: nothing drops
};
constexpr int rank_tile = 16;
struct Ranks {
  int64_t R;
  int tile_count;
  const RankTile* tiles;  // these two are on the device
  const int64_t* seed;
};

__device__ __forceinline__ void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32), low = static_cast<uint32_t>(product);
}

// The random words of one adapter's elements. A counter has four of them, so neighbours share the work.
class Mask {
 public:
  __device__ Mask(const RankTile& ranks, bool dropout, const int64_t* seed_data)
      : adapter_(ranks.adapter), threshold_(dropout ? ranks.threshold : 0), counter_(~uint64_t{0}) {
    const uint64_t seed = threshold_ ? static_cast<uint64_t>(*seed_data) : 0;
    key_low_ = static_cast<uint32_t>(seed), key_high_ = static_cast<uint32_t>(seed >> 32);
  }
  __device__ __forceinline__ bool drops() const { return threshold_ != 0; }
  __device__ __forceinline__ bool keeps(int64_t element) {
    const uint64_t counter = static_cast<uint64_t>(element) >> 2;
    if (counter != counter_) fill(counter);
    const int i = static_cast<int>(element & 3);
    const uint32_t word = i == 0 ? word0_ : i == 1 ? word1_ : i == 2 ? word2_ : word3_;
    return word >= threshold_;
  }

 private:
  __device__ void fill(uint64_t counter) {
    counter_ = counter;
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
    uint32_t c2 = adapter_, c3 = 0, k0 = key_low_, k1 = key_high_;
#pragma unroll
    for (int round = 0; round < philox::rounds; ++round, k0 += philox::weyl0, k1 += philox::weyl1) {
      uint32_t high0, low0, high1, low1;
      multiply_wide(c0, philox::multiplier0, high0, low0);
      multiply_wide(c2, philox::multiplier1, high1, low1);
      c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    }
    word0_ = c0, word1_ = c1, word2_ = c2, word3_ = c3;
  }

  uint32_t adapter_, threshold_, key_low_, key_high_, word0_ = 0, word1_ = 0, word2_ = 0, word3_ = 0;
  uint64_t counter_;
};

// ---- groups of rows -----------------------------------------------------------------------------------------------

// Groups, read on the device; without offsets, all M rows are one group of expert 0 and slot 0.
struct Rows {
  int64_t M;
  Groups groups;

  // As many tiles as there can be, whatever the offsets say.
  constexpr int64_t most_tiles(int height) const {
    return groups.offsets ? (M + groups.count * (height - 1)) / height : (M + height - 1) / height;
  }
};

struct Tile {
  int64_t first, end;  // rows; none when equal
  int expert, slot;
};

// The index-th piece of at most `height` rows of one group. Called by whole warps.
__device__ inline Tile tile_of(const Rows& rows, int64_t index, int height) {
  if (rows.groups.offsets == nullptr) {
    const int64_t first = index * height;
    return {first, first + height < rows.M ? first + height : rows.M, 0, 0};
  }
  const Groups& groups = rows.groups;
  const int lane = static_cast<int>(threadIdx.x % lanes);
  for (int64_t base = 0; base < groups.count; base += lanes) {
    const int64_t g = base + lane;
    int64_t begin = 0, end = 0;
    if (g < groups.count) begin = groups.offsets[g], end = groups.offsets[g + 1];
    const int own = static_cast<int>((end - begin + height - 1) / height);
    int up_to = own;
    for (int delta = 1; delta < lanes; delta *= 2) {
      const int below = __shfl_up_sync(whole_warp, up_to, delta);
      if (lane >= delta) up_to += below;
    }
    const uint32_t past = __ballot_sync(whole_warp, index < up_to);
    if (past != 0) {
      const int owner = __ffs(past) - 1;
      const int64_t start = __shfl_sync(whole_warp, begin + (index - (up_to - own)) * height, owner);
      const int64_t stop = __shfl_sync(whole_warp, end, owner);
      const int64_t found = base + owner;
      return {start, start + height < stop ? start + height : stop, static_cast<int>(groups.experts[found]),
              static_cast<int>(groups.slots[found])};
    }
    index -= __shfl_sync(whole_warp, up_to, lanes - 1);
  }
  return {0, 0, 0, -1};
}

// A tile of a product: rows of one group by one of the strips that the columns are parted in.
struct Place {
  Tile rows;  // none: past the last tile
  int64_t strip;
};

// The index-th tile of a product; a block computes tiles blockIdx.x, blockIdx.x + gridDim.x and so on. Those that
// follow each other, and so run together, share a strip of W, which all rows want; with groups, which are of few rows,
// they share the rows.
__device__ __forceinline__ Place place_of(const Rows& rows, uint32_t index, int height, int64_t P, int width) {
  const uint32_t strips = static_cast<uint32_t>((P + width - 1) / width);
  if (rows.groups.offsets != nullptr) return {tile_of(rows, index / strips, height), index % strips};
  const uint32_t tiles = static_cast<uint32_t>((rows.M + height - 1) / height), strip = index / tiles;
  return {strip < strips ? tile_of(rows, index % tiles, height) : Tile{0, 0, 0, -1}, strip};
}

// ---- launches -----------------------------------------------------------------------------------------------------

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory on the device until the kernels that were launched before its end are done.
class Workspace {
 public:
  Workspace(const Stream& stream, int64_t bytes)
      : stream_(stream), data_(bytes > 0 ? stream.allocate(static_cast<uint64_t>(bytes)) : nullptr) {}
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    if (data_) stream_.release(data_);
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  const Stream& stream_;
  void* data_;
};

#ifndef PEFTFAST_EMULATE_CUDA
// Says which GPU this is and what was built.
[[noreturn]] inline void refuse_this_gpu(const char* reason) {
  int device = 0;
  cudaDeviceProp gpu{};
  cudaGetDevice(&device);
  cudaGetDeviceProperties(&gpu, device);
  std::string message = std::string("peftfast has no kernels for ") + gpu.name + " of compute capability " +
                        std::to_string(gpu.major) + "." + std::to_string(gpu.minor) +
                        ": it was built for " PEFTFAST_CUDA_ARCHITECTURES " (" + reason + "). ";
  if (gpu.major < 8)
    message += "They need 8.0; CUDA_VISIBLE_DEVICES can hide this GPU.";
  else
    message += "Build it with PEFTFAST_CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=" + std::to_string(gpu.major) +
               std::to_string(gpu.minor) + " pip install --no-build-isolation -e .";
  throw std::runtime_error(message);
}
#endif

#ifndef PEFTFAST_EMULATE_CUDA
inline void check_launch(const char* name, cudaError_t error, bool no_kernel = false) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or whoever launches next would take it for their own
  if (no_kernel || error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    refuse_this_gpu(cudaGetErrorString(error));
  throw std::runtime_error(std::string("peftfast's kernel ") + name + ": " + cudaGetErrorString(error));
}

template <class Kernel>
void allow_shared(const char* name, Kernel* kernel, int64_t bytes) {
  if (bytes <= 48 * 1024) return;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  check_launch(name, error, error == cudaErrorInvalidValue);  // also where a GPU has less than one of 8.0 and later
}
#endif

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes,
            const Stream& stream, const Parameters&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef PEFTFAST_EMULATE_CUDA
  (void)name, (void)stream;
  emulation::run(grid, threads, shared_bytes, [&] { kernel(arguments...); });
#else
  allow_shared(name, kernel, shared_bytes);
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check_launch(name, cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), pointers,
                                      shared_bytes, static_cast<cudaStream_t>(stream.handle)));
#endif
}

// A kernel that goes from tile to tile as place_of() has them. How many tiles groups make is known on the device alone:
// so there are as many blocks as run at a time, and each takes its share of what there is. Without groups each has one.
template <class Arguments, class... Parameters>
void launch_tiles(const char* name, void (*kernel)(Arguments, Parameters...), int height, int width, int64_t splits,
                  int threads, int64_t shared_bytes, const Stream& stream, const Arguments& args,
                  const Parameters&... others) {
  int64_t blocks = args.rows.most_tiles(height) * ceil_div(args.P, width);
  if (args.rows.groups.offsets != nullptr) {
#ifdef PEFTFAST_EMULATE_CUDA
    const int64_t at_a_time = 3;
#else
    int for_one = 0;
    allow_shared(name, kernel, shared_bytes);
    check_launch(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&for_one, kernel, threads, shared_bytes));
    const int64_t at_a_time = int64_t{std::max(for_one, 1)} * stream.multiprocessors;
#endif
    blocks = std::min(blocks, at_a_time);
  }
  launch(name, kernel, {static_cast<unsigned>(blocks), 1, static_cast<unsigned>(splits)}, threads, shared_bytes, stream,
         args, others...);
}

inline void zero(void* data, int64_t bytes, const Stream& stream) {
  if (bytes <= 0 || data == nullptr) return;
#ifdef PEFTFAST_EMULATE_CUDA
  (void)stream;
  std::memset(data, 0, static_cast<size_t>(bytes));
#else
  if (cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream.handle)) != cudaSuccess)
    throw std::runtime_error("peftfast could not clear memory on the GPU.");
#endif
}

constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace peftfast::cuda
