// What tensor-core products have beside the base product: the low-rank term that the accumulators start from, and bias,
// rounding and stores at the end. Accumulators are fragments: 16 rows by 8 columns for a warp, of which lane 4 g + t
// has [g][2t, 2t+1] and [g + 8][2t, 2t+1].
#pragma once

#include "steps.h"

namespace peftfast::cuda {

// drop'(U L) of a block's `tile_rows` rows and `columns` columns, sixteen ranks at a time. Nothing of it is unrolled or
// kept in registers from one part to the next: the kernels need those for their accumulators.
template <int tile_rows, int columns, int threads>
class LowRankTerm {
 public:
  static constexpr int64_t bytes = tile_rows * (rank_tile + 1) * 4 + rank_tile * columns * 4;  // of shared memory

  __device__ __forceinline__ LowRankTerm(const Linear& args, const Tile& rows, int64_t column, char* shared)
      : args_(args),
        rows_(rows),
        column_(column),
        u_(reinterpret_cast<float (*)[rank_tile + 1]>(shared)),
        l_(reinterpret_cast<float (*)[columns]>(shared + tile_rows * (rank_tile + 1) * 4)) {}

  __device__ __forceinline__ int tiles() const { return rows_.slot >= 0 ? args_.ranks.tile_count : 0; }

  // To shared memory; by all threads of the block.
  __device__ __forceinline__ void fetch(int tile) {
    const RankTile& ranks = args_.ranks.tiles[tile];
    const float scale = args_.dropout ? ranks.keep_scale : 1.0f;
    __syncthreads();
    for (int i = threadIdx.x; i < tile_rows * rank_tile; i += threads) {
      const int64_t row = rows_.first + i / rank_tile;
      const int rank = ranks.first + i % rank_tile;
      u_[i / rank_tile][i % rank_tile] =
          row < rows_.end && rank < ranks.end ? args_.U[row * args_.ranks.R + rank] : 0.0f;
    }
    for (int i = threadIdx.x; i < rank_tile * columns; i += threads) {
      const int rank = ranks.first + i / columns;
      const int64_t p = column_ + i % columns;
      l_[i / columns][i % columns] =
          rank < ranks.end && p < args_.P ? args_.L[(rows_.slot * args_.ranks.R + rank) * args_.P + p] * scale : 0.0f;
    }
    __syncthreads();
  }

  // Adds it to the fragments of a warp's rows row ... row + 15, counted within the block, from `column` on.
  template <int fragments>
  __device__ __forceinline__ void add(int tile, int row, int column, float (&sums)[fragments][4]) const {
    const int lane = threadIdx.x % lanes, top = row + lane / 4, left = column + lane % 4 * 2;
    float terms[fragments][4] = {};
#pragma unroll 1
    for (int k = 0; k < rank_tile; ++k) {
      const float upper = u_[top][k], lower = u_[top + 8][k];
#pragma unroll
      for (int j = 0; j < fragments; ++j) {
        const float first = l_[k][left + 8 * j], second = l_[k][left + 8 * j + 1];
        terms[j][0] = fmaf(upper, first, terms[j][0]), terms[j][1] = fmaf(upper, second, terms[j][1]);
        terms[j][2] = fmaf(lower, first, terms[j][2]), terms[j][3] = fmaf(lower, second, terms[j][3]);
      }
    }
    __syncwarp();  // so that what the mask needs is read again
    Mask mask(args_.ranks.tiles[tile], args_.dropout, args_.ranks.seed);
#pragma unroll
    for (int j = 0; j < fragments; ++j)
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        float term = terms[j][v];
        if (mask.drops()) {
          const int64_t p = column_ + left + 8 * j + v % 2;
          if (!mask.keeps((rows_.first + top + v / 2 * 8) * args_.P + p)) term = 0;
        }
        sums[j][v] += term;
      }
  }

 private:
  const Linear& args_;
  const Tile& rows_;
  int64_t column_;
  float (*u_)[rank_tile + 1];
  float (*l_)[columns];
};

// Steps of the reduction.
struct Part {
  int64_t first, end;
};
// Those of this block, where several part the reduction. It writes a Y of its own, and what is added but once is left
// to the first of them.
__device__ __forceinline__ Part part_of(int64_t steps, Linear& args, Tile& rows) {
  if (gridDim.z == 1) return {0, steps};
  args.Y = static_cast<float*>(args.Y) + blockIdx.z * args.rows.M * args.P;
  if (blockIdx.z > 0) args.bias = nullptr, rows.slot = -1;
  const int64_t size = (steps + gridDim.z - 1) / gridDim.z, first = blockIdx.z * size;
  return {first, first + size < steps ? first + size : steps};
}

// Fragments to Y, with the bias: `row` and `p` are those of the thread's first value.
template <class T, int fragments>
__device__ __forceinline__ void store_fragments(const Linear& args, const Tile& rows, int64_t row, int64_t p,
                                                const float (&sums)[fragments][4]) {
#pragma unroll
  for (int j = 0; j < fragments; ++j, p += 8) {
    const int count = p + 1 < args.P ? 2 : p < args.P ? 1 : 0;
    const float* biases = args.bias ? args.bias + rows.expert * args.P + p : nullptr;
    const float bias[2] = {biases && count > 0 ? biases[0] : 0.0f, biases && count > 1 ? biases[1] : 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= rows.end) continue;
      const float first = sums[j][2 * half] + bias[0], second = sums[j][2 * half + 1] + bias[1];
      const int64_t at = (row + 8 * half) * args.P + p;
      if (args.dtype == DType::f32) {
        float* y = static_cast<float*>(args.Y) + at;
        if (count > 0) y[0] = first;
        if (count > 1) y[1] = second;
      } else if (count == 2 && args.P % 2 == 0) {
        *reinterpret_cast<uint32_t*>(static_cast<T*>(args.Y) + at) = pack<T>(first, second);
      } else {
        T* y = static_cast<T*>(args.Y) + at;
        if (count > 0) y[0] = from_float<T>(first);
        if (count > 1) y[1] = from_float<T>(second);
      }
    }
  }
}

}  // namespace peftfast::cuda
