// The steps that a linear layer with adapters is made of, each one or two launches for all groups of rows:
//
//   pack     the factors of all adapters side by side in fp32: A [slots, R, K] and B^T [slots, R, N]
//   down     U = scale drop(X) A^T                           rows of X against few vectors
//   linear   Y = X W^T + bias + drop'(U L)                   the base product, which starts from the low-rank term
//   outer    D = V^T drop(X)                                 gradients of the factors, summed over rows
//
// Letters: P columns of the result, Q the reduction. A step whose operands have 16 bits runs on tensor cores; fp32 and
// odd 4-bit shapes run the plain kernels. The low-rank part has fp32 factors and sums throughout.
#pragma once

#include "common.cuh"

namespace peftfast::cuda {

struct Down {
  Rows rows;
  DType dtype;    // of X
  const void* X;  // [M, Q]
  int64_t ldx, Q;
  const float* A;  // [slots, R, Q]
  int64_t R;
  Segments segments;
  bool dropout;  // else thresholds and keep_scale are not looked at
  float* U;      // [M, R], out; zeros where there is no slot
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
  int64_t R;
  Segments segments;
  bool dropout;  // of the low-rank term
  void* Y;       // [M, P], out; zeros in rows of no group
};

struct Outer {
  Rows rows;
  DType dtype;  // of X
  int64_t slots, R, P;
  const float* V;  // [M, R]
  const void* X;   // [M, P]
  int64_t ldx;
  Segments segments;
  bool dropout;
  float* D;  // [splits, slots, R, P], out
  int64_t splits, rows_per_split;
};

// One factor to or from fp32: value [slot][j][p] at slot * strides[0] + j * strides[1] + p * strides[2] of `data`.
struct Factor {
  void* data;
  DType dtype;
  int64_t rank, strides[3];
};
struct Factors {
  int count;
  Factor list[most_adapters];
  int64_t slots, R, P;  // all of them side by side: [slots, R, P]
};

void pack(const Factors& factors, float* out, const Stream& stream);
// Sums the splits of D in their order and writes each factor's gradient; those without data are left out.
void unpack(const Factors& factors, const float* D, int64_t splits, const Stream& stream);
void down(const Down& args, const Stream& stream);
void linear(const Linear& args, const Stream& stream);
void outer(Outer args, const Factors& gradients, const Stream& stream);
void decode(const FourBitMatrix& W, int64_t count, DType dtype, void* out, const Stream& stream);

// The kernels that `linear` picks from, by what the operands are.
void linear_plain(const Linear& args, const Stream& stream);                 // anything
void linear_few(const Linear& args, int tile_rows, const Stream& stream);    // 16 bits, reduction contiguous
void linear_tiled(const Linear& args, int tile_rows, const Stream& stream);  // 16 bits

// Where a 16-bit row can be read 16 bytes at a time.
inline bool in_16_bytes(const void* data, int64_t ld) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld % 8 == 0;
}

// Which kernel a base product runs on.
struct Choice {
  enum Kernel { plain, few, tiled } kernel;
  int tile_rows;      // of few (16 or 64) and tiled (32 or 128)
  bool decode_first;  // a 4-bit W goes through a workspace rather than being decoded in the product
};
Choice pick(const Linear& args);

}  // namespace peftfast::cuda
