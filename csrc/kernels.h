// The contract between the operators (csrc/torch) and the kernels (csrc/cpu, csrc/cuda): plain structs, no torch. Those
// of the kernels that make and read the 4-bit format stand beside it, in fourbit_format.h, attention's in attention.h.
//
// Letters, as everywhere in the project:
//   M rows of X    K input features    N output features    R the ranks of all adapters, side by side
// A matrix argument is a pointer to its first element; rows are contiguous unless a leading dimension
// ("ld", in elements) stands beside it.
#pragma once

#include <cstdint>

namespace peftfast {

enum class DType : uint8_t { f32, bf16, f16 };
enum class FourBitType : uint8_t { nf4, fp4 };
enum class Activation : uint8_t { identity, relu, gelu, gelu_tanh, silu, tanh };
constexpr int dtype_count = 3;
struct Threads;  // these two: hosts.h
struct Stream;

// One adapter on a linear layer, Y += scaling * dropout(X) A^T B^T, or as many alike as there are slots.
struct LoraAdapter {
  int64_t slots, rank;
  DType dtype;        // of A, B and their gradients
  const void *A, *B;  // [slots, rank, K]; [slots, N, rank] with strides: a stack is stored in several orders
  int64_t B_strides[3];
  float scaling, dropout;     // a probability in [0, 1)
  void *grad_A, *grad_B;      // like A and B, out; null: not wanted (backward only)
  int64_t grad_B_strides[3];  // contiguous, or those of a B whose slots lie beside each other
};

// A matrix in the format of fourbit_format.h. Element i is codebook[code i] * absmax[i / blocksize], where a nested
// absmax[b] is nested_code[absmax_codes[b]] * nested_absmax[b / nested_blocksize] + *nested_offset.
struct FourBitMatrix {
  FourBitType type;
  const uint8_t* packed;  // [(elements + 1) / 2]
  int64_t blocksize, nested_blocksize;
  const float* absmax;                       // [blocks]; not read when nested_blocksize is not 0
  const uint8_t* absmax_codes;               // [blocks]
  const float* nested_absmax;                // [ceil(blocks / nested_blocksize)]
  const float *nested_code, *nested_offset;  // [256]; one
};

// The frozen weights of a linear layer, one after another, in one of two forms. Without either they count as zero.
struct BaseWeight {
  const void* dense;  // [experts, N, K] in the dtype of X; null: in 4 bits
  int64_t ld;
  bool transposed;  // stored as [experts, K, N]
  FourBitMatrix fourbit;
  DType compute;  // of a base product with a 4-bit weight: f32, whatever the dtype of X; or 16 bits, to which W is
                  // rounded and, when it is f32, X (unless the instruction set gains nothing by it)
};

// Rows of X in groups that follow one another. Group g is the rows [offsets[g], offsets[g + 1]); it meets the weight
// experts[g] and slots[g] of each adapter, or none when that is negative.
struct Groups {
  int64_t count;
  const int64_t* offsets;          // [count + 1], ascending; null: all rows are one group, of expert 0 and slot 0
  const int64_t *experts, *slots;  // [count]
};

// Y = X W^T + bias + sum over adapters of scaling * dropout(X) A^T B^T, for each group of rows. Rows of no group come
// out as zeros, and so do gradients of slots of no group.
struct LoraLinearArgs {
  int64_t M, N, K;
  DType dtype;  // of X and Y
  Groups groups;
  const void* X;  // [M, K]
  int64_t ldx;
  BaseWeight W;
  const float* bias;            // [experts, N] or null
  const LoraAdapter* adapters;  // all of the same number of slots
  int adapter_count;
  const int64_t* seed;  // of the dropout generator; null when no adapter drops
  float* U;             // [M, R], out: scaling * dropout(X) A^T, what backward needs of the forward
  void* Y;              // [M, N], out
};

// From G = dL/dY:  V = scaling * G B,  dX = G W + dropout'(V A),  grad_A = V^T dropout(X),  grad_B = G^T U
struct LoraLinearBackwardArgs {
  LoraLinearArgs of;  // X may be null when no grad_A is wanted, U when no grad_B is; Y and bias are not read
  const void* G;      // [M, N]
  int64_t ldg;
  void* dX;  // [M, K], out; null: not wanted
};

// Y[t] = sum over k < top_k of weights[t, k] * X[places[t, k]]: what the experts of a token say, put together.
struct CombineArgs {
  int64_t tokens, top_k, H;
  DType dtype;            // of X and Y
  const void* X;          // [tokens * top_k, H]
  const float* weights;   // [tokens, top_k]; null: all 1
  const int64_t* places;  // [tokens, top_k], a permutation of the rows of X
  void* Y;                // [tokens, H], out
};

// From G = dL/dY:  dX[places[t, k]] = weights[t, k] * G[t],  grad_weights[t, k] = X[places[t, k]] . G[t]
struct CombineBackwardArgs {
  CombineArgs of;       // X may be null when grad_weights is; Y is not read
  const void* G;        // [tokens, H]
  void* dX;             // [tokens * top_k, H], out
  float* grad_weights;  // [tokens, top_k], out; null: not wanted
};

// Y = residual + scaling * (dropout(activation(Z)) up^T + up_bias),  Z = norm(X) down^T + down_bias
struct BottleneckAdapterArgs {
  int64_t M, H, D;
  DType dtype, parameters;   // of X, residual and Y; of down and up
  const void *X, *residual;  // [M, H]; no residual: null
  int64_t ldx, ld_residual;
  const void *down, *up;                 // [D, H]; [H, D]
  const float *down_bias, *up_bias;      // [D], [H]; each may be null
  const float *norm_weight, *norm_bias;  // [H], of a LayerNorm; no norm: null
  float norm_eps, scaling, dropout;
  Activation activation;
  const int64_t* seed;  // null when nothing drops
  float* Z;             // [M, D], out
  void* Y;              // [M, H], out
};

// From G = dL/dY. Gradients are out, of the shapes of what they belong to; null: not wanted.
struct BottleneckAdapterBackwardArgs {
  BottleneckAdapterArgs of;  // Z is read, Y and residual are not
  const void* G;             // [M, H]
  int64_t ldg;
  bool residual_is_X;              // its gradient goes into dX too
  void *dX, *grad_down, *grad_up;  // the latter in the dtype of the parameters
  float *grad_down_bias, *grad_up_bias, *grad_norm_weight, *grad_norm_bias, *grad_scaling;
};

// Y = weights * (activation(gate) * up), a weight to a row. Backward, from G = dL/dY: grad_gate = weights * (G * up *
// activation'(gate)), grad_up = weights * (G * activation(gate)), grad_weights[m] = G[m] . (activation(gate) * up)[m].
struct SwigluArgs {
  int64_t M, I;
  DType dtype;
  Activation activation;
  const void *gate, *up, *G;  // [M, I]; G: backward only
  int64_t ld_gate, ld_up, ldg;
  void *Y, *grad_gate, *grad_up;  // [M, I], out; a gradient that is null: not wanted
  int64_t ld_grad;                // of both
  const float* weights;           // [M]; null: all 1
  float* grad_weights;            // [M], out; null: not wanted
};

// Y = rstd X (offset + weight) with rstd = 1 / sqrt(mean of the squares of a row + eps). Backward is from G = dL/dY.
struct RmsNormArgs {
  int64_t M, H;
  DType dtype, out;   // of X and dX; of Y and G: the same, or f32
  const void *X, *G;  // [M, H]; G: backward only
  int64_t ldx, ldg;
  const float* weight;  // [H]; null: offset + weight is 1
  float eps, offset;
  bool cast_first;            // rstd X is rounded to the dtype of X
  float *rstd, *grad_weight;  // [M], out of the forward; [H], out; null: not wanted, as dX
  void *Y, *dX;               // [M, H], out
};

// The cross-entropy of each row of logits with its target, and in the place of the logits, where wanted, the gradient
// of that times the row's weight. First of all they become cap * tanh(scale * logits / cap), or scale * logits.
struct CrossEntropyArgs {
  int64_t M, V;
  DType dtype;   // of the logits
  void* logits;  // [M, V], in and out
  int64_t ld;
  const int64_t* targets;  // [M]; with one that is no column the loss is NaN
  const float* weights;    // [M], or one for all
  bool weight_per_row, want_gradient;
  float scale, cap;  // no cap: 0
  float* losses;     // [M], out
};

#define PEFTFAST_KERNEL(name, Args)                    \
  namespace cpu {                                      \
  void name(const Args& args, const Threads& threads); \
  }                                                    \
  namespace cuda {                                     \
  void name(const Args& args, const Stream& stream);   \
  }
PEFTFAST_KERNEL(combine, CombineArgs)
PEFTFAST_KERNEL(combine_backward, CombineBackwardArgs)
PEFTFAST_KERNEL(lora_linear, LoraLinearArgs)
PEFTFAST_KERNEL(lora_linear_backward, LoraLinearBackwardArgs)
PEFTFAST_KERNEL(bottleneck_adapter, BottleneckAdapterArgs)  // cpu:: only, so far; so its backward
PEFTFAST_KERNEL(bottleneck_adapter_backward, BottleneckAdapterBackwardArgs)
PEFTFAST_KERNEL(swiglu, SwigluArgs)
PEFTFAST_KERNEL(swiglu_backward, SwigluArgs)
PEFTFAST_KERNEL(rms_norm, RmsNormArgs)
PEFTFAST_KERNEL(rms_norm_backward, RmsNormArgs)
PEFTFAST_KERNEL(cross_entropy, CrossEntropyArgs)
}  // namespace peftfast
