// What the kernels of this folder use of CUDA, for a CPU: blocks run one after another, the threads of a block as
// fibers that change places at every barrier and warp instruction, in an order drawn anew for each block, with one warp
// that lags behind the others as far as barriers let it. So the tests run the very kernels on machines without a GPU,
// sanitizers see each access, and what is missing a barrier shows. Asynchronous copies arrive when they are waited for,
// not before. For tests only: it is slow.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace peftfast::cuda::emulation {

// Runs `thread` for every thread of every block.
void run(dim3 grid, int threads, int64_t shared_bytes, const std::function<void()>& thread);

// Lets the warp's other threads arrive with their own `data` (at most 64 bytes); the last one runs `together` on the 32
// pointers, in the order of the lanes. `name` must be the same for all.
void with_warp(const char* name, void* data, void (*together)(void* const* lanes));
void wait_for_block();
// As tensor cores bring a sum to fp32: toward zero.
inline float cut_off(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) && !std::isinf(x) ? std::nextafterf(nearest, 0.0f)
                                                                                  : nearest;
}
char* shared();
void copy_later(void* to, const void* from, int bytes);  // what is missing of 16 bytes becomes zeros
void commit_copies();
void wait_for_copies(int groups_still_under_way);

// Of compute capability 9.0: see hopper.cuh. A tile, too, arrives when it is waited for.
struct TileMap {
  const uint16_t* data;
  int64_t rows, columns, ld;
  int box_rows;
};
void init_barrier(uint64_t* barrier, int count);
void arrive(uint64_t* barrier, int bytes_to_come);
void wait(uint64_t* barrier, uint32_t parity);
void copy_tile(void* to, const TileMap& map, int64_t row, int64_t column, uint64_t* barrier);

}  // namespace peftfast::cuda::emulation

inline void __syncthreads() { peftfast::cuda::emulation::wait_for_block(); }

inline void __syncwarp() {
  peftfast::cuda::emulation::with_warp("__syncwarp", nullptr, [](void* const*) {});
}

template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
  struct Data {
    T value;
    int lane;
  } data{value, lane};
  peftfast::cuda::emulation::with_warp("__shfl_sync", &data, [](void* const* lanes) {
    T values[32];
    for (int i = 0; i < 32; ++i) values[i] = static_cast<Data*>(lanes[i])->value;
    for (int i = 0; i < 32; ++i) static_cast<Data*>(lanes[i])->value = values[static_cast<Data*>(lanes[i])->lane & 31];
  });
  return data.value;
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, int delta) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane >= delta ? lane - delta : lane);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ bits);
}

inline uint32_t __ballot_sync(uint32_t, int predicate) {
  uint32_t data = predicate != 0;
  peftfast::cuda::emulation::with_warp("__ballot_sync", &data, [](void* const* lanes) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i) votes |= *static_cast<uint32_t*>(lanes[i]) << i;
    for (int i = 0; i < 32; ++i) *static_cast<uint32_t*>(lanes[i]) = votes;
  });
  return data;
}

inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __ffsll(int64_t x) { return __builtin_ffsll(x); }
