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
constexpr int row_tile = 16, column_tile = 64;

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

// As many factors as travel with one launch, each a line of blocks.
constexpr size_t most_factors = 16;
struct FactorChunk {
  Factor list[most_factors];
  int64_t slots, R, P;
};

// Calls body(place in [slots, R, P], place in the factor's own data) for the elements of this block's factor and slot.
template <class Body>
__device__ __forceinline__ void each_element(const FactorChunk& factors, const Factor& factor, Body body) {
  const int64_t size = (factor.ranks.end - factor.ranks.first) * factors.P, slot = blockIdx.z;
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < size; i += gridDim.x * int64_t{256}) {
    const int64_t j = i / factors.P, p = i % factors.P;
    body((slot * factors.R + factor.ranks.first + j) * factors.P + p,
         slot * factor.strides[0] + j * factor.strides[1] + p * factor.strides[2]);
  }
}

__global__ void __launch_bounds__(256) pack_kernel(FactorChunk factors, float* out, RankTile* tiles) {
  const Factor factor = factors.list[blockIdx.y];
  each_element(factors, factor,
               [&](int64_t to, int64_t from) { out[to] = load_as_float(factor.data, from, factor.dtype); });
  if (tiles == nullptr || blockIdx.x > 0 || blockIdx.z > 0) return;
  for (int i = threadIdx.x; factor.ranks.first + i * rank_tile < factor.ranks.end; i += 256) {
    RankTile tile = factor.ranks;
    tile.first += i * rank_tile;
    if (tile.first + rank_tile < tile.end) tile.end = tile.first + rank_tile;
    tiles[factor.first_tile + i] = tile;
  }
}

__global__ void __launch_bounds__(256) unpack_kernel(FactorChunk factors, const float* D, int64_t splits) {
  const Factor factor = factors.list[blockIdx.y];
  if (factor.data == nullptr) return;
  each_element(factors, factor, [&](int64_t from, int64_t to) {
    float sum = 0;
    for (int64_t split = 0; split < splits; ++split) sum += D[split * factors.slots * factors.R * factors.P + from];
    store_float(factor.data, to, factor.dtype, sum);
  });
}

// Calls launch(factors, grid) for all of them, a chunk at a time.
template <class Launch>
void each_chunk(const Factors& factors, Launch launch) {
  for (size_t first = 0; first < factors.list.size(); first += most_factors) {
    const size_t count = std::min(factors.list.size() - first, most_factors);
    FactorChunk chunk{{}, factors.slots, factors.R, factors.P};
    int64_t largest = 1;
    for (size_t i = 0; i < count; ++i) {
      chunk.list[i] = factors.list[first + i];
      largest = std::max(largest, (chunk.list[i].ranks.end - chunk.list[i].ranks.first) * factors.P);
    }
    launch(chunk, dim3{static_cast<unsigned>(std::min<int64_t>(ceil_div(largest, 256), 1024)),
                       static_cast<unsigned>(count), static_cast<unsigned>(factors.slots)});
  }
}

// ---- reading X ----------------------------------------------------------------------------------------------------

// A row's eight elements from `column` on, in fp32; zeros outside and where they are dropped.
template <class T>
__device__ __forceinline__ void load_row(const Input& in, int64_t row, bool inside, int64_t column, bool aligned,
                                         Mask& mask, float (&x)[8]) {
  const Eight values =
      load_eight(static_cast<const T*>(in.X) + row * in.ld + column, inside ? in.columns - column : 0, aligned);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    x[2 * j] = first_of<T>(values.pair[j]);
    x[2 * j + 1] = second_of<T>(values.pair[j]);
  }
  if (mask.drops())
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (!mask.keeps(row * in.columns + column + j)) x[j] = 0;
}

// The same of one element, in any dtype.
__device__ __forceinline__ float load_one(const Input& in, int64_t row, bool inside, int64_t column, Mask& mask) {
  if (!inside || column >= in.columns) return 0;
  const float x = load_as_float(in.X, row * in.ld + column, in.dtype);
  return mask.drops() && !mask.keeps(row * in.columns + column) ? 0 : x;
}

// ---- down ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float scale_of(const Down& args, const RankTile& ranks) {
  return args.in.dropout ? ranks.scaling * ranks.keep_scale : ranks.scaling;
}

template <class T>
__global__ void __launch_bounds__(threads, 1) down_kernel(Down args, bool aligned) {
  const Input& in = args.in;
  const Tile rows = tile_of(in.rows, blockIdx.x, row_tile);
  if (rows.first >= rows.end || rows.slot < 0) return;
  const RankTile ranks = in.ranks.tiles[blockIdx.y];
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, g = lane / 4, t = lane % 4;
  float sums[2][4] = {}, rests[2][4] = {};
  const Mask mask(ranks, in.dropout, in.ranks.seed);
  Mask mask_of_row[2] = {mask, mask};
  const float* A = args.A + rows.slot * in.ranks.R * in.columns;
  for (int64_t q = warp * 32 + t * 8; q - t * 8 < in.columns; q += warps * 32) {
    // This lane's eight elements of the reduction: of two rows of X, and of two vectors of A.
    float x[2][8], a[2][8];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = rows.first + g + 8 * i;
      load_row<T>(in, row, row < rows.end, q, aligned, mask_of_row[i], x[i]);
      const int rank = ranks.first + g + 8 * i;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        a[i][j] = rank < ranks.end && q + j < in.columns ? A[rank * in.columns + q + j] : 0.0f;
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
  // [warp][i][register][lane]
  float* parts = shared_memory<float>();
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) parts[((warp * 2 + i) * 4 + j) * lanes + lane] = sums[i][j] + rests[i][j];
  __syncthreads();
  const int i = threadIdx.x / 128, j = threadIdx.x / lanes % 4;
  float sum = 0, error = 0;
  for (int w = 0; w < warps; ++w) add(parts[((w * 2 + i) * 4 + j) * lanes + lane], sum, error);
  const int64_t row = rows.first + g + j / 2 * 8;
  const int rank = ranks.first + 8 * i + 2 * t + j % 2;
  if (row < rows.end && rank < ranks.end) args.U[row * in.ranks.R + rank] = sum * scale_of(args, ranks);
}

// fp32: a thread for each of 16 rows x 16 ranks.
__global__ void __launch_bounds__(threads) down_plain_kernel(Down args) {
  constexpr int step = 64;
  const Input& in = args.in;
  const Tile rows = tile_of(in.rows, blockIdx.x, row_tile);
  if (rows.first >= rows.end || rows.slot < 0) return;
  const RankTile ranks = in.ranks.tiles[blockIdx.y];
  float (*x)[step + 1] = shared_memory<float[step + 1]>();
  float (*a)[step + 1] = x + row_tile;
  const int r = threadIdx.x % 16, m = threadIdx.x / 16;
  const int64_t row = rows.first + m, rank = ranks.first + m;
  const float* A = args.A + rows.slot * in.ranks.R * in.columns;
  Mask mask(ranks, in.dropout, in.ranks.seed);
  float sum = 0, error = 0;
  for (int64_t q = 0; q < in.columns; q += step) {
    for (int j = 4 * r; j < 4 * r + 4; ++j) {  // neighbours share a counter of the mask
      x[m][j] = load_one(in, row, row < rows.end, q + j, mask);
      a[m][j] = rank < ranks.end && q + j < in.columns ? A[rank * in.columns + q + j] : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < step; k += 16) {
      float part = 0;
      for (int i = k; i < k + 16; ++i) part = fmaf(x[m][i], a[r][i], part);
      add(part, sum, error);
    }
    __syncthreads();
  }
  if (row < rows.end && ranks.first + r < ranks.end)
    args.U[row * in.ranks.R + ranks.first + r] = sum * scale_of(args, ranks);
}

// ---- outer --------------------------------------------------------------------------------------------------------

// Calls body(first, end) for each run of rows of this block's slot and split.
template <class Body>
__device__ void each_run(const Outer& args, int64_t slot, int64_t split, Body body) {
  const int64_t begin = split * args.rows_per_split;
  const Rows& rows = args.in.rows;
  const int64_t end = begin + args.rows_per_split < rows.M ? begin + args.rows_per_split : rows.M;
  const Groups& groups = rows.groups;
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
  const Input& in = args.in;
  const RankTile ranks = in.ranks.tiles[blockIdx.y];
  const int64_t slot = blockIdx.z % args.slots, split = blockIdx.z / args.slots;
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, g = lane / 4, t = lane % 4;
  // A lane reads eight columns of a row; they stand at lane / 4 of eight fragments.
  const int64_t column = blockIdx.x * int64_t{column_tile} + g * 8;
  float sums[8][4] = {}, rests[8][4] = {};
  const Mask mask(ranks, in.dropout, in.ranks.seed);
  Mask mask_of_row[2] = {mask, mask};
  each_run(args, slot, split, [&](int64_t first, int64_t end) {
    for (int64_t m = first + warp * 8; m < end; m += warps * 8) {
      float x[2][8], v[2][2];  // [row t or t + 4]; v: [row][rank g or g + 8]
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = m + t + 4 * i;
        load_row<T>(in, row, row < end, column, aligned, mask_of_row[i], x[i]);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int rank = ranks.first + g + 8 * j;
          v[i][j] = row < end && rank < ranks.end ? args.V[row * in.ranks.R + rank] : 0.0f;
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
  float* D = args.D + (split * args.slots + slot) * in.ranks.R * in.columns;
  for (int i = threadIdx.x; i < rank_tile * column_tile; i += threads) {
    const int rank = ranks.first + i / column_tile;
    const int64_t p = blockIdx.x * int64_t{column_tile} + i % column_tile;
    float sum = 0, error = 0;
    for (int w = 0; w < warps; ++w) add(parts[w][i / column_tile][i % column_tile], sum, error);
    if (rank < ranks.end && p < in.columns) D[rank * in.columns + p] = in.dropout ? sum * ranks.keep_scale : sum;
  }
}

// fp32: a thread for each of 16 ranks x 16 columns.
__global__ void __launch_bounds__(threads) outer_plain_kernel(Outer args) {
  constexpr int step = 16;
  const Input& in = args.in;
  const RankTile ranks = in.ranks.tiles[blockIdx.y];
  const int64_t slot = blockIdx.z % args.slots, split = blockIdx.z / args.slots;
  float (*x)[step + 1] = shared_memory<float[step + 1]>();
  float (*v)[step + 1] = x + step;
  const int p = threadIdx.x % 16, r = threadIdx.x / 16;
  const int64_t column = blockIdx.x * int64_t{16} + p;
  Mask mask(ranks, in.dropout, in.ranks.seed);
  float sum = 0, error = 0;
  each_run(args, slot, split, [&](int64_t first, int64_t end) {
    for (int64_t m = first; m < end; m += step) {
      const int64_t row = m + r;
      x[r][p] = load_one(in, row, row < end, column, mask);
      v[r][p] = row < end && ranks.first + p < ranks.end ? args.V[row * in.ranks.R + ranks.first + p] : 0.0f;
      __syncthreads();
      float part = 0;
      for (int k = 0; k < step; ++k) part = fmaf(v[k][r], x[k][p], part);
      add(part, sum, error);
      __syncthreads();
    }
  });
  if (ranks.first + r < ranks.end && column < in.columns)
    args.D[((split * args.slots + slot) * in.ranks.R + ranks.first + r) * in.columns + column] =
        in.dropout ? sum * ranks.keep_scale : sum;
}

unsigned u(int64_t count) { return static_cast<unsigned>(count); }

}  // namespace

void pack(const Factors& factors, float* out, RankTile* tiles, const Stream& stream) {
  each_chunk(factors, [&](const FactorChunk& chunk, dim3 grid) {
    launch("pack", pack_kernel, grid, 256, 0, stream, chunk, out, tiles);
  });
}

void down(const Down& args, const Stream& stream) {
  const Input& in = args.in;
  if (in.ranks.R == 0 || in.rows.M == 0) return;
  if (in.rows.groups.offsets) zero(args.U, in.rows.M * in.ranks.R * 4, stream);  // of rows without a slot
  const dim3 grid{u(in.rows.most_tiles(row_tile)), u(in.ranks.tile_count), 1};
  const bool aligned = in_16_bytes(in.X, in.ld);
  const int64_t parts = warps * 2 * 4 * lanes * 4;
  if (in.dtype == DType::f32)
    launch("down", down_plain_kernel, grid, threads, 2 * row_tile * 65 * 4, stream, args);
  else if (in.dtype == DType::bf16)
    launch("down", down_kernel<bf16>, grid, threads, parts, stream, args, aligned);
  else
    launch("down", down_kernel<f16>, grid, threads, parts, stream, args, aligned);
}

void outer(const Input& in, const float* V, const Factors& gradients, const Stream& stream) {
  const int64_t slots = gradients.slots, size = slots * in.ranks.R * in.columns;
  if (size == 0) return;
  const bool plain = in.dtype == DType::f32;
  const int64_t tiles = ceil_div(in.columns, plain ? 16 : column_tile) * in.ranks.tile_count * slots;
  // Rows are parted until there are two blocks for every multiprocessor, but not below 256 rows.
  const int64_t splits = std::max<int64_t>(1, std::min(ceil_div(2 * stream.multiprocessors, tiles), in.rows.M / 256));
  const Workspace D(stream, splits * size * 4);
  const Outer args{in, V, slots, D.as<float>(), splits, ceil_div(in.rows.M, splits)};
  const dim3 grid{u(ceil_div(in.columns, plain ? 16 : column_tile)), u(in.ranks.tile_count), u(splits * slots)};
  const bool aligned = in_16_bytes(in.X, in.ld);
  const int64_t parts = warps * rank_tile * column_tile * 4;
  if (plain)
    launch("outer", outer_plain_kernel, grid, threads, 2 * 16 * 17 * 4, stream, args);
  else if (in.dtype == DType::bf16)
    launch("outer", outer_kernel<bf16>, grid, threads, parts, stream, args, aligned);
  else
    launch("outer", outer_kernel<f16>, grid, threads, parts, stream, args, aligned);
  each_chunk(gradients, [&](const FactorChunk& chunk, dim3 grid) {
    launch("unpack", unpack_kernel, grid, 256, 0, stream, chunk, static_cast<const float*>(args.D), splits);
  });
}

}  // namespace peftfast::cuda
