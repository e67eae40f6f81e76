// The steps that a linear layer with adapters is made of, each one or two launches for all groups of rows:
//
//   pack     the factors of all adapters side by side in fp32: A [slots, R, K] and B^T [slots, R, N]
//   down     U = scale drop(X) A^T                           rows of X against few vectors
//   linear   Y = X W^T + bias + drop'(U L)                   the base product, which starts from the low-rank term
//   outer    D = V^T drop(X)                                 gradients of the factors, summed over rows
//
// Where backward wants a down and an outer of the same X, which is its G, down_and_outer reads that once for both.
//
// Letters: P columns of the result, Q the reduction. A step whose operands have 16 bits runs on tensor cores; fp32 and
// odd 4-bit shapes run the plain kernels. The low-rank part has fp32 factors and sums throughout.
#pragma once

#include <vector>

#include "common.cuh"

namespace peftfast::cuda {

// X as the low-rank steps read it.
struct Input {
  Rows rows;
  DType dtype;
  const void* X;  // [M, columns]
  int64_t ld, columns;
  Ranks ranks;
  bool dropout;  // of X; else thresholds and keep_scale are not looked at
};

struct Down {
  Input in;
  const float* A;  // [slots, R, columns]
  float* U;        // [M, R], out; zeros where there is no slot
};

struct Outer {
  Input in;
  const float* V;  // [M, R]
  int64_t slots;
  float* D;  // [splits, slots, R, columns], out
  int64_t splits, rows_per_split;
};

struct Linear {
  Rows rows;
  int64_t P, Q;
  DType dtype, compute;  // of X and Y; of the product
  const void* X;         // [M, Q]
  int64_t ldx;
  BaseWeight W;               // experts one after another
  bool reduction_contiguous;  // W is stored [P, Q], else [Q, P]
  const float* bias;          // [experts, P] or null
  const float *U, *L;         // [M, R]; [slots, R, P]
  Ranks ranks;
  bool dropout;  // of the low-rank term
  void* Y;       // [M, P], out; zeros in rows of no group
};

// A down and an outer in one pass: each block sums what it can, and what several blocks sum lies side by side.
struct DownAndOuter {
  Input in;        // 16 bits, without groups and dropout; of one slot
  const float* A;  // [R, columns]
  float* U;        // [column_splits, M, R], out: not yet scaled
  const float* V;  // [M, R]
  float* D;        // [row splits, R, columns], out
  int64_t tiles_per_split, rows_per_split;
};

// One adapter's factor, or the gradient of it: value [slot][j][p] at slot * strides[0] + j * strides[1] + p *
// strides[2].
struct Factor {
  void* data;
  DType dtype;
  int64_t strides[3];
  RankTile ranks;  // its own, as if they were one tile
  int first_tile;  // of its ranks, among all
};
// Of all adapters, [slots, R, P] side by side.
struct Factors {
  std::vector<Factor> list;
  int64_t slots, R, P;
};

// To fp32; and the table of the ranks, unless it is null.
void pack(const Factors& factors, float* out, RankTile* tiles, const Stream& stream);
void down(const Down& args, const Stream& stream);
void linear(const Linear& args, const Stream& stream);
// Writes D, summed over rows, to the gradients; those without data are left out.
void outer(const Input& in, const float* V, const Factors& gradients, const Stream& stream);
void down_and_outer(const Down& args, const float* V, const Factors& gradients, const Stream& stream);
void decode(const FourBitMatrix& W, int64_t count, DType dtype, void* out, const Stream& stream);

// The kernels that `linear` picks from, by what the operands are. Where blocks part the reduction, Y is [splits, M, P]
// in fp32, of which the first has the low-rank term and the bias.
void linear_plain(const Linear& args, const Stream& stream);  // anything
// 16 bits, reduction contiguous.
void linear_few(const Linear& args, int tile_rows, int64_t splits, const Stream& stream);
void linear_tiled(const Linear& args, int tile_rows, int64_t splits, const Stream& stream);  // 16 bits
void linear_hopper(const Linear& args, const Stream& stream);                                // 16 bits, as pick() says
// What their blocks compute, and take of the reduction at a time.
constexpr int few_columns = 32, few_depth = 1024, tiled_columns = 128, tiled_depth = 32;

// Whether the GPU in use has what linear_hopper takes, and it is asked for: PEFTFAST_CUDA_WGMMA=1.
bool hopper_in_use();

// When a 4-bit W goes through a workspace: from a number of rows on, or as PEFTFAST_CUDA_DECODE says, `first` (wherever
// it fits) or `within` the product (wherever that can be), so that the two can be timed.
enum class Decoding { by_rows, first, within };
Decoding decoding_in_use();

// How many blocks part a reduction of so many pieces: where there would be fewer blocks than half the multiprocessors,
// so many that all have one. Otherwise it would not pay to add up what they write.
constexpr int64_t splits_for(int64_t blocks, int64_t pieces, int multiprocessors) {
  const int64_t wanted = multiprocessors / blocks, splits = wanted < pieces ? wanted : pieces;
  return splits < 2 ? 1 : splits;
}

// How many blocks part the columns of X and its rows in one pass, and whether that is better than two.
struct OnePass {
  int64_t column_splits, row_splits;
  bool pays;
};
constexpr int pass_columns = 256, pass_rows = 16;  // at a time
constexpr OnePass one_pass(int64_t M, int64_t columns, int64_t R, int64_t rank_tiles, int multiprocessors) {
  // Two blocks for every multiprocessor, such that the sums of either kind take about as much memory.
  const int64_t most_across = ceil_div(columns, pass_columns), most_along = ceil_div(M, 4 * pass_rows);
  int64_t across = 1, along = 1;
  while (across * along * rank_tiles < 2 * multiprocessors && (across < most_across || along < most_along))
    (along == most_along || (across < most_across && across * M < along * columns)) ? ++across : ++along;
  // What is written of sums and read again must be less than X. The first part of D is free: two passes write it, too.
  const int64_t bytes = (across * M + (along - 1) * columns) * R * 8;
  return {across, along, bytes < 2 * M * columns};
}

// Where a 16-bit row can be read 16 bytes at a time.
inline bool in_16_bytes(const void* data, int64_t ld) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld % 8 == 0;
}

// Which kernel a base product runs on.
struct Choice {
  enum Kernel { plain, few, tiled, hopper } kernel;
  int tile_rows;      // of few (16 or 64), tiled (32 or 128) and hopper (256)
  bool decode_first;  // a 4-bit W goes through a workspace rather than being decoded in the product
};
Choice pick(const Linear& args, bool hopper, Decoding decoding = Decoding::by_rows);

// How many blocks part the reduction of a base product. Groups of rows make blocks enough.
constexpr int64_t splits_of(const Linear& args, const Choice& choice, int multiprocessors) {
  const bool few = choice.kernel == Choice::few;
  if ((!few && choice.kernel != Choice::tiled) || args.rows.groups.offsets) return 1;
  const int64_t blocks = args.rows.most_tiles(choice.tile_rows) * ceil_div(args.P, few ? few_columns : tiled_columns);
  return splits_for(blocks, args.Q / (few ? few_depth : 16 * tiled_depth), multiprocessors);
}

}  // namespace peftfast::cuda
