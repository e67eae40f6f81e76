// peftfast::lora_linear and its backward: from tensors to the kernels' arguments.
#include "lora.h"

#include <optional>
#include <tuple>

#include "checks.h"

namespace peftfast {
namespace {

// The adapters' tensors, checked, contiguous and kept alive, beside the plain structs that point into them.
struct AdapterList {
  std::vector<Tensor> A, B;
  std::vector<LoraAdapter> plain;
  int64_t rank = 0;
  bool any_dropout = false;

  AdapterList(const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B, const std::vector<double>& scaling,
              const std::vector<double>& dropout, int64_t K, int64_t N, DType base) {
    const size_t count = lora_A.size();
    STD_TORCH_CHECK(lora_B.size() == count && scaling.size() == count && dropout.size() == count,
                    "lora_A, lora_B, scaling and dropout must have one entry per adapter, got ", count, ", ",
                    lora_B.size(), ", ", scaling.size(), " and ", dropout.size(), ".");
    for (size_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(lora_A[i].dim() == 2, "lora_A must have 2 dimensions, got ", lora_A[i].dim(), ".");
      const int64_t r = lora_A[i].size(0);
      check_matrix(lora_A[i], "lora_A", r, K);
      check_matrix(lora_B[i], "lora_B", N, r);
      check_dtype(lora_B[i], "lora_B", lora_A[i].scalar_type(), "lora_A");
      const DType dtype = dtype_of(lora_A[i], "lora_A");
      STD_TORCH_CHECK(dtype == base || dtype == DType::f32, "lora_A must be float32 or have the dtype of x.");
      STD_TORCH_CHECK(dropout[i] >= 0 && dropout[i] < 1, "dropout must be in [0, 1), got ", dropout[i], ".");
      A.push_back(as_contiguous(lora_A[i]));
      B.push_back(as_contiguous(lora_B[i]));
      plain.push_back({A[i].const_data_ptr(), B[i].const_data_ptr(), dtype, r, static_cast<float>(scaling[i]),
                       static_cast<float>(dropout[i]), nullptr, nullptr});
      rank += r;
      any_dropout |= dropout[i] > 0;
    }
  }
};

const int64_t* seed_of(const std::optional<Tensor>& seed, bool wanted) {
  if (!wanted) return nullptr;
  STD_TORCH_CHECK(seed.has_value() && seed->is_cpu() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                  "seed must be a one-element int64 tensor on the device of x when dropout is not 0.");
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

struct Base {
  Tensor W;
  int64_t N, K, ld;
  bool transposed;

  // A weight whose last dimension is not contiguous but whose first is, is the transpose of one that is fine.
  Base(const Tensor& weight, bool transposed_storage) : W(weight), transposed(transposed_storage) {
    STD_TORCH_CHECK(weight.is_cpu(), "weight must be on the CPU.");
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
};

Tensor in_fp32(const Tensor& t) {
  return as_contiguous(t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

// x [M, K], weight [N, K] (or [K, N] transposed) -> (y [M, N], u [M, R] fp32)
std::tuple<Tensor, Tensor> lora_linear_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                           std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
                                           std::vector<double> scaling, std::vector<double> dropout,
                                           std::optional<Tensor> seed, bool transposed) {
  const Base base(weight, transposed);
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions here, got ", x.dim(), ".");
  check_matrix(x, "x", x.size(0), base.K);
  check_dtype(weight, "weight", x.scalar_type(), "x");
  const DType dtype = dtype_of(x, "x");
  const int64_t M = x.size(0);
  const AdapterList adapters(lora_A, lora_B, scaling, dropout, base.K, base.N, dtype);
  std::optional<Tensor> bias32;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == base.N, "bias has shape ", shape_text(*bias),
                    ", expected [", base.N, "] on the CPU.");
    dtype_of(*bias, "bias");
    bias32 = in_fp32(*bias);
  }
  const int64_t* seed_data = seed_of(seed, adapters.any_dropout);
  const Tensor X = with_contiguous_rows(x);
  Tensor y = empty({M, base.N}, x.scalar_type()), u = empty({M, adapters.rank}, ScalarType::Float);
  cpu::lora_linear({M, base.N, base.K, dtype, X.const_data_ptr(), leading_dimension(X), base.W.const_data_ptr(),
                    base.ld, base.transposed, bias32 ? static_cast<const float*>(bias32->const_data_ptr()) : nullptr,
                    adapters.plain.data(), static_cast<int>(adapters.plain.size()), seed_data,
                    static_cast<float*>(u.mutable_data_ptr()), y.mutable_data_ptr()},
                   torch_threads());
  return {y, u};
}

// grad_y [M, N] -> (grad_x [M, K], grad_A, grad_B); what is not wanted comes back empty.
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_linear_backward_cpu(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
    const Tensor& u, std::vector<double> scaling, std::vector<double> dropout, std::optional<Tensor> seed,
    bool transposed, bool want_x, std::vector<bool> want_A, std::vector<bool> want_B) {
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
  STD_TORCH_CHECK(want_A.size() == lora_A.size() && want_B.size() == lora_A.size(),
                  "want_A and want_B must have one entry per adapter.");
  const int64_t* seed_data = seed_of(seed, adapters.any_dropout);

  const Tensor G = with_contiguous_rows(grad_y), X = with_contiguous_rows(x);
  Tensor grad_x = empty({want_x ? M : 0, base.K}, x.scalar_type());
  std::vector<Tensor> grad_A, grad_B;
  for (size_t i = 0; i < lora_A.size(); ++i) {
    LoraAdapter& adapter = adapters.plain[i];
    const ScalarType type = lora_A[i].scalar_type();
    grad_A.push_back(empty({want_A[i] ? adapter.rank : 0, base.K}, type));
    grad_B.push_back(empty({want_B[i] ? base.N : 0, adapter.rank}, type));
    if (want_A[i]) adapter.grad_A = grad_A[i].mutable_data_ptr();
    if (want_B[i]) adapter.grad_B = grad_B[i].mutable_data_ptr();
  }
  cpu::lora_linear_backward(
      {M, base.N, base.K, dtype, G.const_data_ptr(), leading_dimension(G), X.const_data_ptr(), leading_dimension(X),
       base.W.const_data_ptr(), base.ld, base.transposed, adapters.plain.data(),
       static_cast<int>(adapters.plain.size()), seed_data, static_cast<const float*>(u.const_data_ptr()),
       want_x ? grad_x.mutable_data_ptr() : nullptr},
      torch_threads());
  return {grad_x, grad_A, grad_B};
}

}  // namespace

void register_lora(torch::stable::detail::StableLibrary& library) {
  library.impl("lora_linear", TORCH_BOX(&lora_linear_cpu));
  library.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward_cpu));
}

}  // namespace peftfast
