// peftfast::fourbit_*: from tensors to the kernels' arguments.
#include "fourbit.h"

#include <tuple>

#include "adapters.h"

namespace peftfast {
namespace {

FourBitType type_of(const std::string& quant_type) {
  STD_TORCH_CHECK(quant_type == "nf4" || quant_type == "fp4", "quant_type must be 'nf4' or 'fp4', got '", quant_type,
                  "'.");
  return quant_type == "nf4" ? FourBitType::nf4 : FourBitType::fp4;
}

bool is_power_of_two(int64_t x) { return x > 0 && (x & (x - 1)) == 0; }

void check_blocksize(int64_t blocksize) {
  STD_TORCH_CHECK(is_power_of_two(blocksize) && blocksize >= 32 && blocksize <= 4096,
                  "blocksize must be a power of two from 32 to 4096, got ", blocksize, ".");
}

const void* checked(const Tensor& t, const char* name, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == type, name, " must be contiguous ",
                  type == ScalarType::Byte ? "uint8" : "float32", " on the CPU.");
  STD_TORCH_CHECK(t.numel() == count, name, " has ", t.numel(), " elements, expected ", count, ".");
  return t.const_data_ptr();
}

// A 4-bit matrix of `count` elements; the tensors stay the caller's.
FourBitMatrix matrix_of(const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
                        const std::optional<Tensor>& nested_code, const std::optional<Tensor>& nested_offset,
                        int64_t blocksize, int64_t nested_blocksize, const std::string& quant_type, int64_t count) {
  check_blocksize(blocksize);
  FourBitMatrix W{};
  W.type = type_of(quant_type);
  W.packed = static_cast<const uint8_t*>(checked(packed, "packed", ScalarType::Byte, (count + 1) / 2));
  W.blocksize = blocksize;
  const int64_t blocks = (count + blocksize - 1) / blocksize;
  if (!nested_absmax.has_value()) {
    W.absmax = static_cast<const float*>(checked(absmax, "absmax", ScalarType::Float, blocks));
    return W;
  }
  STD_TORCH_CHECK(nested_code.has_value() && nested_offset.has_value(),
                  "nested_code and nested_offset must come with nested_absmax.");
  STD_TORCH_CHECK(is_power_of_two(nested_blocksize), "nested_blocksize must be a power of two, got ", nested_blocksize,
                  ".");
  W.absmax_codes = static_cast<const uint8_t*>(checked(absmax, "absmax", ScalarType::Byte, blocks));
  W.nested_absmax = static_cast<const float*>(
      checked(*nested_absmax, "nested_absmax", ScalarType::Float, (blocks + nested_blocksize - 1) / nested_blocksize));
  W.nested_code = static_cast<const float*>(checked(*nested_code, "nested_code", ScalarType::Float, 256));
  W.nested_offset = static_cast<const float*>(checked(*nested_offset, "nested_offset", ScalarType::Float, 1));
  W.nested_blocksize = nested_blocksize;
  return W;
}

ScalarType scalar_type_of(DType dtype) {
  return dtype == DType::f32 ? ScalarType::Float : dtype == DType::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
}

DType named_dtype(const std::string& name, const char* argument) {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    if (name == (dtype == DType::f32 ? "float32" : dtype == DType::bf16 ? "bfloat16" : "float16")) return dtype;
  STD_TORCH_CHECK(false, argument, " must be 'float32', 'bfloat16' or 'float16', got '", name, "'.");
}

// weight -> (packed [(count + 1) / 2, 1] uint8, absmax [blocks] fp32)
std::tuple<Tensor, Tensor> fourbit_quantize_cpu(const Tensor& weight, int64_t blocksize, std::string quant_type) {
  STD_TORCH_CHECK(weight.is_cpu(), "weight must be on the CPU.");
  check_blocksize(blocksize);
  const Tensor W = as_contiguous(weight);
  const int64_t count = W.numel();
  Tensor packed = empty({(count + 1) / 2, 1}, ScalarType::Byte);
  Tensor absmax = empty({(count + blocksize - 1) / blocksize}, ScalarType::Float);
  cpu::fourbit_quantize(
      {count, dtype_of(W, "weight"), W.const_data_ptr(), type_of(quant_type), blocksize,
       static_cast<uint8_t*>(packed.mutable_data_ptr()), static_cast<float*>(absmax.mutable_data_ptr())},
      torch_threads());
  return {packed, absmax};
}

// absmax [blocks] -> (codes [blocks] uint8, nested_absmax [ceil(blocks / blocksize)] fp32)
std::tuple<Tensor, Tensor> fourbit_quantize_absmax_cpu(const Tensor& absmax, const Tensor& offset, const Tensor& code,
                                                       int64_t blocksize) {
  STD_TORCH_CHECK(is_power_of_two(blocksize), "blocksize must be a power of two, got ", blocksize, ".");
  const int64_t blocks = absmax.numel();
  Tensor codes = empty({blocks}, ScalarType::Byte);
  Tensor nested = empty({(blocks + blocksize - 1) / blocksize}, ScalarType::Float);
  cpu::fourbit_quantize_absmax(
      {blocks, static_cast<const float*>(checked(absmax, "absmax", ScalarType::Float, blocks)),
       static_cast<const float*>(checked(offset, "offset", ScalarType::Float, 1)),
       static_cast<const float*>(checked(code, "code", ScalarType::Float, 256)), blocksize,
       static_cast<uint8_t*>(codes.mutable_data_ptr()), static_cast<float*>(nested.mutable_data_ptr())},
      torch_threads());
  return {codes, nested};
}

// -> [rows, columns] in `dtype`
Tensor fourbit_dequantize_cpu(const Tensor& packed, const Tensor& absmax, std::optional<Tensor> nested_absmax,
                              std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
                              int64_t nested_blocksize, std::string quant_type, int64_t rows, int64_t columns,
                              std::string dtype) {
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "the weight's shape is [", rows, ", ", columns, "].");
  const FourBitMatrix W = matrix_of(packed, absmax, nested_absmax, nested_code, nested_offset, blocksize,
                                    nested_blocksize, quant_type, rows * columns);
  const DType type = named_dtype(dtype, "dtype");
  Tensor out = empty({rows, columns}, scalar_type_of(type));
  cpu::fourbit_dequantize({rows * columns, W, type, out.mutable_data_ptr()}, torch_threads());
  return out;
}

// x [M, K], weight [N, K] -> (y [M, N], u [M, R] fp32)
std::tuple<Tensor, Tensor> fourbit_linear_cpu(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                              std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
                                              std::optional<Tensor> nested_offset, int64_t blocksize,
                                              int64_t nested_blocksize, std::string quant_type, int64_t out_features,
                                              std::optional<Tensor> bias, std::vector<Tensor> lora_A,
                                              std::vector<Tensor> lora_B, std::vector<double> scaling,
                                              std::vector<double> dropout, std::optional<Tensor> seed,
                                              std::string compute_dtype) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions here, got ", x.dim(), ".");
  STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU.");
  STD_TORCH_CHECK(out_features >= 0, "out_features is ", out_features, ".");
  const int64_t M = x.size(0), K = x.size(1), N = out_features;
  const DType dtype = dtype_of(x, "x");
  const FourBitMatrix W = matrix_of(packed, absmax, nested_absmax, nested_code, nested_offset, blocksize,
                                    nested_blocksize, quant_type, N * K);
  const AdapterList adapters(lora_A, lora_B, scaling, dropout, K, N, dtype);
  const Bias bias32(bias, N);
  const int64_t* seed_data = seed_of(seed, adapters.any_dropout);
  const Tensor X = with_contiguous_rows(x);
  Tensor y = empty({M, N}, x.scalar_type()), u = empty({M, adapters.rank}, ScalarType::Float);
  cpu::lora_linear({M,
                    N,
                    K,
                    dtype,
                    X.const_data_ptr(),
                    leading_dimension(X),
                    {nullptr, 0, false, W, named_dtype(compute_dtype, "compute_dtype")},
                    bias32.data(),
                    adapters.plain.data(),
                    static_cast<int>(adapters.plain.size()),
                    seed_data,
                    static_cast<float*>(u.mutable_data_ptr()),
                    y.mutable_data_ptr()},
                   torch_threads());
  return {y, u};
}

// grad_y [M, N] -> (grad_x [M, K], grad_A, grad_B); what is not wanted comes back empty.
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> fourbit_linear_backward_cpu(
    const Tensor& grad_y, const Tensor& x, const Tensor& packed, const Tensor& absmax,
    std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset,
    int64_t blocksize, int64_t nested_blocksize, std::string quant_type, std::vector<Tensor> lora_A,
    std::vector<Tensor> lora_B, const Tensor& u, std::vector<double> scaling, std::vector<double> dropout,
    std::optional<Tensor> seed, std::string compute_dtype, bool want_x, std::vector<bool> want_A,
    std::vector<bool> want_B) {
  STD_TORCH_CHECK(x.dim() == 2 && grad_y.dim() == 2, "x and grad_y must have 2 dimensions here, got ", x.dim(), " and ",
                  grad_y.dim(), ".");
  const int64_t M = x.size(0), K = x.size(1), N = grad_y.size(1);
  check_matrix(x, "x", M, K);
  check_matrix(grad_y, "grad_y", M, N);
  check_dtype(grad_y, "grad_y", x.scalar_type(), "x");
  const DType dtype = dtype_of(x, "x");
  const FourBitMatrix W = matrix_of(packed, absmax, nested_absmax, nested_code, nested_offset, blocksize,
                                    nested_blocksize, quant_type, N * K);
  AdapterList adapters(lora_A, lora_B, scaling, dropout, K, N, dtype);
  check_matrix(u, "u", M, adapters.rank);
  STD_TORCH_CHECK(u.scalar_type() == ScalarType::Float && u.is_contiguous(), "u must be contiguous float32.");
  const int64_t* seed_data = seed_of(seed, adapters.any_dropout);
  const Tensor G = with_contiguous_rows(grad_y), X = any_of(want_A) ? with_contiguous_rows(x) : x;
  Tensor grad_x = empty({want_x ? M : 0, K}, x.scalar_type());
  const Gradients grads(adapters, want_A, want_B, N, K);
  cpu::lora_linear_backward({M,
                             N,
                             K,
                             dtype,
                             G.const_data_ptr(),
                             leading_dimension(G),
                             X.const_data_ptr(),
                             leading_dimension(X),
                             {nullptr, 0, false, W, named_dtype(compute_dtype, "compute_dtype")},
                             adapters.plain.data(),
                             static_cast<int>(adapters.plain.size()),
                             seed_data,
                             static_cast<const float*>(u.const_data_ptr()),
                             want_x ? grad_x.mutable_data_ptr() : nullptr},
                            torch_threads());
  return {grad_x, grads.A, grads.B};
}

}  // namespace

void register_fourbit(torch::stable::detail::StableLibrary& library) {
  library.impl("fourbit_quantize", TORCH_BOX(&fourbit_quantize_cpu));
  library.impl("fourbit_quantize_absmax", TORCH_BOX(&fourbit_quantize_absmax_cpu));
  library.impl("fourbit_dequantize", TORCH_BOX(&fourbit_dequantize_cpu));
  library.impl("fourbit_linear", TORCH_BOX(&fourbit_linear_cpu));
  library.impl("fourbit_linear_backward", TORCH_BOX(&fourbit_linear_backward_cpu));
}

}  // namespace peftfast
