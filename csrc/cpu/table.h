// What an instruction set provides: one function per micro-kernel and dtype. The functions in csrc/cpu/*.cpp split
// the work over threads and call these on their part; the algorithms behind them are the templates of generic/.
#pragma once

#include <cstdint>

#include "../attention.h"
#include "../fourbit_format.h"
#include "../kernels.h"

namespace peftfast::cpu {

// Attention goes over so many keys at a time; a multiple of every register tile's rows.
constexpr int64_t keys_at_once = 96;

// The columns of a packed operand: with a full reduction block they stay in a core's L2 cache.
constexpr int64_t panel_columns = 64;

// Rows of X that matrix tiles take at a time.
constexpr int64_t rows_in_tiles = 32;

// A sum of so many products or fewer over a 4-bit weight is formed of its elements, never of codes and scales apart.
constexpr int64_t longest_short_sum = 128;

// Whether a product runs in matrix tiles, and what W is there: packed, as the right operand of X, or, in place, the
// left operand of X transposed.
enum class MatrixTiles { none, packed, in_place };

// A run of ranks that share a dropout mask: one adapter, or all of them when none drops.
struct Segment {
  int64_t begin, end;  // ranks
  uint32_t threshold;  // a random word below it drops the element; 0: no dropout
  uint32_t adapter;    // its place in the generator's counter
  float keep_scale;    // 1 / (1 - dropout)
};

struct Dropout {
  const Segment* segments;
  int segment_count;
  uint32_t key_low, key_high;
};

// lines[j][n] = B[n, j] in fp32, for n in [begin, end): makes the ranks the rows.
struct TransposeArgs {
  const void* B;  // [N, columns]
  int64_t ld, columns;
  float* const* lines;  // [columns], of N floats each; null: not wanted
};

// What a LayerNorm does to rows, but for its weight and bias: X becomes rstd[m] * (X[m, p] - mean[m]).
struct RowNorm {
  const float *mean, *rstd;  // [M]; null: nothing is done
};

// U = scale * dropout(norm(X)) A^T, for rows [begin, end).
struct DownArgs {
  const void* X;  // [M, Q]
  int64_t ldx;
  int64_t Q;
  const float* A;      // [R, Q]
  const float* scale;  // [R]
  int64_t R;
  Dropout dropout;
  float* U;           // [M, R]
  int64_t first_row;  // of X, in the matrix that the dropout generator counts
  RowNorm norm;
};

// Adds scale[m] * (X[m, p] - center[m]) to a result [M, P] of the same dtype.
struct Addend {
  const void* X;  // null: nothing is added
  int64_t ld;
  const float *scale, *center;  // [M]; null: X is added as it is
};

// Y = X W + bias + dropout(U L) + addends, for rows [row_begin, row_end) and up to `columns` columns from `column` on,
// both multiples of panel_columns.
struct LinearArgs {
  int64_t M, P, Q;
  const void* X;  // [M, Q], in the form that its product wants
  int64_t ldx;
  const void* W;  // element (q, p) at W[p * ldw + q] when reduction_contiguous, else W[q * ldw + p]
  int64_t ldw;
  bool reduction_contiguous;
  const FourBitMatrix* fourbit;  // stands for W when not null; its rows follow one another: ldw does not count
  int64_t fourbit_row;           // of that matrix, the first of W
  const float* bias;             // [P] or null
  const float* U;                // [M, R]
  const float* L;                // [R, P]
  int64_t R;
  Dropout dropout;    // of U L; its masks are those of an [M, P] matrix
  void* Y;            // [M, P]
  DType out;          // of Y; X may be in another one
  int64_t first_row;  // of X, in the matrix that the dropout generator counts
  bool along_rows;    // few rows, reduction contiguous: W is read as it is
  MatrixTiles tiles;  // of W
  bool bf16_codes;    // and the values that 4-bit codes stand for may be rounded to bf16
  Addend addends[2];  // not beside a 4-bit W
};

// D = V^T dropout(norm(X)), for `columns` columns from `column` on, a multiple of panel_columns. Each segment writes to
// its own gradient.
struct OuterArgs {
  const float* V;  // [M, R]
  int64_t R;
  const void* X;  // [M, P]
  int64_t ldx;
  int64_t M, P;
  Dropout dropout;
  float* D;           // [R, P]; null: wherever whoever asks for columns wants them
  int64_t first_row;  // of X, in the matrix that the dropout generator counts
  bool accumulate;    // adds to D
  RowNorm norm;
};

// Mean and 1 / sqrt(variance + eps) of each row of X.
struct MomentsArgs {
  const void* X;  // [M, Q]
  int64_t ldx, Q;
  float eps;
  float *mean, *rstd;  // [M], out
};

// The bottleneck of an adapter. Forward: Z += bias, A = scale * dropout(activation(Z)).
// Backward: A = [dropout(activation(Z)), 1], dot[m] = A[m] . V[m] without the 1, V *= scale * dropout' *
// activation'(Z).
struct BottleneckArgs {
  Activation activation;
  int64_t D;
  const float* bias;  // [D] or null
  Dropout dropout;    // of one segment
  float scale;
  float* Z;    // [M, D]
  float* A;    // [M, D], out; backward: [M, D + 1]
  float* V;    // [M, D], backward only: dL/dA
  float* dot;  // [M], out, backward only
};

// pairs[i / 2] = (X[i], X[i + 1]) for even rows i: elements of two rows side by side, zeros beside a last odd one.
struct PairRowsArgs {
  const void* X;  // [rows, D], bf16
  int64_t ld, D;
  void* pairs;  // [rows, rounded up to an even number, D]
};

// What of attention's backward is made together: the gradients of some keys, which take all blocks of queries that meet
// them; of some blocks, which take all keys; or of a whole head's keys and of all its queries, which share the scores.
struct AttentionPart {
  int64_t batch, kv_head;
  int64_t key_begin, key_end;      // multiples of keys_at_once, but for the last
  int64_t block_begin, block_end;  // of 64 queries
  bool of_keys, of_queries;
};

struct Table {
  bool bf16_dot;  // multiplies pairs of bf16 in one instruction
  void (*transpose[dtype_count])(const TransposeArgs& args, int64_t begin, int64_t end);
  void (*down[dtype_count])(const DownArgs& args, int64_t row_begin, int64_t row_end);
  int64_t few_rows[dtype_count];          // with at most so many, packing a weight costs more than it saves
  int64_t few_rows_fourbit[dtype_count];  // the same of a 4-bit one, by what the product is asked for in
  int64_t packed_columns[dtype_count];    // of a weight, as many as `linear` packs at a time
  void (*linear[dtype_count])(const LinearArgs& args, int64_t column, int64_t columns, int64_t row_begin,
                              int64_t row_end);
  // D [R, columns] of these columns, in rows `ldd` apart.
  void (*outer[dtype_count])(const OuterArgs& args, int64_t column, int64_t columns, float* D, int64_t ldd);
  void (*convert[dtype_count])(const void* x, int64_t count, DType to, void* out);  // to f32 or bf16
  void (*combine[dtype_count])(const CombineArgs& args, int64_t token_begin, int64_t token_end);
  void (*combine_backward[dtype_count])(const CombineBackwardArgs& args, int64_t token_begin, int64_t token_end);
  void (*swiglu[dtype_count])(const SwigluArgs& args, int64_t row_begin, int64_t row_end);
  void (*swiglu_backward[dtype_count])(const SwigluArgs& args, int64_t row_begin, int64_t row_end);
  void (*rms_norm[dtype_count])(const RmsNormArgs& args, int64_t row_begin, int64_t row_end);
  // Adds what these rows have of grad_weight to sums [H], if that is not null.
  void (*rms_norm_backward[dtype_count])(const RmsNormArgs& args, int64_t row_begin, int64_t row_end, float* sums);
  void (*cross_entropy[dtype_count])(const CrossEntropyArgs& args, int64_t row_begin, int64_t row_end);
  void (*moments[dtype_count])(const MomentsArgs& args, int64_t row_begin, int64_t row_end);
  void (*bottleneck)(const BottleneckArgs& args, int64_t row_begin, int64_t row_end);
  void (*bottleneck_backward)(const BottleneckArgs& args, int64_t row_begin, int64_t row_end);
  void (*pair_rows)(const PairRowsArgs& args, int64_t begin, int64_t end);  // begin is even
  // Of blocks of 64 queries, [batch, heads, ceil(T / 64)]. For bf16 they take V's rows in pairs, [batch, kv_heads,
  // ...].
  void (*attention[dtype_count])(const AttentionArgs& args, const void* pairs, int64_t begin, int64_t end);
  void (*attention_backward[dtype_count])(const AttentionBackwardArgs& args, const AttentionPart& part);
  // Whether few rows of X must be arranged before they meet a 4-bit W with Q columns, and the arranging of one, the
  // `row`th of `rows` that share `out`: each [Q] becomes arranged_size(Q) floats, or what takes no more.
  int64_t (*arranged_size)(int64_t Q);  // 0: they are taken as they are
  void (*arrange)(const float* x, int64_t Q, bool bf16_codes, int64_t row, int64_t rows, void* out);
  // How a product in bf16 may run, and, for one in place, the arranging of a row of X, the `row`th of the rows_in_tiles
  // that start at out, of Q elements each, rounded up to a multiple of 32.
  MatrixTiles (*matrix_tiles)(const LinearArgs& args);
  void (*arrange_in_tiles)(const void* x, int64_t Q, int64_t row, void* out);  // bf16
  void (*fourbit_quantize[dtype_count])(const FourBitQuantizeArgs& args, int64_t block_begin, int64_t block_end);
  void (*fourbit_dequantize[dtype_count])(const FourBitDequantizeArgs& args, int64_t begin, int64_t end);
  double (*flops_of_loop[dtype_count])(int64_t iterations);  // runs the loop and returns the FLOP it did
};

extern const Table scalar_table, avx2_table, avx512_table, avx512_bf16_table, amx_table;

const Table& table();  // of the instruction set in use

}  // namespace peftfast::cpu
