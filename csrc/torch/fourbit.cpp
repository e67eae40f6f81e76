// peftfast::fourbit_*: from tensors to the kernels' arguments.
#include "fourbit.h"

#include <tuple>

#include "../fourbit_format.h"
#include "adapters.h"

namespace peftfast {
namespace {

// weight -> (packed [(count + 1) / 2, 1] uint8, absmax [blocks] fp32)
std::tuple<Tensor, Tensor> fourbit_quantize_op(const Tensor& weight, int64_t blocksize, int64_t quant_type) {
  const Host host(weight);
  STD_TORCH_CHECK(on_device(weight), "weight must be ", the_device, ".");
  check_blocksize(blocksize);
  const Tensor W = as_contiguous(weight);
  const int64_t count = W.numel();
  Tensor packed = empty({(count + 1) / 2, 1}, ScalarType::Byte);
  Tensor absmax = empty({(count + blocksize - 1) / blocksize}, ScalarType::Float);
  kernels::fourbit_quantize(
      {count, dtype_of(W, "weight"), W.const_data_ptr(), type_of(quant_type), blocksize,
       static_cast<uint8_t*>(packed.mutable_data_ptr()), static_cast<float*>(absmax.mutable_data_ptr())},
      host);
  return {packed, absmax};
}

// absmax [blocks] -> (codes [blocks] uint8, nested_absmax [ceil(blocks / blocksize)] fp32)
std::tuple<Tensor, Tensor> fourbit_quantize_absmax_op(const Tensor& absmax, const Tensor& offset, const Tensor& code,
                                                      int64_t blocksize) {
  const Host host(absmax);
  STD_TORCH_CHECK(is_power_of_two(blocksize), "blocksize must be a power of two, got ", blocksize, ".");
  const int64_t blocks = absmax.numel();
  Tensor codes = empty({blocks}, ScalarType::Byte);
  Tensor nested = empty({(blocks + blocksize - 1) / blocksize}, ScalarType::Float);
  kernels::fourbit_quantize_absmax(
      {blocks, static_cast<const float*>(checked(absmax, "absmax", ScalarType::Float, blocks)),
       static_cast<const float*>(checked(offset, "offset", ScalarType::Float, 1)),
       static_cast<const float*>(checked(code, "code", ScalarType::Float, 256)), blocksize,
       static_cast<uint8_t*>(codes.mutable_data_ptr()), static_cast<float*>(nested.mutable_data_ptr())},
      host);
  return {codes, nested};
}

// -> [rows, columns] in `dtype`
Tensor fourbit_dequantize_op(const Tensor& packed, const Tensor& absmax, std::optional<Tensor> nested_absmax,
                             std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
                             int64_t nested_blocksize, int64_t quant_type, int64_t rows, int64_t columns,
                             int64_t dtype) {
  const Host host(packed);
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "the weight's shape is [", rows, ", ", columns, "].");
  const FourBitMatrix W = matrix_of(packed, absmax, nested_absmax, nested_code, nested_offset, blocksize,
                                    nested_blocksize, quant_type, rows * columns);
  const DType type = numbered_dtype(dtype, "dtype");
  Tensor out = empty({rows, columns}, scalar_type_of(type));
  kernels::fourbit_dequantize({rows * columns, W, type, out.mutable_data_ptr()}, host);
  return out;
}

// x [M, K], weight [N, K] -> (y [M, N], u [M, R] fp32)
std::tuple<Tensor, Tensor> fourbit_linear_op(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                             std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
                                             std::optional<Tensor> nested_offset, int64_t blocksize,
                                             int64_t nested_blocksize, int64_t quant_type, int64_t out_features,
                                             std::optional<Tensor> bias, std::vector<Tensor> lora_A,
                                             std::vector<Tensor> lora_B, std::vector<double> scaling,
                                             std::vector<double> dropout, std::optional<Tensor> seed,
                                             int64_t compute_dtype) {
  const Host host(x);
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions here, got ", x.dim(), ".");
  STD_TORCH_CHECK(out_features >= 0, "out_features is ", out_features, ".");
  const int64_t N = out_features, K = x.size(1);
  const BaseWeight W{.fourbit = matrix_of(packed, absmax, nested_absmax, nested_code, nested_offset, blocksize,
                                          nested_blocksize, quant_type, N * K),
                     .compute = numbered_dtype(compute_dtype, "compute_dtype")};
  const AdapterList adapters(lora_A, lora_B, scaling, dropout, K, N, dtype_of(x, "x"));
  return forward(host, x, {N, K, W, {}}, Bias(bias, {N}).data(), adapters, seed);
}

// grad_y [M, N] -> (grad_x [M, K], grad_A, grad_B); what is not wanted comes back empty.
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> fourbit_linear_backward_op(
    const Tensor& grad_y, const Tensor& x, const Tensor& packed, const Tensor& absmax,
    std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset,
    int64_t blocksize, int64_t nested_blocksize, int64_t quant_type, std::vector<Tensor> lora_A,
    std::vector<Tensor> lora_B, const Tensor& u, std::vector<double> scaling, std::vector<double> dropout,
    std::optional<Tensor> seed, int64_t compute_dtype, bool want_x, std::vector<bool> want_A,
    std::vector<bool> want_B) {
  const Host host(x);
  STD_TORCH_CHECK(x.dim() == 2 && grad_y.dim() == 2, "x and grad_y must have 2 dimensions here, got ", x.dim(), " and ",
                  grad_y.dim(), ".");
  const int64_t N = grad_y.size(1), K = x.size(1);
  const BaseWeight W{.fourbit = matrix_of(packed, absmax, nested_absmax, nested_code, nested_offset, blocksize,
                                          nested_blocksize, quant_type, N * K),
                     .compute = numbered_dtype(compute_dtype, "compute_dtype")};
  AdapterList adapters(lora_A, lora_B, scaling, dropout, K, N, dtype_of(x, "x"));
  return backward(host, grad_y, x, {N, K, W, {}}, adapters, u, seed, want_x, want_A, want_B);
}

}  // namespace

void register_fourbit(torch::stable::detail::StableLibrary& library) {
  library.impl("fourbit_quantize", TORCH_BOX(&fourbit_quantize_op));
  library.impl("fourbit_quantize_absmax", TORCH_BOX(&fourbit_quantize_absmax_op));
  library.impl("fourbit_dequantize", TORCH_BOX(&fourbit_dequantize_op));
  library.impl("fourbit_linear", TORCH_BOX(&fourbit_linear_op));
  library.impl("fourbit_linear_backward", TORCH_BOX(&fourbit_linear_backward_op));
}

}  // namespace peftfast
