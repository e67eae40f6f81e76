// The base product for few rows, as when tokens are generated: bound by reading W once.
//
// A block computes 32 columns of up to 16 or 64 rows; its eight warps part the reduction and add up, in their order,
// through shared memory. Where that makes too few blocks, several part the reduction, too. A lane takes 32 codes of a
// row of W at a time (16 bytes, one scale) or 32 values in four pieces, and what it decodes is at once a fragment of
// the tensor cores: which element of the reduction stands where does not matter, so long as X is read likewise.
//
// What W's codes cost is waiting for them. Each lane copies its own to shared memory, two runs ahead, and nobody else
// reads them there: the bytes on their way take no registers, and no barrier parts them from their use. A third run
// ahead would take the place of a block that runs beside this one.
#include <type_traits>

#include "epilogue.cuh"
#include "weight.cuh"

namespace peftfast::cuda {
namespace {

constexpr int warps = 8, threads = warps * lanes, columns = few_columns;
constexpr int run = 32;  // of the reduction, for one lane
static_assert(few_depth == warps * 4 * run);

// A run of each of four columns, on its way to a lane: stages of [column][thread].
constexpr int column_fragments = columns / 8, stages = 3;
struct Codes {
  uint4 (*words)[column_fragments][threads];
  float (*scales)[column_fragments][threads];
};
constexpr int64_t codes_bytes = stages * column_fragments * threads * (16 + 4);
static_assert(codes_bytes + codebook_bytes + 64 * (columns + 1) * 4 <= 99 * 1024);  // all that a block gets on sm_86

template <class T, int row_tiles, bool four_bit>
__device__ __forceinline__ void multiply_tile(Linear& args, Tile& rows, int64_t column, bool aligned_X,
                                              [[maybe_unused]] bool aligned_W, float (*total)[columns + 1],
                                              [[maybe_unused]] const float* codebook,
                                              [[maybe_unused]] const Codes& codes) {
  constexpr int tile_rows = 16 * row_tiles;
  const Part part = part_of((args.Q + few_depth - 1) / few_depth, args, rows);
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, g = lane / 4, t = lane % 4;

  float sums[row_tiles][column_fragments][4] = {};
  const T* X = static_cast<const T*>(args.X);
  const T* W = static_cast<const T*>(args.W.dense);
  const int64_t end = part.end * few_depth < args.Q ? part.end * few_depth : args.Q;
  const int64_t first = part.first * few_depth + (warp * 4 + t) * run;
  const auto element_of = [&](int64_t step, int j) -> int64_t {  // negative: past the edge
    const int64_t p = column + 8 * j + g, q = first + step * few_depth;
    return p < args.P && q < end ? (rows.expert * args.P + p) * args.Q + q : -1;
  };
  const auto fetch_codes = [&](int64_t step) {
#pragma unroll
    for (int j = 0; j < column_fragments; ++j) {
      const int64_t element = element_of(step, j);
      copy_16_bytes(&codes.words[step % stages][j][threadIdx.x],
                    args.W.fourbit.packed + (element < 0 ? 0 : element / 2), element < 0 ? 0 : 16);
    }
    commit_copies();
  };
  const auto read_scales = [&](int64_t step, float (&scales)[column_fragments]) {
#pragma unroll
    for (int j = 0; j < column_fragments; ++j) {
      const int64_t element = element_of(step, j);
      scales[j] = element < 0 ? 0.0f : absmax_of(args.W.fourbit, element);
    }
  };
  const auto keep_scales = [&](int64_t step, const float (&scales)[column_fragments]) {
#pragma unroll
    for (int j = 0; j < column_fragments; ++j) codes.scales[step % stages][j][threadIdx.x] = scales[j];
  };
  if constexpr (four_bit) {  // all are under way before the first is waited for
    float scales[stages - 1][column_fragments];
#pragma unroll
    for (int step = 0; step < stages - 1; ++step) fetch_codes(step);
#pragma unroll
    for (int step = 0; step < stages - 1; ++step) read_scales(step, scales[step]);
#pragma unroll
    for (int step = 0; step < stages - 1; ++step) keep_scales(step, scales[step]);
  }
#pragma unroll 1
  for (int64_t step = 0, q = first; q - t * run < end; ++step, q += few_depth) {
    [[maybe_unused]] uint4 words[column_fragments];
    [[maybe_unused]] float scales[column_fragments], scales_to_come[column_fragments];
    if constexpr (four_bit) {
      fetch_codes(step + stages - 1);
      read_scales(step + stages - 1, scales_to_come);
      wait_for_copies<stages - 1>();
#pragma unroll
      for (int j = 0; j < column_fragments; ++j) {
        words[j] = codes.words[step % stages][j][threadIdx.x];
        scales[j] = codes.scales[step % stages][j][threadIdx.x];
      }
    }
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      const int64_t at = q + 8 * piece;
      uint32_t b[column_fragments][4];
#pragma unroll
      for (int j = 0; j < column_fragments; ++j) {
        if constexpr (four_bit) {
          const uint4& of = words[j];
          const uint32_t word = piece == 0 ? of.x : piece == 1 ? of.y : piece == 2 ? of.z : of.w;
          decode_eight<T>(word, scales[j], codebook, lane, b[j]);
        } else {
          const int64_t p = column + 8 * j + g;
          const Eight v =
              load_eight(W + (rows.expert * args.P + p) * args.W.ld + at, p < args.P ? args.Q - at : 0, aligned_W);
#pragma unroll
          for (int i = 0; i < 4; ++i) b[j][i] = v.pair[i];
        }
      }
#pragma unroll
      for (int r = 0; r < row_tiles; ++r) {
        Eight x[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t row = rows.first + 16 * r + g + 8 * i;
          x[i] = load_eight(X + row * args.ldx + at, row < rows.end ? args.Q - at : 0, aligned_X);
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t a[4] = {x[0].pair[i], x[1].pair[i], x[0].pair[i + 1], x[1].pair[i + 1]};
#pragma unroll
          for (int j = 0; j < column_fragments; ++j) multiply_16x8x16<T>(sums[r][j], a, b[j][i], b[j][i + 1]);
        }
      }
    }
    if constexpr (four_bit) keep_scales(step + stages - 1, scales_to_come);
  }
  if constexpr (four_bit) wait_for_copies<0>();

  for (int w = 0; w < warps; ++w) {
    if (warp == w)
#pragma unroll
      for (int r = 0; r < row_tiles; ++r)
#pragma unroll
        for (int j = 0; j < column_fragments; ++j)
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            float& sum = total[16 * r + g + v / 2 * 8][8 * j + 2 * t + v % 2];
            sum = w == 0 ? sums[r][j][v] : sum + sums[r][j][v];
          }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < tile_rows * columns; i += threads) {
    const int64_t row = rows.first + i / columns, p = column + i % columns;
    if (row >= rows.end || p >= args.P) continue;
    float y = total[i / columns][i % columns];
    if (rows.slot >= 0)
      for (int64_t rank = 0; rank < args.ranks.R; ++rank)
        y = fmaf(args.U[row * args.ranks.R + rank], args.L[(rows.slot * args.ranks.R + rank) * args.P + p], y);
    if (args.bias) y += args.bias[rows.expert * args.P + p];
    store_float(args.Y, row * args.P + p, args.dtype, y);
  }
}

template <class T, int row_tiles, bool four_bit>
__global__ void __launch_bounds__(threads, 1) few_kernel(Linear args, bool aligned_X, bool aligned_W) {
  char* shared = shared_memory<char>();
  const Codes codes{reinterpret_cast<uint4(*)[column_fragments][threads]>(shared),
                    reinterpret_cast<float (*)[column_fragments][threads]>(shared + codes_bytes / 5 * 4)};
  float* codebook = reinterpret_cast<float*>(shared + codes_bytes);
  char* sums = shared + (four_bit ? codes_bytes + codebook_bytes : 0);
  if constexpr (four_bit) fill_codebook(args.W.fourbit.type, codebook);
  for (uint32_t index = blockIdx.x;; index += gridDim.x) {
    Place place = place_of(args.rows, index, 16 * row_tiles, args.P, columns);
    if (place.rows.first >= place.rows.end) return;
    __syncthreads();  // the codebook is there, and nobody still reads the sums of the tile before
    multiply_tile<T, row_tiles, four_bit>(args, place.rows, place.strip * columns, aligned_X, aligned_W,
                                          reinterpret_cast<float (*)[columns + 1]>(sums), codebook, codes);
  }
}

template <class T, int row_tiles>
void launch_few(const Linear& args, int64_t splits, const Stream& stream) {
  const int64_t shared = 16 * row_tiles * (columns + 1) * 4;
  const bool aligned_X = in_16_bytes(args.X, args.ldx), aligned_W = in_16_bytes(args.W.dense, args.W.ld);
  if (args.W.fourbit.blocksize)
    launch_tiles("linear", few_kernel<T, row_tiles, true>, 16 * row_tiles, columns, splits, threads,
                 codes_bytes + codebook_bytes + shared, stream, args, aligned_X, aligned_W);
  else
    launch_tiles("linear", few_kernel<T, row_tiles, false>, 16 * row_tiles, columns, splits, threads, shared, stream,
                 args, aligned_X, aligned_W);
}

}  // namespace

void linear_few(const Linear& args, int tile_rows, int64_t splits, const Stream& stream) {
  if (args.compute == DType::bf16)
    tile_rows == 16 ? launch_few<bf16, 1>(args, splits, stream) : launch_few<bf16, 4>(args, splits, stream);
  else
    tile_rows == 16 ? launch_few<f16, 1>(args, splits, stream) : launch_few<f16, 4>(args, splits, stream);
}

}  // namespace peftfast::cuda
