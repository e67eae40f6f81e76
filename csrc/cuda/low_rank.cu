// The low-rank steps: pack, down, outer.
//
//   down    a warp holds 16 rows and 16 ranks; the warps of a block part the reduction and add up in shared memory, and
//           so do blocks where they are few, in a second launch
//   outer   a warp holds 16 ranks and 64 columns; the warps of a block part the rows
//
// Each reads X straight into the registers of the tensor cores, 16 bytes a lane, with no shared memory on the way:
// which element of the reduction stands where in a fragment does not matter, so long as both operands agree. X in 16
// bits is exact in tf32; the fp32 factor is split in three tf32 parts, whose products are added. Tensor cores cut off
// where fp32 rounds, so they sum no more than eight products of the large parts, and ordinary additions take it from
// there.
//
// Down reduces along a row of X and outer along a column, so that one wants for a lane what the other has across lanes.
// A pass that serves both has X in shared memory, which ldmatrix reads either way:
//
//                    256 columns
//            +------+------+------+------+
//   16 rows  |  32  |      |      |  ... |   --> U, summed over the eight warps and the columns of this block
//            +------+------+------+------+       A warp has 32 columns; three such tiles are under way. A block goes
//                        |                       down its rows, then to its next 256 columns. D stays in registers
//                        v                       meanwhile: with more columns to a warp, one block would take those
//                        D, summed over          of a whole multiprocessor.
//                        the rows of this block
//
// Blocks write their sums side by side, and a second launch adds them up in their order.
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

void unpack(const Factors& gradients, const float* D, int64_t splits, const Stream& stream) {
  each_chunk(gradients, [&](const FactorChunk& chunk, dim3 grid) {
    launch("unpack", unpack_kernel, grid, 256, 0, stream, chunk, D, splits);
  });
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

constexpr int64_t down_columns = warps * 32;  // of X, at a time

// `parts_of_U`: where several blocks part the columns, their sums, [blocks, M, R], not yet scaled.
template <class T>
__global__ void __launch_bounds__(threads, 1) down_kernel(Down args, bool aligned, float* parts_of_U) {
  const Input& in = args.in;
  const Tile rows = tile_of(in.rows, blockIdx.x, row_tile);
  if (rows.first >= rows.end || rows.slot < 0) return;
  const RankTile ranks = in.ranks.tiles[blockIdx.y];
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, g = lane / 4, t = lane % 4;
  float sums[2][4] = {}, rests[2][4] = {};
  const Mask mask(ranks, in.dropout, in.ranks.seed);
  Mask mask_of_row[2] = {mask, mask};
  const float* A = args.A + rows.slot * in.ranks.R * in.columns;
  const int64_t steps = (in.columns + down_columns - 1) / down_columns, own = (steps + gridDim.z - 1) / gridDim.z;
  const int64_t begin = blockIdx.z * own * down_columns;
  const int64_t end = begin + own * down_columns < in.columns ? begin + own * down_columns : in.columns;
  for (int64_t q = begin + warp * 32 + t * 8; q - t * 8 < end; q += down_columns) {
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
  if (row >= rows.end || rank >= ranks.end) return;
  if (gridDim.z == 1)
    args.U[row * in.ranks.R + rank] = sum * scale_of(args, ranks);
  else
    parts_of_U[(blockIdx.z * in.rows.M + row) * in.ranks.R + rank] = sum;
}

// Parts of U in their order: a thread for each of 16 rows x 16 ranks.
__global__ void __launch_bounds__(threads) add_up_kernel(Down args, const float* U, int64_t splits) {
  const Input& in = args.in;
  const RankTile ranks = in.ranks.tiles[blockIdx.y];
  const int64_t row = blockIdx.x * int64_t{row_tile} + threadIdx.x / rank_tile;
  const int rank = ranks.first + threadIdx.x % rank_tile;
  if (row >= in.rows.M || rank >= ranks.end) return;
  float sum = 0, error = 0;
  for (int64_t split = 0; split < splits; ++split) add(U[(split * in.rows.M + row) * in.ranks.R + rank], sum, error);
  args.U[row * in.ranks.R + rank] = sum * scale_of(args, ranks);
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

// ---- down and outer -----------------------------------------------------------------------------------------------

constexpr int pass_stages = 3;
constexpr int64_t pass_stage_bytes = pass_rows * pass_columns * 2;
constexpr int pass_pitch = pass_columns + 8;  // of A in shared memory: eight ranks of a warp lie in different banks
constexpr int64_t pass_shared_bytes =
    pass_stages * pass_stage_bytes + rank_tile * pass_pitch * 4 + 2 * warps * pass_rows * rank_tile * 4;

// Where piece `piece` of 16 bytes of a row of X lies.
__device__ __forceinline__ int pass_place(int row, int piece) {
  return row * pass_columns * 2 + (piece ^ (row & 7)) * 16;
}

template <class T>
__global__ void __launch_bounds__(threads, 2) down_and_outer_kernel(DownAndOuter args, bool aligned) {
  const Input& in = args.in;
  const RankTile ranks = in.ranks.tiles[blockIdx.y];
  const int64_t M = in.rows.M, R = in.ranks.R, columns = in.columns;
  const int64_t begin = blockIdx.z * args.rows_per_split;
  const int64_t end = begin + args.rows_per_split < M ? begin + args.rows_per_split : M;
  const int64_t first = blockIdx.x * args.tiles_per_split * pass_columns;
  const int64_t past = first + args.tiles_per_split * pass_columns;
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, g = lane / 4, t = lane % 4;
  char* shared = shared_memory<char>();
  float (*a)[pass_pitch] = reinterpret_cast<float (*)[pass_pitch]>(shared + pass_stages * pass_stage_bytes);
  // [step % 2][warp][row][rank]
  float (*u)[warps][pass_rows][rank_tile] = reinterpret_cast<float (*)[warps][pass_rows][rank_tile]>(a + rank_tile);
  const int64_t steps = (end - begin + pass_rows - 1) / pass_rows;

#pragma unroll 1
  for (int64_t column = first; column < past && column < columns; column += pass_columns) {
    const auto fetch_X = [&](int64_t step) {
#pragma unroll
      for (int i = threadIdx.x; i < pass_rows * pass_columns / 8; i += threads) {
        const int at = i / (pass_columns / 8), piece = i % (pass_columns / 8);
        const int64_t row = begin + step * pass_rows + at, p = column + piece * 8;
        const bool inside = row < end && p < columns;
        fetch(shared + step % pass_stages * pass_stage_bytes + pass_place(at, piece),
              static_cast<const T*>(in.X) + (inside ? row * in.ld + p : 0), inside ? columns - p : 0, aligned);
      }
    };
    // Of a step whose parts all have arrived; after those of the columns to the left.
    const auto store_U = [&](int64_t step) {
      static_assert(threads == pass_rows * rank_tile);
      const int i = threadIdx.x / rank_tile, j = threadIdx.x % rank_tile;
      const int64_t row = begin + step * pass_rows + i, rank = ranks.first + j;
      if (row >= end || rank >= ranks.end) return;
      float* out = args.U + (blockIdx.x * M + row) * R + rank;
      float sum = column > first ? *out : 0.0f, error = 0;
      for (int w = 0; w < warps; ++w) add(u[step % 2][w][i][j], sum, error);
      *out = sum;
    };
    for (int64_t step = 0; step < pass_stages - 1; ++step) {
      if (step < steps) fetch_X(step);
      commit_copies();
    }
    for (int i = threadIdx.x; i < rank_tile * pass_columns; i += threads) {
      const int64_t rank = ranks.first + i / pass_columns, p = column + i % pass_columns;
      a[i / pass_columns][i % pass_columns] = rank < ranks.end && p < columns ? args.A[rank * columns + p] : 0.0f;
    }
    float sums[4][4] = {}, rests[4][4] = {};  // of D

#pragma unroll 1
    for (int64_t step = 0; step < steps; ++step) {
      float v[2][4];  // rows 2t and 2t + 1 of either eight, ranks g and g + 8
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = begin + step * pass_rows + 8 * half + 2 * t + i / 2;
          const int rank = ranks.first + g + i % 2 * 8;
          v[half][i] = row < end && rank < ranks.end ? args.V[row * R + rank] : 0.0f;
        }
      wait_for_copies<pass_stages - 2>();
      __syncthreads();  // this step has arrived for all, and all are done with the one before
      if (step + pass_stages - 1 < steps) fetch_X(step + pass_stages - 1);
      commit_copies();
      if (step > 0) store_U(step - 1);
      const char* X = shared + step % pass_stages * pass_stage_bytes;

      float of_U[2][4] = {}, rest_of_U[2][4] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        uint32_t x[4];  // [half of the rows + 2 * half of the columns]
        load_matrices<false>(x, X + pass_place(lane % 16, 4 * warp + 2 * k + lane / 16));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t left[4] = {
              bit_cast<uint32_t>(first_of<T>(x[2 * j])), bit_cast<uint32_t>(first_of<T>(x[2 * j + 1])),
              bit_cast<uint32_t>(second_of<T>(x[2 * j])), bit_cast<uint32_t>(second_of<T>(x[2 * j + 1]))};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float* pair = &a[8 * i + g][32 * warp + 16 * k + 8 * j + 2 * t];
            const Parts even = parts_of(pair[0]), odd = parts_of(pair[1]);
            float part[4] = {};
            multiply_16x8x8(part, left, even.high, odd.high);
            multiply_16x8x8(rest_of_U[i], left, even.middle, odd.middle);
            multiply_16x8x8(rest_of_U[i], left, even.low, odd.low);
#pragma unroll
            for (int n = 0; n < 4; ++n) take(part[n], of_U[i][n], rest_of_U[i][n]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int n = 0; n < 4; ++n)
          u[step % 2][warp][g + n / 2 * 8][8 * i + 2 * t + n % 2] = of_U[i][n] + rest_of_U[i][n];

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t high[4], middle[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Parts parts = parts_of(v[half][i]);
          high[i] = parts.high, middle[i] = parts.middle, low[i] = parts.low;
        }
        uint32_t x[4];  // [eight columns]
        load_matrices<true>(x, X + pass_place(8 * half + lane % 8, 4 * warp + lane / 8));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t even = bit_cast<uint32_t>(first_of<T>(x[j])), odd = bit_cast<uint32_t>(second_of<T>(x[j]));
          float part[4] = {};
          multiply_16x8x8(part, high, even, odd);
          multiply_16x8x8(rests[j], middle, even, odd);
          multiply_16x8x8(rests[j], low, even, odd);
#pragma unroll
          for (int n = 0; n < 4; ++n) take(part[n], sums[j][n], rests[j][n]);
        }
      }
    }
    wait_for_copies<0>();
    __syncthreads();
    if (steps > 0) store_U(steps - 1);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int64_t rank = ranks.first + g + v / 2 * 8, p = column + 32 * warp + 8 * j + 2 * t + v % 2;
        if (rank < ranks.end && p < columns) args.D[(blockIdx.z * R + rank) * columns + p] = sums[j][v] + rests[j][v];
      }
  }
}

unsigned u(int64_t count) { return static_cast<unsigned>(count); }

void add_up(const Down& args, const float* parts, int64_t splits, const Stream& stream) {
  launch("add_up", add_up_kernel, {u(ceil_div(args.in.rows.M, row_tile)), u(args.in.ranks.tile_count), 1}, threads, 0,
         stream, args, parts, splits);
}

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
  dim3 grid{u(in.rows.most_tiles(row_tile)), u(in.ranks.tile_count), 1};
  if (in.dtype == DType::f32) {
    launch("down", down_plain_kernel, grid, threads, 2 * row_tile * 65 * 4, stream, args);
    return;
  }
  const bool aligned = in_16_bytes(in.X, in.ld);
  const int64_t shared_bytes = warps * 2 * 4 * lanes * 4;
  const int64_t splits = in.rows.groups.offsets
                             ? 1
                             : splits_for(int64_t{grid.x} * grid.y, in.columns / down_columns, stream.multiprocessors);
  const Workspace parts(stream, splits > 1 ? splits * in.rows.M * in.ranks.R * 4 : 0);
  grid.z = u(splits);
  if (in.dtype == DType::bf16)
    launch("down", down_kernel<bf16>, grid, threads, shared_bytes, stream, args, aligned, parts.as<float>());
  else
    launch("down", down_kernel<f16>, grid, threads, shared_bytes, stream, args, aligned, parts.as<float>());
  if (splits > 1) add_up(args, parts.as<float>(), splits, stream);
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
  unpack(gradients, args.D, splits, stream);
}

void down_and_outer(const Down& args, const float* V, const Factors& gradients, const Stream& stream) {
  const Input& in = args.in;
  const int64_t M = in.rows.M, R = in.ranks.R;
  const OnePass pass = one_pass(M, in.columns, R, in.ranks.tile_count, stream.multiprocessors);
  if (in.rows.groups.offsets || gradients.slots != 1 || in.dropout || in.dtype == DType::f32 || !pass.pays) {
    down(args, stream);
    outer(in, V, gradients, stream);
    return;
  }
  const int64_t tiles = ceil_div(in.columns, pass_columns);
  const int64_t tiles_per_split = ceil_div(tiles, pass.column_splits);
  const int64_t rows_per_split = ceil_div(ceil_div(M, pass.row_splits), pass_rows) * pass_rows;
  const int64_t column_splits = ceil_div(tiles, tiles_per_split), row_splits = ceil_div(M, rows_per_split);
  const Workspace U(stream, column_splits * M * R * 4), D(stream, row_splits * R * in.columns * 4);
  const DownAndOuter both{in, args.A, U.as<float>(), V, D.as<float>(), tiles_per_split, rows_per_split};
  const dim3 grid{u(column_splits), u(in.ranks.tile_count), u(row_splits)};
  const bool aligned = in_16_bytes(in.X, in.ld);
  if (in.dtype == DType::bf16)
    launch("down_and_outer", down_and_outer_kernel<bf16>, grid, threads, pass_shared_bytes, stream, both, aligned);
  else
    launch("down_and_outer", down_and_outer_kernel<f16>, grid, threads, pass_shared_bytes, stream, both, aligned);
  add_up(args, both.U, column_splits, stream);
  unpack(gradients, both.D, row_splits, stream);
}

}  // namespace peftfast::cuda
