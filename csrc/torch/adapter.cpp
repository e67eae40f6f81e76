// peftfast::bottleneck_adapter and its backward: from tensors to the kernels' arguments.
#include "adapter.h"

#include <optional>
#include <tuple>
#include <vector>

#include "adapters.h"

namespace peftfast {
namespace {

using Optional = std::optional<Tensor>;

// The parameters and settings, checked and kept alive, beside the plain struct that points into them.
class Parameters {
 public:
  Parameters(const Tensor& x, const Tensor& down_weight, const Optional& down_bias, const Tensor& up_weight,
             const Optional& up_bias, const Optional& norm_weight, const Optional& norm_bias,
             const Optional& learned_scaling, double scaling, int64_t activation, double norm_eps, double dropout,
             const Optional& seed)
      : down_(down_weight),
        up_(up_weight),
        down_bias_(down_bias, {sizes(x, down_weight).D}, "down_bias"),
        up_bias_(up_bias, {x.size(1)}, "up_bias"),
        norm_weight_(norm_weight, {x.size(1)}, "norm_weight"),
        norm_bias_(norm_bias, {x.size(1)}, "norm_bias"),
        scaling_(learned_scaling, {1}, "learned_scaling"),
        X_(with_contiguous_rows(x)) {
    const auto [M, H, D] = sizes(x, down_weight);
    check_matrix(down_weight, "down_weight", D, H);
    check_matrix(up_weight, "up_weight", H, D);
    check_dtype(up_weight, "up_weight", down_weight.scalar_type(), "down_weight");
    STD_TORCH_CHECK(norm_weight.has_value() || !norm_bias.has_value(), "norm_bias needs a norm_weight.");
    STD_TORCH_CHECK(dropout >= 0 && dropout < 1, "dropout must be in [0, 1), got ", dropout, ".");
    STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::tanh),
                    "activation must be the number of one, got ", activation, ".");
    down_ = as_contiguous(down_weight), up_ = as_contiguous(up_weight);
    plain = {.M = M,
             .H = H,
             .D = D,
             .dtype = dtype_of(x, "x"),
             .parameters = dtype_of(down_weight, "down_weight"),
             .X = X_.const_data_ptr(),
             .ldx = leading_dimension(X_),
             .down = down_.const_data_ptr(),
             .up = up_.const_data_ptr(),
             .down_bias = down_bias_.data(),
             .up_bias = up_bias_.data(),
             .norm_weight = norm_weight_.data(),
             .norm_bias = norm_bias_.data(),
             .norm_eps = static_cast<float>(norm_eps),
             .scaling = scaling_.data() ? *scaling_.data() : static_cast<float>(scaling),
             .dropout = static_cast<float>(dropout),
             .activation = static_cast<Activation>(activation),
             .seed = seed_of(seed, dropout > 0)};
  }

  BottleneckAdapterArgs plain;

 private:
  struct Sizes {
    int64_t M, H, D;
  };
  static Sizes sizes(const Tensor& x, const Tensor& down_weight) {
    STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU.");
    STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions here, got ", x.dim(), ".");
    STD_TORCH_CHECK(down_weight.dim() == 2, "down_weight must have 2 dimensions, got ", down_weight.dim(), ".");
    return {x.size(0), x.size(1), down_weight.size(0)};
  }

  Tensor down_, up_;
  Bias down_bias_, up_bias_, norm_weight_, norm_bias_, scaling_;
  Tensor X_;
};

// x and residual [M, H] -> (y [M, H], z [M, D] fp32)
std::tuple<Tensor, Tensor> bottleneck_adapter_cpu(const Tensor& x, Optional residual, const Tensor& down_weight,
                                                  Optional down_bias, const Tensor& up_weight, Optional up_bias,
                                                  Optional norm_weight, Optional norm_bias, Optional learned_scaling,
                                                  double scaling, int64_t activation, double norm_eps, double dropout,
                                                  Optional seed, bool residual_is_x) {
  Parameters parameters(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, learned_scaling, scaling,
                        activation, norm_eps, dropout, seed);
  BottleneckAdapterArgs& args = parameters.plain;
  if (residual.has_value()) {
    check_matrix(*residual, "residual", args.M, args.H);
    check_dtype(*residual, "residual", x.scalar_type(), "x");
    residual = with_contiguous_rows(*residual);
    args.residual = residual->const_data_ptr(), args.ld_residual = leading_dimension(*residual);
  } else if (residual_is_x) {
    args.residual = args.X, args.ld_residual = args.ldx;
  }
  Tensor y = empty({args.M, args.H}, x.scalar_type()), z = empty({args.M, args.D}, ScalarType::Float);
  args.Z = static_cast<float*>(z.mutable_data_ptr()), args.Y = y.mutable_data_ptr();
  cpu::bottleneck_adapter(args, torch_threads());
  return {y, z};
}

// grad_y [M, H] -> the gradients of x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias and
// learned_scaling, the last five of the vectors in fp32; what `want` does not ask for comes back empty.
std::vector<Tensor> bottleneck_adapter_backward_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& down_weight,
                                                    Optional down_bias, const Tensor& up_weight, Optional up_bias,
                                                    Optional norm_weight, Optional norm_bias, Optional learned_scaling,
                                                    const Tensor& z, double scaling, int64_t activation,
                                                    double norm_eps, double dropout, Optional seed, bool residual_is_x,
                                                    std::vector<bool> want) {
  Parameters parameters(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, learned_scaling, scaling,
                        activation, norm_eps, dropout, seed);
  BottleneckAdapterArgs& args = parameters.plain;
  check_matrix(grad_y, "grad_y", args.M, args.H);
  check_dtype(grad_y, "grad_y", x.scalar_type(), "x");
  check_matrix(z, "z", args.M, args.D);
  STD_TORCH_CHECK(z.scalar_type() == ScalarType::Float && z.is_contiguous(), "z must be contiguous float32.");
  STD_TORCH_CHECK(want.size() == 8, "want must have 8 entries, got ", want.size(), ".");
  STD_TORCH_CHECK(args.norm_weight != nullptr || !(want[5] || want[6]), "want asks for a norm that is not there.");
  const Tensor G = with_contiguous_rows(grad_y);
  const int64_t H = args.H, D = args.D;
  const ScalarType type = down_weight.scalar_type(), fp32 = ScalarType::Float;
  std::vector<Tensor> grads{empty({want[0] ? args.M : 0, H}, x.scalar_type()),
                            empty({want[1] ? D : 0, H}, type),
                            empty({want[2] ? D : 0}, fp32),
                            empty({want[3] ? H : 0, D}, type),
                            empty({want[4] ? H : 0}, fp32),
                            empty({want[5] ? H : 0}, fp32),
                            empty({want[6] ? H : 0}, fp32),
                            empty({want[7] ? 1 : 0}, fp32)};
  const auto out = [&](int i) { return want[i] ? grads[i].mutable_data_ptr() : nullptr; };
  const auto vector_out = [&](int i) { return static_cast<float*>(out(i)); };
  args.Z = static_cast<float*>(const_cast<void*>(z.const_data_ptr()));
  cpu::bottleneck_adapter_backward({.of = args,
                                    .G = G.const_data_ptr(),
                                    .ldg = leading_dimension(G),
                                    .residual_is_X = residual_is_x,
                                    .dX = out(0),
                                    .grad_down = out(1),
                                    .grad_up = out(3),
                                    .grad_down_bias = vector_out(2),
                                    .grad_up_bias = vector_out(4),
                                    .grad_norm_weight = vector_out(5),
                                    .grad_norm_bias = vector_out(6),
                                    .grad_scaling = vector_out(7)},
                                   torch_threads());
  return grads;
}

}  // namespace

void register_adapter(torch::stable::detail::StableLibrary& library) {
  library.impl("bottleneck_adapter", TORCH_BOX(&bottleneck_adapter_cpu));
  library.impl("bottleneck_adapter_backward", TORCH_BOX(&bottleneck_adapter_backward_cpu));
}

}  // namespace peftfast
