// peftfast::lora_linear, its backward and linear_into: from tensors to the kernels' arguments.
#include "lora.h"

#include <optional>
#include <tuple>

#include "adapters.h"

namespace peftfast {
namespace {

struct Dense : Layer {
  Tensor tensor;

  // A weight whose last dimension is not contiguous but whose first is, is the transpose of one that is fine.
  Dense(const Tensor& x, const Tensor& weight, bool transposed) : Layer{}, tensor(weight) {
    STD_TORCH_CHECK(on_device(weight), "weight must be ", the_device, ".");
    STD_TORCH_CHECK(weight.dim() == 2, "weight must have 2 dimensions, got ", weight.dim(), ".");
    check_dtype(weight, "weight", x.scalar_type(), "x");
    N = weight.size(transposed ? 1 : 0), K = weight.size(transposed ? 0 : 1);
    if (weight.stride(1) != 1 && weight.stride(0) == 1 && weight.size(0) > 1 &&
        (weight.size(1) <= 1 || weight.stride(1) >= weight.size(0))) {
      W.transposed = !transposed;
      W.ld = weight.size(1) <= 1 ? weight.size(0) : weight.stride(1);
    } else {
      tensor = with_contiguous_rows(weight);
      W.transposed = transposed;
      W.ld = leading_dimension(tensor);
    }
    W.dense = tensor.const_data_ptr();
  }
};

// x [M, K], weight [N, K] (or [K, N] transposed) -> (y [M, N], u [M, R] fp32)
std::tuple<Tensor, Tensor> lora_linear_op(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                          std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
                                          std::vector<double> scaling, std::vector<double> dropout,
                                          std::optional<Tensor> seed, bool transposed) {
  const Host host(x);
  const Dense base(x, weight, transposed);
  const AdapterList adapters(lora_A, lora_B, scaling, dropout, base.K, base.N, dtype_of(x, "x"));
  return forward(host, x, base, Bias(bias, {base.N}).data(), adapters, seed);
}

// grad_y [M, N] -> (grad_x [M, K], grad_A, grad_B); what is not wanted comes back empty.
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_linear_backward_op(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
    const Tensor& u, std::vector<double> scaling, std::vector<double> dropout, std::optional<Tensor> seed,
    bool transposed, bool want_x, std::vector<bool> want_A, std::vector<bool> want_B) {
  const Host host(x);
  const Dense base(x, weight, transposed);
  AdapterList adapters(lora_A, lora_B, scaling, dropout, base.K, base.N, dtype_of(x, "x"));
  return backward(host, grad_y, x, base, adapters, u, seed, want_x, want_A, want_B);
}

// y [M, N] = x [M, K] W^T + bias, where the caller has the memory of y: a large new one is paid for by the page.
void linear_into_op(const Tensor& y, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  const Host host(x);
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions here, got ", x.dim(), ".");
  const Dense base(x, weight, false);
  check_matrix(y, "y", x.size(0), base.N);
  check_dtype(y, "y", x.scalar_type(), "x");
  STD_TORCH_CHECK(y.is_contiguous(), "y must be contiguous: it is overwritten.");
  forward(host, x, base, Bias(bias, {base.N}).data(), AdapterList({}, {}, {}, {}, base.K, base.N, dtype_of(x, "x")), {},
          y);
}

}  // namespace

void register_lora(torch::stable::detail::StableLibrary& library) {
  library.impl("lora_linear", TORCH_BOX(&lora_linear_op));
  library.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward_op));
  library.impl("linear_into", TORCH_BOX(&linear_into_op));
}

}  // namespace peftfast
