// The contract between the operators (csrc/torch) and the kernels (csrc/cpu): plain structs, no torch.
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
constexpr int dtype_count = 3;

// Storage types of the 16-bit formats. Arithmetic happens in fp32 only.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// How a kernel reaches the threads of its host: run(begin, end, body, context) splits [begin, end) over at
// most `count` threads and calls body(first, last, context) on each part.
struct Threads {
  int count;
  void (*run)(int64_t begin, int64_t end, void (*body)(int64_t, int64_t, void*), void* context);
};

// One adapter on a linear layer: Y += scaling * dropout(X) A^T B^T.
struct LoraAdapter {
  const void* A;  // [rank, K]
  const void* B;  // [N, rank]
  DType dtype;    // of A, B and their gradients
  int64_t rank;
  float scaling;
  float dropout;  // probability in [0, 1)
  void* grad_A;   // [rank, K], out; null: not wanted (backward only)
  void* grad_B;   // [N, rank], out; null: not wanted (backward only)
};

// A matrix in bitsandbytes' 4-bit format, whose rules are in fourbit_format.h. Element i of the flat matrix is
// codebook[code i] * absmax[i / blocksize].
struct FourBitMatrix {
  FourBitType type;
  const uint8_t* packed;        // [(elements + 1) / 2]
  int64_t blocksize;            // 0: there is no such matrix. A pointer may be null where there are no elements
  const float* absmax;          // [blocks]; unless nested: nested_code[codes[b]] * nested_absmax[b / nested_blocksize]
                                // + *nested_offset
  const uint8_t* absmax_codes;  // [blocks]
  const float* nested_absmax;   // [ceil(blocks / nested_blocksize)]
  const float* nested_code;     // [256]
  const float* nested_offset;
  int64_t nested_blocksize;  // 0: not nested
};

// The frozen weight of a linear layer, in one of two forms.
struct BaseWeight {
  const void* dense;  // [N, K], or [K, N] when transposed, in the dtype of X
  int64_t ld;
  bool transposed;
  FourBitMatrix fourbit;  // [N, K], or none
  DType compute;  // of a base product with a 4-bit weight: f32, whatever the dtype of X; or 16 bits, to which W is
                  // rounded and, when it is f32, X (unless the instruction set gains nothing by it)
};

// Y = X W^T + bias + sum over adapters of scaling * dropout(X) A^T B^T
struct LoraLinearArgs {
  int64_t M, N, K;
  DType dtype;    // of X and Y
  const void* X;  // [M, K]
  int64_t ldx;
  BaseWeight W;
  const float* bias;  // [N] or null
  const LoraAdapter* adapters;
  int adapter_count;
  const int64_t* seed;  // of the dropout generator; null when no adapter drops
  float* U;             // [M, R], out: scaling * dropout(X) A^T, what backward needs of the forward
  void* Y;              // [M, N], out
};

// From G = dL/dY:  V = scaling * G B,  dX = G W + dropout'(V A),  grad_A = V^T dropout(X),  grad_B = G^T U
struct LoraLinearBackwardArgs {
  int64_t M, N, K;
  DType dtype;    // of G, X and dX
  const void* G;  // [M, N]
  int64_t ldg;
  const void* X;  // [M, K]; may be null when no grad_A is wanted
  int64_t ldx;
  BaseWeight W;
  const LoraAdapter* adapters;
  int adapter_count;
  const int64_t* seed;
  const float* U;  // [M, R], from the forward; may be null when no grad_B is wanted
  void* dX;        // [M, K], out; null: not wanted
};

// W -> packed and absmax, plain. absmax comes out not finite where W is not.
struct FourBitQuantizeArgs {
  int64_t count;
  DType dtype;
  const void* W;  // [count]
  FourBitType type;
  int64_t blocksize;
  uint8_t* packed;  // [(count + 1) / 2], out
  float* absmax;    // [ceil(count / blocksize)], out
};

// The second quantization: absmax -> 8-bit codes of absmax - offset.
struct AbsmaxQuantizeArgs {
  int64_t blocks;
  const float* absmax;  // [blocks]
  const float* offset;  // one
  const float* code;    // [256], ascending
  int64_t blocksize;
  uint8_t* codes;        // [blocks], out
  float* nested_absmax;  // [ceil(blocks / blocksize)], out
};

struct FourBitDequantizeArgs {
  int64_t count;
  FourBitMatrix W;
  DType dtype;
  void* out;  // [count], out
};

namespace cpu {

void fourbit_quantize(const FourBitQuantizeArgs& args, const Threads& threads);
void fourbit_quantize_absmax(const AbsmaxQuantizeArgs& args, const Threads& threads);
void fourbit_dequantize(const FourBitDequantizeArgs& args, const Threads& threads);

void lora_linear(const LoraLinearArgs& args, const Threads& threads);
void lora_linear_backward(const LoraLinearBackwardArgs& args, const Threads& threads);

// The instruction sets compiled in, best first, those of them that this machine can run, and the one in use.
// PEFTFAST_CPU_ISA forces one; a name that is unknown or that the machine cannot run throws
// std::invalid_argument.
struct IsaInfo {
  const char* name;
  bool supported;
};
int isa_count();
IsaInfo isa_info(int index);
const char* isa_in_use();

// FLOP per second of back-to-back multiply-adds, of the instruction that the kernels use for `dtype`, on
// `threads.count` threads: the ceiling that a benchmark compares with.
double machine_peak(DType dtype, const Threads& threads);

}  // namespace cpu
}  // namespace peftfast
