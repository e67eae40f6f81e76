// The base product on tensor cores, for many rows: Y = X W^T + bias + drop'(U L).
//
//              Q                    P            A block computes 128 columns of tile_rows (128 or 32) rows. Its eight
//         +---------+          +---------+       warps share three stages of shared memory, each 32 wide along Q: while
//   rows  |    X    |    Q     |   W^T   |       one is multiplied, the next two are on their way. A 4-bit W is decoded
//         +---------+          +---------+       on the way to shared memory: its codes are read before the products of
//                                                a stage and looked up after them.
//
// The accumulators start from the low-rank term and Y is written once, unless blocks part the reduction. Rows of
// 16-byte pieces in shared memory are rotated so that the eight rows of a matrix that ldmatrix reads lie in different
// banks.
#include <type_traits>

#include "epilogue.cuh"
#include "weight.cuh"

namespace peftfast::cuda {
namespace {

constexpr int threads = 256, columns = tiled_columns, depth = tiled_depth, stages = 3;

template <int tile_rows>
constexpr int64_t stage_bytes = (tile_rows + columns) * depth * 2;

// Where piece `piece` of 16 bytes of a row of `depth` (X, straight W) or `columns` (W stored [Q, P]) values lies.
__device__ __forceinline__ int narrow_place(int row, int piece) { return row * 64 + ((piece ^ (row >> 1)) & 3) * 16; }
__device__ __forceinline__ int wide_place(int row, int piece) { return row * 256 + (piece ^ (row & 7)) * 16; }

// What a thread has read of a 4-bit W and not yet decoded: 16 codes in a row.
struct Codes {
  uint32_t word[2];
  int64_t element;  // negative: past the edge
};

template <class T, int tile_rows, bool straight, bool four_bit>
__device__ __forceinline__ void multiply_tile(Linear& args, Tile& rows, int64_t column, bool aligned_X,
                                              [[maybe_unused]] bool aligned_W, char* shared,
                                              [[maybe_unused]] const float* codebook) {
  constexpr int warps_down = tile_rows == 128 ? 2 : 1, warps_across = 8 / warps_down;
  constexpr int warp_rows = tile_rows / warps_down, warp_columns = columns / warps_across;
  constexpr int row_fragments = warp_rows / 16, column_fragments = warp_columns / 8;
  const Part part = part_of((args.Q + depth - 1) / depth, args, rows);
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, g = lane / 4, t = lane % 4;
  const int row_of_warp = warp / warps_across * warp_rows, column_of_warp = warp % warps_across * warp_columns;

  float sums[row_fragments][column_fragments][4] = {};

  LowRankTerm<tile_rows, columns, threads> low_rank(args, rows, column, shared);
#pragma unroll 1
  for (int tile = 0; tile < low_rank.tiles(); ++tile) {
    low_rank.fetch(tile);
#pragma unroll
    for (int i = 0; i < row_fragments; ++i) low_rank.add(tile, row_of_warp + 16 * i, column_of_warp, sums[i]);
  }
  __syncthreads();

  // ---- the base product
  const T* X = static_cast<const T*>(args.X);
  const T* W = static_cast<const T*>(args.W.dense);
  const auto stage_of = [&](int64_t step) { return shared + step % stages * stage_bytes<tile_rows>; };
  const auto fetch_X = [&](int64_t step) {
#pragma unroll
    for (int i = threadIdx.x; i < tile_rows * 4; i += threads) {
      const int64_t row = rows.first + i / 4, q = step * depth + i % 4 * 8;
      const bool inside = row < rows.end && q < args.Q;
      fetch(stage_of(step) + narrow_place(i / 4, i % 4), X + (inside ? row * args.ldx + q : 0), inside ? args.Q - q : 0,
            aligned_X);
    }
  };
  const auto fetch_W = [&](int64_t step) {
    char* to = stage_of(step) + tile_rows * depth * 2;
#pragma unroll
    for (int i = threadIdx.x; i < columns * depth / 8; i += threads) {
      if constexpr (straight) {
        const int64_t p = column + i / 4, q = step * depth + i % 4 * 8;
        const bool inside = p < args.P && q < args.Q;
        fetch(to + narrow_place(i / 4, i % 4), W + (inside ? (rows.expert * args.P + p) * args.W.ld + q : 0),
              inside ? args.Q - q : 0, aligned_W);
      } else {
        const int64_t q = step * depth + i / 16, p = column + i % 16 * 8;
        const bool inside = p < args.P && q < args.Q;
        fetch(to + wide_place(i / 16, i % 16), W + (inside ? (rows.expert * args.Q + q) * args.W.ld + p : 0),
              inside ? args.P - p : 0, aligned_W);
      }
    }
  };
  const auto read_codes = [&](int64_t step) -> Codes {
    const int row = straight ? threadIdx.x / 2 : threadIdx.x / 8;
    const int along = straight ? threadIdx.x % 2 * 16 : threadIdx.x % 8 * 16;
    const int64_t p = column + (straight ? row : along), q = step * depth + (straight ? along : row);
    if (p >= args.P || q >= args.Q) return {{0, 0}, -1};
    const int64_t element =
        straight ? (rows.expert * args.P + p) * args.Q + q : (rows.expert * args.Q + q) * args.P + p;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(args.W.fourbit.packed + element / 2);
    return {{words[0], words[1]}, element};
  };
  const auto decode_codes = [&](int64_t step, const Codes& codes) {
    char* to = stage_of(step) + tile_rows * depth * 2;
    const float scale = codes.element < 0 ? 0.0f : absmax_of(args.W.fourbit, codes.element);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t pairs[4] = {};
      if (codes.element >= 0) decode_eight<T>(codes.word[i], scale, codebook, lane, pairs);
      const int place = straight ? narrow_place(threadIdx.x / 2, threadIdx.x % 2 * 2 + i)
                                 : wide_place(threadIdx.x / 8, threadIdx.x % 8 * 2 + i);
      *reinterpret_cast<uint4*>(to + place) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  };

  for (int64_t step = part.first; step < part.first + stages - 1; ++step) {
    if (step < part.end) {
      fetch_X(step);
      if constexpr (four_bit)
        decode_codes(step, read_codes(step));
      else
        fetch_W(step);
    }
    commit_copies();
  }
  for (int64_t step = part.first; step < part.end; ++step) {
    wait_for_copies<stages - 2>();
    __syncthreads();  // this step has arrived for all, and all are done with the one before
    const int64_t next = step + stages - 1;
    [[maybe_unused]] Codes codes;
    if (next < part.end) {
      fetch_X(next);
      if constexpr (four_bit)
        codes = read_codes(next);
      else
        fetch_W(next);
    }
    commit_copies();
    const char *of_X = stage_of(step), *of_W = of_X + tile_rows * depth * 2;
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[row_fragments][4], b[column_fragments / 2][4];
#pragma unroll
      for (int i = 0; i < row_fragments; ++i)
        load_matrices<false>(a[i], of_X + narrow_place(row_of_warp + 16 * i + lane % 16, k / 8 + lane / 16));
#pragma unroll
      for (int j = 0; j < column_fragments / 2; ++j) {
        const int first = column_of_warp + 16 * j;
        if constexpr (straight)
          load_matrices<false>(b[j], of_W + narrow_place(first + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
        else
          load_matrices<true>(b[j], of_W + wide_place(k + lane % 16, first / 8 + lane / 16));
      }
#pragma unroll
      for (int i = 0; i < row_fragments; ++i)
#pragma unroll
        for (int j = 0; j < column_fragments; ++j)
          multiply_16x8x16<T>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
    if constexpr (four_bit)
      if (next < part.end) decode_codes(next, codes);
  }
  wait_for_copies<0>();

#pragma unroll
  for (int i = 0; i < row_fragments; ++i)
    store_fragments<T>(args, rows, rows.first + row_of_warp + 16 * i + g, column + column_of_warp + 2 * t, sums[i]);
}

template <class T, int tile_rows, bool straight, bool four_bit>
__global__ void __launch_bounds__(threads, tile_rows == 128 ? 1 : 2)
    linear_kernel(Linear args, bool aligned_X, bool aligned_W) {
  char* shared = shared_memory<char>();
  float* codebook = reinterpret_cast<float*>(shared + stages * stage_bytes<tile_rows>);
  if constexpr (four_bit) fill_codebook(args.W.fourbit.type, codebook);
  for (uint32_t index = blockIdx.x;; index += gridDim.x) {
    Place place = place_of(args.rows, index, tile_rows, args.P, columns);
    if (place.rows.first >= place.rows.end) return;
    __syncthreads();  // the codebook is there, and nobody is still at the tile before
    multiply_tile<T, tile_rows, straight, four_bit>(args, place.rows, place.strip * columns, aligned_X, aligned_W,
                                                    shared, codebook);
  }
}

template <class T, int tile_rows, bool straight, bool four_bit>
void launch_tiled(const Linear& args, int64_t splits, const Stream& stream) {
  static_assert(LowRankTerm<tile_rows, columns, threads>::bytes <= stages * stage_bytes<tile_rows>);
  launch_tiles("linear", linear_kernel<T, tile_rows, straight, four_bit>, tile_rows, columns, splits, threads,
               stages * stage_bytes<tile_rows> + (four_bit ? codebook_bytes : 0), stream, args,
               in_16_bytes(args.X, args.ldx), in_16_bytes(args.W.dense, args.W.ld));
}

template <class T, int tile_rows>
void launch_tiled(const Linear& args, int64_t splits, const Stream& stream) {
  const bool four_bit = args.W.fourbit.blocksize != 0;
  if (args.reduction_contiguous)
    four_bit ? launch_tiled<T, tile_rows, true, true>(args, splits, stream)
             : launch_tiled<T, tile_rows, true, false>(args, splits, stream);
  else
    four_bit ? launch_tiled<T, tile_rows, false, true>(args, splits, stream)
             : launch_tiled<T, tile_rows, false, false>(args, splits, stream);
}

}  // namespace

void linear_tiled(const Linear& args, int tile_rows, int64_t splits, const Stream& stream) {
  if (args.compute == DType::bf16)
    tile_rows == 128 ? launch_tiled<bf16, 128>(args, splits, stream) : launch_tiled<bf16, 32>(args, splits, stream);
  else
    tile_rows == 128 ? launch_tiled<f16, 128>(args, splits, stream) : launch_tiled<f16, 32>(args, splits, stream);
}

}  // namespace peftfast::cuda
