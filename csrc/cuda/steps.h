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
void decode(const FourBitMatrix& W, int64_t count, DType dtype, void* out, const Stream& stream);

// The kernels that `linear` picks from, by what the operands are.
void linear_plain(const Linear& args, const Stream& stream);                 // anything
void linear_few(const Linear& args, int tile_rows, const Stream& stream);    // 16 bits, reduction contiguous
void linear_tiled(const Linear& args, int tile_rows, const Stream& stream);  // 16 bits
void linear_hopper(const Linear& args, const Stream& stream);                // 16 bits, as pick() says

// Whether the GPU in use has what linear_hopper takes, and it is asked for: PEFTFAST_CUDA_WGMMA=1.
bool hopper_in_use();

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
Choice pick(const Linear& args, bool hopper);

}  // namespace peftfast::cuda
