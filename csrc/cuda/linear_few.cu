// The base product for few rows, as when tokens are generated: bound by reading W once.
//
// A block computes 32 columns of up to 16 or 64 rows; its eight warps part the reduction and add up, in their order,
// through shared memory. Where that makes too few blocks, several part the reduction, too. A lane reads 32 codes of a
// row of W at once (16 bytes, one scale) or 32 values in four pieces, and what it decodes is at once a fragment of the
// tensor cores: which element of the reduction stands where does not matter, so long as X is read likewise.
#include <type_traits>

#include "epilogue.cuh"
#include "weight.cuh"

namespace peftfast::cuda {
namespace {

constexpr int warps = 8, threads = warps * lanes, columns = few_columns;
constexpr int run = 32;  // of the reduction, for one lane
static_assert(few_depth == warps * 4 * run);

// What a lane has read of a 4-bit W: a run of each of four columns.
struct Codes {
  uint4 words[columns / 8];
  float scale[columns / 8];
};

template <class T, int row_tiles, bool four_bit>
__global__ void __launch_bounds__(threads, 1) few_kernel(Linear args, bool aligned_X, bool aligned_W) {
  constexpr int tile_rows = 16 * row_tiles, column_fragments = columns / 8;
  Tile rows = tile_of(args.rows, blockIdx.x, tile_rows);
  if (rows.first >= rows.end) return;
  const Part part = part_of((args.Q + few_depth - 1) / few_depth, args, rows);
  const int64_t column = blockIdx.y * int64_t{columns};
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, g = lane / 4, t = lane % 4;
  float* codebook = shared_memory<float>();
  float (*total)[columns + 1] = reinterpret_cast<float (*)[columns + 1]>(codebook + 16 * lanes);
  if constexpr (four_bit) {
    fill_codebook(args.W.fourbit.type, codebook);
    __syncthreads();
  }

  float sums[row_tiles][column_fragments][4] = {};
  const T* X = static_cast<const T*>(args.X);
  const T* W = static_cast<const T*>(args.W.dense);
  const int64_t end = part.end * few_depth < args.Q ? part.end * few_depth : args.Q;
  const auto read_codes = [&](int64_t q) {
    Codes codes;
#pragma unroll
    for (int j = 0; j < column_fragments; ++j) {
      const int64_t p = column + 8 * j + g, element = (rows.expert * args.P + p) * args.Q + q;
      codes.words[j] = {0, 0, 0, 0}, codes.scale[j] = 0;
      if (p < args.P && q < end) {
        codes.words[j] = *reinterpret_cast<const uint4*>(args.W.fourbit.packed + element / 2);
        codes.scale[j] = absmax_of(args.W.fourbit, element);
      }
    }
    return codes;
  };
  int64_t q = part.first * few_depth + (warp * 4 + t) * run;
  [[maybe_unused]] Codes codes, next;
  if constexpr (four_bit) next = read_codes(q);
#pragma unroll 1
  for (; q - t * run < end; q += few_depth) {
    if constexpr (four_bit) codes = next, next = read_codes(q + few_depth);  // they come while these are multiplied
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      const int64_t at = q + 8 * piece;
      uint32_t b[column_fragments][4];
#pragma unroll
      for (int j = 0; j < column_fragments; ++j) {
        if constexpr (four_bit) {
          const uint4& of = codes.words[j];
          const uint32_t word = piece == 0 ? of.x : piece == 1 ? of.y : piece == 2 ? of.z : of.w;
          decode_eight<T>(word, codes.scale[j], codebook, lane, b[j]);
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
  }

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

template <class T, int row_tiles>
void launch_few(const Linear& args, int64_t splits, const Stream& stream) {
  const dim3 grid{static_cast<unsigned>(args.rows.most_tiles(16 * row_tiles)),
                  static_cast<unsigned>(ceil_div(args.P, columns)), static_cast<unsigned>(splits)};
  const int64_t shared = codebook_bytes + 16 * row_tiles * (columns + 1) * 4;
  const bool aligned_X = in_16_bytes(args.X, args.ldx), aligned_W = in_16_bytes(args.W.dense, args.W.ld);
  if (args.W.fourbit.blocksize)
    launch("linear", few_kernel<T, row_tiles, true>, grid, threads, shared, stream, args, aligned_X, aligned_W);
  else
    launch("linear", few_kernel<T, row_tiles, false>, grid, threads, shared, stream, args, aligned_X, aligned_W);
}

}  // namespace

void linear_few(const Linear& args, int tile_rows, int64_t splits, const Stream& stream) {
  if (args.compute == DType::bf16)
    tile_rows == 16 ? launch_few<bf16, 1>(args, splits, stream) : launch_few<bf16, 4>(args, splits, stream);
  else
    tile_rows == 16 ? launch_few<f16, 1>(args, splits, stream) : launch_few<f16, 4>(args, splits, stream);
}

}  // namespace peftfast::cuda
