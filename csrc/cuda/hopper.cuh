// Instructions of compute capability 9.0 (sm_90a): copies of whole tiles by the tensor memory accelerator, barriers in
// shared memory that such copies complete, and products of a warpgroup (four warps) whose operands are such tiles. As
// in common.cuh, each has a second body for the emulation.
//
// A tile is rows of 128 bytes, 64 values of 16 bits, one after another from a multiple of 1024 on. Its 16-byte pieces
// are rotated as the accelerator does it ("128-byte swizzle"): piece i of row r lies at piece i ^ (r % 8), so that
// eight rows' pieces of one column are in different banks.
#pragma once

#include "common.cuh"

#ifndef PEFTFAST_EMULATE_CUDA
#include <cuda.h>
#endif

namespace peftfast::cuda {

constexpr int tile_width = 64;  // values in a row of a tile
constexpr int64_t tile_alignment = 1024;

// A matrix in memory, [rows, columns] in 16 bits, `ld` apart; tiles reach beyond its edges, and are zero there. It must
// be addressable in 16-byte pieces.
#ifdef PEFTFAST_EMULATE_CUDA
using TileMap = emulation::TileMap;
#else
using TileMap = CUtensorMap;
#endif
inline TileMap tile_map(const void* data, int64_t rows, int64_t columns, int64_t ld, int box_rows) {
#ifdef PEFTFAST_EMULATE_CUDA
  return {static_cast<const uint16_t*>(data), rows, columns, ld, box_rows};
#else
  // The driver's function is asked for by name, so that nothing is linked with a library that only a driver brings.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("peftfast needs a CUDA driver from 12.0 on for its sm_90a kernels.");
    return reinterpret_cast<Encode>(function);
  }();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(ld) * 2};
  const cuuint32_t box[2] = {tile_width, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  TileMap map;
  // Sixteen bits are copied as they are: of which type, only the filling beyond the edges would tell.
  if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    throw std::runtime_error("peftfast could not describe a matrix to the GPU's tensor memory accelerator.");
  return map;
#endif
}

#ifdef PEFTFAST_EMULATE_CUDA
#define PEFTFAST_GRID_CONSTANT
#else
#define PEFTFAST_GRID_CONSTANT __grid_constant__
__device__ __forceinline__ uint32_t in_shared(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// In shared memory. A phase ends when `count` threads have arrived and the bytes that were announced are there; phases
// are numbered from 0.
struct alignas(8) Barrier {
  uint64_t state;

  __device__ __forceinline__ void init(int count) {
#ifdef PEFTFAST_EMULATE_CUDA
    emulation::init_barrier(&state, count);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(in_shared(this)), "r"(count) : "memory");
#endif
  }
  __device__ __forceinline__ void arrive() {
#ifdef PEFTFAST_EMULATE_CUDA
    emulation::arrive(&state, 0);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(in_shared(this)) : "memory");
#endif
  }
  // Arrives, and announces bytes that copies will bring.
  __device__ __forceinline__ void arrive_and_expect(int bytes) {
#ifdef PEFTFAST_EMULATE_CUDA
    emulation::arrive(&state, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(in_shared(this)), "r"(bytes)
                 : "memory");
#endif
  }
  // Until that phase has ended; it is the current one or the one before.
  __device__ __forceinline__ void wait(int64_t phase) {
    const uint32_t parity = static_cast<uint32_t>(phase & 1);
#ifdef PEFTFAST_EMULATE_CUDA
    emulation::wait(&state, parity);
#else
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(in_shared(this)),
        "r"(parity)
        : "memory");
#endif
  }
};

// After init(), before the block's other threads and the accelerator meet the barriers.
__device__ __forceinline__ void publish_barriers() {
#ifndef PEFTFAST_EMULATE_CUDA
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The box of the map that starts at (row, column), to a tile; one thread asks for it.
__device__ __forceinline__ void copy_tile(void* to, const TileMap& map, int64_t row, int64_t column, Barrier& barrier) {
#ifdef PEFTFAST_EMULATE_CUDA
  emulation::copy_tile(to, map, row, column, &barrier.state);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(in_shared(to)),
      "l"(&map), "r"(static_cast<int>(column)), "r"(static_cast<int>(row)), "r"(in_shared(&barrier))
      : "memory");
#endif
}

// Products read their tiles, and change their sums, until they are waited for.
__device__ __forceinline__ void begin_products() {
  __syncwarp();  // they are for all lanes at once
#ifndef PEFTFAST_EMULATE_CUDA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void commit_products() {
#ifndef PEFTFAST_EMULATE_CUDA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until at most `groups` of the last commits are under way.
template <int groups>
__device__ __forceinline__ void wait_for_products() {
#ifdef PEFTFAST_EMULATE_CUDA
  __syncwarp();
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
#endif
}

// Keeps what uses sums behind a wait.
template <int n>
__device__ __forceinline__ void settle([[maybe_unused]] float (&d)[n][4]) {
#ifndef PEFTFAST_EMULATE_CUDA
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
#endif
}

#if !defined(PEFTFAST_EMULATE_CUDA) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
// How a product finds its operand: in units of 16 bytes the address, the two strides, and the rotation.
__device__ __forceinline__ uint64_t describe(const char* operand, uint64_t leading_bytes, uint64_t stride_bytes) {
  constexpr uint64_t swizzle_128 = uint64_t{1} << 62;
  return (in_shared(operand) & 0x3ffffu) >> 4 | leading_bytes >> 4 << 16 | stride_bytes >> 4 << 32 | swizzle_128;
}
#endif

#define PEFTFAST_4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define PEFTFAST_WGMMA(types)                                                                                         \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." types                                                   \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
               "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51," \
               "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, 1, 1, 1, 0, %66;"                         \
               : PEFTFAST_4(0), PEFTFAST_4(1), PEFTFAST_4(2), PEFTFAST_4(3), PEFTFAST_4(4), PEFTFAST_4(5),            \
                 PEFTFAST_4(6), PEFTFAST_4(7), PEFTFAST_4(8), PEFTFAST_4(9), PEFTFAST_4(10), PEFTFAST_4(11),          \
                 PEFTFAST_4(12), PEFTFAST_4(13), PEFTFAST_4(14), PEFTFAST_4(15)                                       \
               : "l"(of_A), "l"(of_B), "n"(down_columns))

// d += A B by a warpgroup, A [64, 16] of a tile and B [16, 128]: of one tile with B's columns as rows or,
// `down_columns`, of two side by side with B's rows as theirs. Warp w has rows 16 w ... 16 w + 15, and in d[j] of
// columns 8 j ... 8 j + 7 what multiply_16x8x16 has. Both operands are where their first value is, which is in the
// first eight rows of a tile or, down columns, at the start of eight rows; `side_bytes` part the tiles that lie side by
// side.
template <class T, bool down_columns>
__device__ __forceinline__ void multiply_64x128x16(float (&d)[16][4], const char* A, const char* B, int side_bytes) {
#ifdef PEFTFAST_EMULATE_CUDA
  struct Data {
    float (*d)[4];
    const char *A, *B;
    int side_bytes;
  } data{d, A, B, side_bytes};
  emulation::with_warp("multiply_64x128x16", &data, [](void* const* of) {
    const auto value = [](const char* operand, int64_t row, int64_t column) {
      const uintptr_t plain = reinterpret_cast<uintptr_t>(operand) + row * 128 + column * 2;
      return to_float(*reinterpret_cast<const T*>(plain ^ (plain >> 7 & 7) << 4));
    };
    const Data& first = *static_cast<Data*>(of[0]);
    const int top = static_cast<int>(threadIdx.x) / lanes % 4 * 16;
    float A[16][16], B[16][128];
    for (int k = 0; k < 16; ++k) {
      for (int i = 0; i < 16; ++i) A[i][k] = value(first.A, top + i, k);
      for (int j = 0; j < 128; ++j)
        B[k][j] =
            down_columns ? value(first.B + j / tile_width * first.side_bytes, k, j % tile_width) : value(first.B, j, k);
    }
    for (int lane = 0; lane < lanes; ++lane)
      for (int j = 0; j < 16; ++j)
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4 + i / 2 * 8, column = 8 * j + lane % 4 * 2 + i % 2;
          float& sum = static_cast<Data*>(of[lane])->d[j][i];
          double exact = sum;
          for (int k = 0; k < 16; ++k) exact += static_cast<double>(A[row][k]) * B[k][column];
          sum = emulation::cut_off(exact);
        }
  });
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr uint64_t eight_rows = 8 * 128;
  const uint64_t of_A = describe(A, 16, eight_rows);
  const uint64_t of_B = describe(B, down_columns ? static_cast<uint64_t>(side_bytes) : 16, eight_rows);
  if constexpr (std::is_same_v<T, bf16>)
    PEFTFAST_WGMMA("bf16.bf16");
  else
    PEFTFAST_WGMMA("f16.f16");
#endif
}
#undef PEFTFAST_WGMMA
#undef PEFTFAST_4

}  // namespace peftfast::cuda
