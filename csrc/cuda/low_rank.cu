// The low-rank steps: pack, down, outer.
//
//   down    a warp holds 16 rows and 16 ranks; the warps of a block part the reduction and add up through shared memory
//   outer   a warp holds 16 ranks and 64 columns; the warps of a block part the rows
//
// Both read X straight into the registers of the tensor cores, 16 bytes a lane, with no shared memory on the way: which
// element of the reduction stands where in a fragment does not matter, so long as both operands agree. X in 16 bits is
// exact in tf32; the fp32 factor is split in three tf32 parts, whose products are added. Tensor cores cut off where
// fp32 rounds, so they sum no more than eight products of the large parts, and ordinary additions take it from there.
#include <type_traits>

#include "steps.h"

namespace peftfast::cuda {
namespace {

constexpr int warps = 8, threads = warps * lanes;
constexpr int rank_tile = 16, row_tile = 16, column_tile = 64;

// An fp32 as the sum of three numbers in tf32.
struct Parts {
  uint32_t high, middle, low;
};
__device__ __forceinline__ Parts parts_of(float x) {
  const uint32_t high = to_tf32(x);
  const float rest = x - bit_cast<float>(high);
  const uint32_t middle = to_tf32(rest);
  return {high, middle, to_tf32(rest - bit_cast<float>(middle))};
}

// Adds what a tensor core summed. `rest` gets what that lacks on average for having been cut off: half a unit in the
// last place of a number of any leading digits.
__device__ __forceinline__ void take(float part, float& sum, float& rest) {
  constexpr float cut_off = 0.7213f / (1 << 24);
  sum += part;
  rest = fmaf(part, cut_off, rest);
}

// ---- pack and unpack ----------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(256) pack_kernel(Factors factors, float* out) {
  const Factor factor = factors.list[blockIdx.y];
  int64_t first_rank = 0;
  for (int i = 0; i < static_cast<int>(blockIdx.y); ++i) first_rank += factors.list[i].rank;
  const int64_t size = factor.rank * factors.P;
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < size; i += gridDim.x * int64_t{256}) {
    const int64_t j = i / factors.P, p = i % factors.P, slot = blockIdx.z;
    out[(slot * factors.R + first_rank + j) * factors.P + p] = load_as_float(
        factor.data, slot * factor.strides[0] + j * factor.strides[1] + p * factor.strides[2], factor.dtype);
  }
}

__global__ void __launch_bounds__(256) unpack_kernel(Factors factors, const float* D, int64_t splits) {
  const Factor factor = factors.list[blockIdx.y];
  if (factor.data == nullptr) return;
  int64_t first_rank = 0;
  for (int i = 0; i < static_cast<int>(blockIdx.y); ++i) first_rank += factors.list[i].rank;
  const int64_t size = factor.rank * factors.P;
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < size; i += gridDim.x * int64_t{256}) {
    const int64_t j = i / factors.P, p = i % factors.P, slot = blockIdx.z;
    float sum = 0;
    for (int64_t split = 0; split < splits; ++split)
      sum += D[((split * factors.slots + slot) * factors.R + first_rank + j) * factors.P + p];
    store_float(factor.data, slot * factor.strides[0] + j * factor.strides[1] + p * factor.strides[2], factor.dtype,
                sum);
  }
}

dim3 factor_grid(const Factors& factors) {
  int64_t largest = 0;
  for (int i = 0; i < factors.count; ++i) largest = std::max(largest, factors.list[i].rank * factors.P);
  return {static_cast<unsigned>(std::min<int64_t>(ceil_div(largest, 256), 1024)), static_cast<unsigned>(factors.count),
          static_cast<unsigned>(factors.slots)};
}

// ---- down ---------------------------------------------------------------------------------------------------------

// The index-th run of at most 16 ranks that lies in one segment.
struct RankTile {
  int first, end, adapter;
};
__device__ __host__ inline RankTile rank_tile_of(const Segments& segments, int index) {
  for (int i = 0; i < segments.count; ++i) {
    const int tiles = (segments.list[i].end - segments.list[i].begin + rank_tile - 1) / rank_tile;
    if (index < tiles) {
      const int first = segments.list[i].begin + index * rank_tile;
      const int end = first + rank_tile < segments.list[i].end ? first + rank_tile : segments.list[i].end;
      return {first, end, i};
    }
    index -= tiles;
  }
  return {0, 0, 0};
}
int rank_tiles(const Segments& segments) {
  int64_t tiles = 0;
  for (int i = 0; i < segments.count; ++i) tiles += ceil_div(segments.list[i].end - segments.list[i].begin, rank_tile);
  return static_cast<int>(tiles);
}

__device__ __forceinline__ float scale_of(const Down& args, int adapter) {
  const Segment& segment = args.segments.list[adapter];
  return args.dropout ? segment.scaling * segment.keep_scale : segment.scaling;
}

template <class T>
__global__ void __launch_bounds__(threads, 1) down_kernel(Down args, bool aligned) {
  const Tile rows = tile_of(args.rows, blockIdx.x, row_tile);
  if (rows.first >= rows.end) return;
  const RankTile ranks = rank_tile_of(args.segments, blockIdx.y);
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, g = lane / 4, t = lane % 4;
  float sums[2][4] = {}, rests[2][4] = {};
  if (rows.slot >= 0) {
    Mask mask_of_row[2] = {Mask(args.segments, ranks.adapter), Mask(args.segments, ranks.adapter)};
    const bool drops = args.dropout && mask_of_row[0].drops();
    const float* A = args.A + rows.slot * args.R * args.Q;
    for (int64_t q = warp * 32 + t * 8; q - t * 8 < args.Q; q += warps * 32) {
      // This lane's eight elements of the reduction: of two rows of X, and of two vectors of A.
      float x[2][8], a[2][8];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = rows.first + g + 8 * i;
        const int64_t count = row < rows.end ? args.Q - q : 0;
        const Eight values = load_eight(static_cast<const T*>(args.X) + row * args.ldx + q, count, aligned);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          x[i][2 * j] = first_of<T>(values.pair[j]);
          x[i][2 * j + 1] = second_of<T>(values.pair[j]);
        }
        if (drops)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            if (!mask_of_row[i].keeps(row * args.Q + q + j)) x[i][j] = 0;
        const int rank = ranks.first + g + 8 * i;
#pragma unroll
        for (int j = 0; j < 8; ++j) a[i][j] = rank < ranks.end && q + j < args.Q ? A[rank * args.Q + q + j] : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const uint32_t left[4] = {bit_cast<uint32_t>(x[0][j]), bit_cast<uint32_t>(x[1][j]),
                                  bit_cast<uint32_t>(x[0][j + 1]), bit_cast<uint32_t>(x[1][j + 1])};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Parts first = parts_of(a[i][j]), second = parts_of(a[i][j + 1]);
          float part[4] = {};
          multiply_16x8x8(part, left, first.high, second.high);
          multiply_16x8x8(rests[i], left, first.middle, second.middle);
          multiply_16x8x8(rests[i], left, first.low, second.low);
#pragma unroll
          for (int k = 0; k < 4; ++k) take(part[k], sums[i][k], rests[i][k]);
        }
      }
    }
  }
  // [warp][i][register][lane]
  float* parts = shared_memory<float>();
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) parts[((warp * 2 + i) * 4 + j) * lanes + lane] = sums[i][j] + rests[i][j];
  __syncthreads();
  const int i = threadIdx.x / 128, j = threadIdx.x / lanes % 4;
  float sum = 0;
  for (int w = 0; w < warps; ++w) sum += parts[((w * 2 + i) * 4 + j) * lanes + lane];
  const int64_t row = rows.first + g + j / 2 * 8;
  const int rank = ranks.first + 8 * i + 2 * t + j % 2;
  if (row < rows.end && rank < ranks.end) args.U[row * args.R + rank] = sum * scale_of(args, ranks.adapter);
}

// fp32: a thread for each of 16 rows x 16 ranks.
__global__ void __launch_bounds__(threads) down_plain_kernel(Down args) {
  constexpr int step = 64;
  const Tile rows = tile_of(args.rows, blockIdx.x, row_tile);
  if (rows.first >= rows.end) return;
  const RankTile ranks = rank_tile_of(args.segments, blockIdx.y);
  float (*x)[step + 1] = shared_memory<float[step + 1]>();
  float (*a)[step + 1] = x + row_tile;
  const int r = threadIdx.x % 16, m = threadIdx.x / 16;
  const float* A = args.A + (rows.slot < 0 ? 0 : rows.slot * args.R * args.Q);
  Mask mask(args.segments, ranks.adapter);
  const bool drops = args.dropout && mask.drops();
  float sum = 0, error = 0;
  for (int64_t q = 0; rows.slot >= 0 && q < args.Q; q += step) {
    for (int j = 4 * r; j < 4 * r + 4; ++j) {  // neighbours share a counter of the mask
      const int64_t row = rows.first + m, element = row * args.Q + q + j;
      const bool inside = row < rows.end && q + j < args.Q;
      float value = inside ? load_as_float(args.X, row * args.ldx + q + j, args.dtype) : 0.0f;
      if (inside && drops && !mask.keeps(element)) value = 0;
      x[m][j] = value;
      a[m][j] = ranks.first + m < ranks.end && q + j < args.Q ? A[(ranks.first + m) * args.Q + q + j] : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < step; k += 16) {
      float part = 0;
      for (int i = k; i < k + 16; ++i) part = fmaf(x[m][i], a[r][i], part);
      add(part, sum, error);
    }
    __syncthreads();
  }
  if (rows.first + m < rows.end && ranks.first + r < ranks.end)
    args.U[(rows.first + m) * args.R + ranks.first + r] = sum * scale_of(args, ranks.adapter);
}

// ---- outer --------------------------------------------------------------------------------------------------------

// Calls body(first, end) for each run of rows of this block's slot and split.
template <class Body>
__device__ void each_run(const Outer& args, int64_t slot, int64_t split, Body body) {
  const int64_t begin = split * args.rows_per_split;
  const int64_t end = begin + args.rows_per_split < args.rows.M ? begin + args.rows_per_split : args.rows.M;
  const Groups& groups = args.rows.groups;
  if (groups.offsets == nullptr) {
    body(begin, end);
    return;
  }
  for (int64_t group = 0; group < groups.count; ++group) {
    if (groups.slots[group] != slot) continue;
    const int64_t from = groups.offsets[group] > begin ? groups.offsets[group] : begin;
    const int64_t to = groups.offsets[group + 1] < end ? groups.offsets[group + 1] : end;
    if (from < to) body(from, to);
  }
}

template <class T>
__global__ void __launch_bounds__(threads, 1) outer_kernel(Outer args, bool aligned) {
  const RankTile ranks = rank_tile_of(args.segments, blockIdx.y);
  const int64_t slot = blockIdx.z % args.slots, split = blockIdx.z / args.slots;
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, g = lane / 4, t = lane % 4;
  // A lane reads eight columns of a row; they stand at lane / 4 of eight fragments.
  const int64_t column = blockIdx.x * int64_t{column_tile} + g * 8;
  float sums[8][4] = {}, rests[8][4] = {};
  Mask mask_of_row[2] = {Mask(args.segments, ranks.adapter), Mask(args.segments, ranks.adapter)};
  const bool drops = args.dropout && mask_of_row[0].drops();
  each_run(args, slot, split, [&](int64_t first, int64_t end) {
    for (int64_t m = first + warp * 8; m < end; m += warps * 8) {
      float x[2][8], v[2][2];  // [row t or t + 4]; v: [row][rank g or g + 8]
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = m + t + 4 * i;
        const Eight values = load_eight(static_cast<const T*>(args.X) + row * args.ldx + column,
                                        row < end ? args.P - column : 0, aligned);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          x[i][2 * j] = first_of<T>(values.pair[j]);
          x[i][2 * j + 1] = second_of<T>(values.pair[j]);
        }
        if (drops)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            if (!mask_of_row[i].keeps(row * args.P + column + j)) x[i][j] = 0;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int rank = ranks.first + g + 8 * j;
          v[i][j] = row < end && rank < ranks.end ? args.V[row * args.R + rank] : 0.0f;
        }
      }
      uint32_t high[4], middle[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Parts parts = parts_of(v[i / 2][i % 2]);
        high[i] = parts.high, middle[i] = parts.middle, low[i] = parts.low;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t upper = bit_cast<uint32_t>(x[0][j]), lower = bit_cast<uint32_t>(x[1][j]);
        float part[4] = {};
        multiply_16x8x8(part, high, upper, lower);
        multiply_16x8x8(rests[j], middle, upper, lower);
        multiply_16x8x8(rests[j], low, upper, lower);
#pragma unroll
        for (int i = 0; i < 4; ++i) take(part[i], sums[j][i], rests[j][i]);
      }
    }
  });
  // [warp][rank][column]
  float (*parts)[rank_tile][column_tile] = shared_memory<float[rank_tile][column_tile]>();
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[warp][g + i / 2 * 8][(2 * t + i % 2) * 8 + j] = sums[j][i] + rests[j][i];
  __syncthreads();
  float* D = args.D + (split * args.slots + slot) * args.R * args.P;
  for (int i = threadIdx.x; i < rank_tile * column_tile; i += threads) {
    const int rank = ranks.first + i / column_tile;
    const int64_t p = blockIdx.x * int64_t{column_tile} + i % column_tile;
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += parts[w][i / column_tile][i % column_tile];
    const Segment& segment = args.segments.list[ranks.adapter];
    if (rank < ranks.end && p < args.P) D[rank * args.P + p] = args.dropout ? sum * segment.keep_scale : sum;
  }
}

// fp32: a thread for each of 16 ranks x 16 columns.
__global__ void __launch_bounds__(threads) outer_plain_kernel(Outer args) {
  constexpr int step = 16;
  const RankTile ranks = rank_tile_of(args.segments, blockIdx.y);
  const int64_t slot = blockIdx.z % args.slots, split = blockIdx.z / args.slots;
  float (*x)[step + 1] = shared_memory<float[step + 1]>();
  float (*v)[step + 1] = x + step;
  const int p = threadIdx.x % 16, r = threadIdx.x / 16;
  const int64_t column = blockIdx.x * int64_t{16} + p;
  Mask mask(args.segments, ranks.adapter);
  const bool drops = args.dropout && mask.drops();
  float sum = 0, error = 0;
  each_run(args, slot, split, [&](int64_t first, int64_t end) {
    for (int64_t m = first; m < end; m += step) {
      const int64_t row = m + r;
      float value = row < end && column < args.P ? load_as_float(args.X, row * args.ldx + column, args.dtype) : 0.0f;
      if (drops && row < end && column < args.P && !mask.keeps(row * args.P + column)) value = 0;
      x[r][p] = value;
      v[r][p] = row < end && ranks.first + p < ranks.end ? args.V[row * args.R + ranks.first + p] : 0.0f;
      __syncthreads();
      float part = 0;
      for (int k = 0; k < step; ++k) part = fmaf(v[k][r], x[k][p], part);
      add(part, sum, error);
      __syncthreads();
    }
  });
  if (ranks.first + r < ranks.end && column < args.P)
    args.D[((split * args.slots + slot) * args.R + ranks.first + r) * args.P + column] =
        args.dropout ? sum * args.segments.list[ranks.adapter].keep_scale : sum;
}

unsigned u(int64_t count) { return static_cast<unsigned>(count); }

}  // namespace

void pack(const Factors& factors, float* out, const Stream& stream) {
  launch("pack", pack_kernel, factor_grid(factors), 256, 0, stream, factors, out);
}

void unpack(const Factors& factors, const float* D, int64_t splits, const Stream& stream) {
  launch("unpack", unpack_kernel, factor_grid(factors), 256, 0, stream, factors, D, splits);
}

void down(const Down& args, const Stream& stream) {
  if (args.R == 0) return;
  if (args.rows.groups.offsets) zero(args.U, args.rows.M * args.R * 4, stream);  // of rows in no group
  const dim3 grid{u(args.rows.most_tiles(row_tile)), u(rank_tiles(args.segments)), 1};
  const bool aligned = in_16_bytes(args.X, args.ldx);
  const int64_t parts = warps * 2 * 4 * lanes * 4;
  if (args.dtype == DType::f32)
    launch("down", down_plain_kernel, grid, threads, 2 * row_tile * 65 * 4, stream, args);
  else if (args.dtype == DType::bf16)
    launch("down", down_kernel<bf16>, grid, threads, parts, stream, args, aligned);
  else
    launch("down", down_kernel<f16>, grid, threads, parts, stream, args, aligned);
}

void outer(Outer args, const Factors& gradients, const Stream& stream) {
  if (args.R == 0 || args.P == 0 || args.slots == 0) return;
  const bool plain = args.dtype == DType::f32;
  const int64_t tiles = ceil_div(args.P, plain ? 16 : column_tile) * rank_tiles(args.segments) * args.slots;
  // Rows are parted until there are two blocks for every multiprocessor, but not below 256 rows.
  args.splits = std::max<int64_t>(1, std::min(ceil_div(2 * stream.multiprocessors, tiles), args.rows.M / 256));
  args.rows_per_split = ceil_div(args.rows.M, args.splits);
  const Workspace partial(stream, args.splits * args.slots * args.R * args.P * 4);
  args.D = partial.as<float>();
  const dim3 grid{u(ceil_div(args.P, plain ? 16 : column_tile)), u(rank_tiles(args.segments)),
                  u(args.splits * args.slots)};
  const bool aligned = in_16_bytes(args.X, args.ldx);
  const int64_t parts = warps * rank_tile * column_tile * 4;
  if (plain)
    launch("outer", outer_plain_kernel, grid, threads, 2 * 16 * 17 * 4, stream, args);
  else if (args.dtype == DType::bf16)
    launch("outer", outer_kernel<bf16>, grid, threads, parts, stream, args, aligned);
  else
    launch("outer", outer_kernel<f16>, grid, threads, parts, stream, args, aligned);
  unpack(gradients, args.D, args.splits, stream);
}

}  // namespace peftfast::cuda
