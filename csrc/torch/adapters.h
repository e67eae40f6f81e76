// What every linear operator does once its weight is known: adapters, their gradients, a bias and a seed to the
// kernels' arguments.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

namespace peftfast {

// The adapters' tensors, checked and kept alive, beside the plain structs that point into them. lora_A [rank, K] and
// lora_B [N, rank] of one adapter have one dimension more when they are `stacked`: [slots, rank, K], [slots, N, rank].
struct AdapterList {
  std::vector<Tensor> A, B;
  std::vector<LoraAdapter> plain;
  int64_t rank = 0;
  bool any_dropout = false, stacked;

  AdapterList(const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B, const std::vector<double>& scaling,
              const std::vector<double>& dropout, int64_t K, int64_t N, DType base, bool stack = false)
      : stacked(stack) {
    const size_t count = lora_A.size();
    STD_TORCH_CHECK(lora_B.size() == count && scaling.size() == count && dropout.size() == count,
                    "lora_A, lora_B, scaling and dropout must have one entry per adapter, got ", count, ", ",
                    lora_B.size(), ", ", scaling.size(), " and ", dropout.size(), ".");
    for (size_t i = 0; i < count; ++i) {
      const Tensor &a = lora_A[i], &b = lora_B[i];
      STD_TORCH_CHECK(a.dim() == (stacked ? 3 : 2), "lora_A must have ", stacked ? 3 : 2, " dimensions, got ", a.dim(),
                      ".");
      const int64_t slots = stacked ? a.size(0) : 1, r = a.size(stacked ? 1 : 0);
      stacked ? check_shape(a, "lora_A", {slots, r, K}) : check_shape(a, "lora_A", {r, K});
      stacked ? check_shape(b, "lora_B", {slots, N, r}) : check_shape(b, "lora_B", {N, r});
      check_dtype(b, "lora_B", a.scalar_type(), "lora_A");
      const DType dtype = dtype_of(a, "lora_A");
      STD_TORCH_CHECK(dtype == base || dtype == DType::f32, "lora_A must be float32 or have the dtype of x.");
      STD_TORCH_CHECK(dropout[i] >= 0 && dropout[i] < 1, "dropout must be in [0, 1), got ", dropout[i], ".");
      A.push_back(as_contiguous(a));
      B.push_back(b);
      plain.push_back({.slots = slots,
                       .rank = r,
                       .dtype = dtype,
                       .A = A[i].const_data_ptr(),
                       .B = b.const_data_ptr(),
                       .B_strides = {stacked ? b.stride(0) : 0, b.stride(stacked ? 1 : 0), b.stride(stacked ? 2 : 1)},
                       .scaling = static_cast<float>(scaling[i]),
                       .dropout = static_cast<float>(dropout[i])});
      rank += r;
      any_dropout |= dropout[i] > 0;
    }
  }
};

inline const int64_t* seed_of(const std::optional<Tensor>& seed, bool wanted) {
  if (!wanted) return nullptr;
  STD_TORCH_CHECK(seed.has_value() && on_device(*seed) && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                  "seed must be a one-element int64 tensor on the device of x when dropout is not 0.");
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

// A bias, or another small tensor, in fp32, or none.
class Bias {
 public:
  Bias(const std::optional<Tensor>& bias, std::initializer_list<int64_t> shape, const char* name = "bias") {
    if (!bias.has_value()) return;
    check_shape(*bias, name, shape);
    dtype_of(*bias, name);
    fp32_ =
        as_contiguous(bias->scalar_type() == ScalarType::Float ? *bias : torch::stable::to(*bias, ScalarType::Float));
  }

  const float* data() const { return fp32_ ? static_cast<const float*>(fp32_->const_data_ptr()) : nullptr; }

 private:
  std::optional<Tensor> fp32_;
};

// A linear layer but for its adapters: the frozen weights, and which rows of x meet which of them.
struct Layer {
  int64_t N, K;
  BaseWeight W;
  Groups groups;
};

// x [M, K] -> (y [M, N], u [M, R] fp32), y in `into` if there is one
inline std::tuple<Tensor, Tensor> forward(const Host& host, const Tensor& x, const Layer& layer, const float* bias,
                                          const AdapterList& adapters, const std::optional<Tensor>& seed,
                                          const std::optional<Tensor>& into = {}) {
  const int64_t M = x.size(0);
  check_matrix(x, "x", M, layer.K);
  const Tensor X = with_contiguous_rows(x);
  Tensor y = into ? *into : empty({M, layer.N}, x.scalar_type()), u = empty({M, adapters.rank}, ScalarType::Float);
  kernels::lora_linear({.M = M,
                        .N = layer.N,
                        .K = layer.K,
                        .dtype = dtype_of(x, "x"),
                        .groups = layer.groups,
                        .X = X.const_data_ptr(),
                        .ldx = leading_dimension(X),
                        .W = layer.W,
                        .bias = bias,
                        .adapters = adapters.plain.data(),
                        .adapter_count = static_cast<int>(adapters.plain.size()),
                        .seed = seed_of(seed, adapters.any_dropout),
                        .U = static_cast<float*>(u.mutable_data_ptr()),
                        .Y = y.mutable_data_ptr()},
                       host);
  return {y, u};
}

// grad_y [M, N] -> (grad_x [M, K], grad_A, grad_B); what is not wanted comes back empty.
inline std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> backward(
    const Host& host, const Tensor& grad_y, const Tensor& x, const Layer& layer, AdapterList& adapters, const Tensor& u,
    const std::optional<Tensor>& seed, bool want_x, const std::vector<bool>& want_A, const std::vector<bool>& want_B) {
  const int64_t M = x.size(0), N = layer.N, K = layer.K;
  check_matrix(x, "x", M, K);
  check_matrix(grad_y, "grad_y", M, N);
  check_dtype(grad_y, "grad_y", x.scalar_type(), "x");
  check_matrix(u, "u", M, adapters.rank);
  STD_TORCH_CHECK(u.scalar_type() == ScalarType::Float && u.is_contiguous(), "u must be contiguous float32.");
  const size_t count = adapters.plain.size();
  STD_TORCH_CHECK(want_A.size() == count && want_B.size() == count,
                  "want_A and want_B must have one entry per adapter.");
  std::vector<Tensor> grad_A, grad_B;
  for (size_t i = 0; i < count; ++i) {
    LoraAdapter& a = adapters.plain[i];
    const auto room = [&](bool wanted, int64_t rows, int64_t columns, void*& out, const int64_t* strides) {
      const ScalarType type = adapters.A[i].scalar_type();
      Tensor grad = adapters.stacked ? empty({wanted ? a.slots : 0, rows, columns}, type, strides)
                                     : empty({wanted ? rows : 0, columns}, type);
      if (wanted) out = grad.mutable_data_ptr();
      return grad;
    };
    // PEFT keeps B of experts as [N, rank, slots]: a gradient in another order would be copied into that one.
    const auto [of_slot, of_n, of_rank] = a.B_strides;
    const bool as_B = a.slots > 1 && of_slot == 1 && of_rank == a.slots && of_n == a.rank * a.slots;
    const int64_t contiguous[3] = {N * a.rank, a.rank, 1};
    std::copy_n(as_B ? a.B_strides : contiguous, 3, a.grad_B_strides);
    grad_A.push_back(room(want_A[i], a.rank, K, a.grad_A, nullptr));
    grad_B.push_back(room(want_B[i], N, a.rank, a.grad_B, as_B ? a.grad_B_strides : nullptr));
  }
  const bool any_A = std::find(want_A.begin(), want_A.end(), true) != want_A.end();
  const Tensor G = with_contiguous_rows(grad_y), X = any_A ? with_contiguous_rows(x) : x;
  Tensor grad_x = empty({want_x ? M : 0, K}, x.scalar_type());
  kernels::lora_linear_backward({.of = {.M = M,
                                        .N = N,
                                        .K = K,
                                        .dtype = dtype_of(x, "x"),
                                        .groups = layer.groups,
                                        .X = X.const_data_ptr(),
                                        .ldx = leading_dimension(X),
                                        .W = layer.W,
                                        .adapters = adapters.plain.data(),
                                        .adapter_count = static_cast<int>(count),
                                        .seed = seed_of(seed, adapters.any_dropout),
                                        .U = static_cast<float*>(const_cast<void*>(u.const_data_ptr()))},
                                 .G = G.const_data_ptr(),
                                 .ldg = leading_dimension(G),
                                 .dX = want_x ? grad_x.mutable_data_ptr() : nullptr},
                                host);
  return {grad_x, grad_A, grad_B};
}

}  // namespace peftfast
