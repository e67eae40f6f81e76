// peftfast::lora_linear and its backward: from tensors to the kernels' arguments.
#include "lora.h"

#include <optional>
#include <tuple>

#include "adapters.h"

namespace peftfast {
namespace {

struct Base {
  Tensor W;
  int64_t N, K, ld;
  bool transposed;

  // A weight whose last dimension is not contiguous but whose first is, is the transpose of one that is fine.
  Base(const Tensor& weight, bool transposed_storage) : W(weight), transposed(transposed_storage) {
    STD_TORCH_CHECK(on_device(weight), "weight must be ", the_device, ".");
    STD_TORCH_CHECK(weight.dim() == 2, "weight must have 2 dimensions, got ", weight.dim(), ".");
    N = weight.size(transposed ? 1 : 0), K = weight.size(transposed ? 0 : 1);
    if (weight.stride(1) != 1 && weight.stride(0) == 1 && weight.size(0) > 1 &&
        (weight.size(1) <= 1 || weight.stride(1) >= weight.size(0))) {
      transposed = !transposed;
      ld = weight.size(1) <= 1 ? weight.size(0) : weight.stride(1);
    } else {
      W = with_contiguous_rows(weight);
      ld = leading_dimension(W);
    }
  }

  BaseWeight plain() const { return {W.const_data_ptr(), ld, transposed, {}, {}}; }
};

// x [M, K], weight [N, K] (or [K, N] transposed) -> (y [M, N], u [M, R] fp32)
std::tuple<Tensor, Tensor> lora_linear_op(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                          std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
                                          std::vector<double> scaling, std::vector<double> dropout,
                                          std::optional<Tensor> seed, bool transposed) {
  const Host host(x);
  const Base base(weight, transposed);
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions here, got ", x.dim(), ".");
  check_matrix(x, "x", x.size(0), base.K);
  check_dtype(weight, "weight", x.scalar_type(), "x");
  const DType dtype = dtype_of(x, "x");
  const int64_t M = x.size(0);
  const AdapterList adapters(lora_A, lora_B, scaling, dropout, base.K, base.N, dtype);
  const Bias bias32(bias, base.N);
  const int64_t* seed_data = seed_of(seed, adapters.any_dropout);
  const Tensor X = with_contiguous_rows(x);
  Tensor y = empty({M, base.N}, x.scalar_type()), u = empty({M, adapters.rank}, ScalarType::Float);
  kernels::lora_linear({.M = M,
                        .N = base.N,
                        .K = base.K,
                        .dtype = dtype,
                        .X = X.const_data_ptr(),
                        .ldx = leading_dimension(X),
                        .W = base.plain(),
                        .bias = bias32.data(),
                        .adapters = adapters.plain.data(),
                        .adapter_count = static_cast<int>(adapters.plain.size()),
                        .seed = seed_data,
                        .U = static_cast<float*>(u.mutable_data_ptr()),
                        .Y = y.mutable_data_ptr()},
                       host);
  return {y, u};
}

// grad_y [M, N] -> (grad_x [M, K], grad_A, grad_B); what is not wanted comes back empty.
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_linear_backward_op(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
    const Tensor& u, std::vector<double> scaling, std::vector<double> dropout, std::optional<Tensor> seed,
    bool transposed, bool want_x, std::vector<bool> want_A, std::vector<bool> want_B) {
  const Host host(x);
  const Base base(weight, transposed);
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions here, got ", x.dim(), ".");
  const int64_t M = x.size(0);
  check_matrix(x, "x", M, base.K);
  check_matrix(grad_y, "grad_y", M, base.N);
  check_dtype(weight, "weight", x.scalar_type(), "x");
  check_dtype(grad_y, "grad_y", x.scalar_type(), "x");
  const DType dtype = dtype_of(x, "x");
  AdapterList adapters(lora_A, lora_B, scaling, dropout, base.K, base.N, dtype);
  check_matrix(u, "u", M, adapters.rank);
  STD_TORCH_CHECK(u.scalar_type() == ScalarType::Float && u.is_contiguous(), "u must be contiguous float32.");
  const int64_t* seed_data = seed_of(seed, adapters.any_dropout);

  const Tensor G = with_contiguous_rows(grad_y), X = any_of(want_A) ? with_contiguous_rows(x) : x;
  Tensor grad_x = empty({want_x ? M : 0, base.K}, x.scalar_type());
  const Gradients grads(adapters, want_A, want_B, base.N, base.K);
  const LoraLinearArgs of{.M = M,
                          .N = base.N,
                          .K = base.K,
                          .dtype = dtype,
                          .X = X.const_data_ptr(),
                          .ldx = leading_dimension(X),
                          .W = base.plain(),
                          .adapters = adapters.plain.data(),
                          .adapter_count = static_cast<int>(adapters.plain.size()),
                          .seed = seed_data,
                          .U = static_cast<float*>(const_cast<void*>(u.const_data_ptr()))};
  kernels::lora_linear_backward(
      {of, G.const_data_ptr(), leading_dimension(G), want_x ? grad_x.mutable_data_ptr() : nullptr}, host);
  return {grad_x, grads.A, grads.B};
}

}  // namespace

void register_lora(torch::stable::detail::StableLibrary& library) {
  library.impl("lora_linear", TORCH_BOX(&lora_linear_op));
  library.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward_op));
}

}  // namespace peftfast
