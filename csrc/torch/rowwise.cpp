// peftfast::swiglu, rms_norm, their backwards and cross_entropy: from tensors to the kernels' arguments.
#include "rowwise.h"

#include <optional>
#include <tuple>

#include "adapters.h"

namespace peftfast {
namespace {

// The operands, checked and kept alive, beside the plain struct that points into them.
struct Swiglu {
  Tensor gate, up;
  SwigluArgs plain;

  Swiglu(const Tensor& gate_, const Tensor& up_, int64_t activation)
      : gate(checked(gate_, up_)), up(with_contiguous_rows(up_)) {
    STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::tanh),
                    "activation must be the number of one, got ", activation, ".");
    plain = {.M = gate.size(0),
             .I = gate.size(1),
             .dtype = dtype_of(gate, "gate"),
             .activation = static_cast<Activation>(activation),
             .gate = gate.const_data_ptr(),
             .up = up.const_data_ptr(),
             .ld_gate = leading_dimension(gate),
             .ld_up = leading_dimension(up)};
  }

 private:
  static Tensor checked(const Tensor& gate, const Tensor& up) {
    STD_TORCH_CHECK(gate.dim() == 2, "gate must have 2 dimensions here, got ", gate.dim(), ".");
    check_matrix(gate, "gate", gate.size(0), gate.size(1));
    check_matrix(up, "up", gate.size(0), gate.size(1));
    check_dtype(up, "up", gate.scalar_type(), "gate");
    return with_contiguous_rows(gate);
  }
};

// gate and up [M, I] -> y [M, I]
Tensor swiglu_op(const Tensor& gate, const Tensor& up, int64_t activation) {
  const Host host(gate);
  Swiglu swiglu(gate, up, activation);
  Tensor y = empty({swiglu.plain.M, swiglu.plain.I}, gate.scalar_type());
  swiglu.plain.Y = y.mutable_data_ptr();
  kernels::swiglu(swiglu.plain, host);
  return y;
}

// grad_y [M, I] -> (grad_gate, grad_up) [M, I]; one that is not wanted comes back empty.
std::tuple<Tensor, Tensor> swiglu_backward_op(const Tensor& grad_y, const Tensor& gate, const Tensor& up,
                                              int64_t activation, bool want_gate, bool want_up) {
  const Host host(gate);
  Swiglu swiglu(gate, up, activation);
  SwigluArgs& args = swiglu.plain;
  check_matrix(grad_y, "grad_y", args.M, args.I);
  check_dtype(grad_y, "grad_y", gate.scalar_type(), "gate");
  const Tensor G = with_contiguous_rows(grad_y);
  Tensor grad_gate = empty({want_gate ? args.M : 0, args.I}, gate.scalar_type());
  Tensor grad_up = empty({want_up ? args.M : 0, args.I}, gate.scalar_type());
  args.G = G.const_data_ptr(), args.ldg = leading_dimension(G), args.ld_grad = args.I;
  if (want_gate) args.grad_gate = grad_gate.mutable_data_ptr();
  if (want_up) args.grad_up = grad_up.mutable_data_ptr();
  kernels::swiglu_backward(args, host);
  return {grad_gate, grad_up};
}

// The halves of x [M, 2 I] as gate and up, with weights [M] fp32.
struct WeightedSwiglu : Swiglu {
  WeightedSwiglu(const Tensor& x, const Tensor& weights, int64_t activation)
      : Swiglu(half_of(x, 0), half_of(x, 1), activation) {
    check_shape(weights, "weights", {plain.M});
    STD_TORCH_CHECK(weights.is_contiguous() && weights.scalar_type() == ScalarType::Float,
                    "weights must be contiguous float32 values.");
    plain.weights = static_cast<const float*>(weights.const_data_ptr());
  }

 private:
  static Tensor half_of(Tensor x, int64_t which) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0, "x must have 2 dimensions, and columns in two halves.");
    return torch::stable::narrow(x, 1, which * (x.size(1) / 2), x.size(1) / 2);
  }
};

// x [M, 2 I], weights [M] -> y [M, I]
Tensor weighted_swiglu_op(const Tensor& x, const Tensor& weights, int64_t activation) {
  const Host host(x);
  WeightedSwiglu swiglu(x, weights, activation);
  Tensor y = empty({swiglu.plain.M, swiglu.plain.I}, x.scalar_type());
  swiglu.plain.Y = y.mutable_data_ptr();
  kernels::swiglu(swiglu.plain, host);
  return y;
}

// grad_y [M, I] -> (grad_x [M, 2 I], grad_weights [M] fp32 or, not wanted, [0])
std::tuple<Tensor, Tensor> weighted_swiglu_backward_op(const Tensor& grad_y, const Tensor& x, const Tensor& weights,
                                                       int64_t activation, bool want_weights) {
  const Host host(x);
  WeightedSwiglu swiglu(x, weights, activation);
  SwigluArgs& args = swiglu.plain;
  check_matrix(grad_y, "grad_y", args.M, args.I);
  check_dtype(grad_y, "grad_y", x.scalar_type(), "x");
  const Tensor G = with_contiguous_rows(grad_y);
  Tensor grad_x = empty({args.M, 2 * args.I}, x.scalar_type());
  Tensor grad_weights = empty({want_weights ? args.M : 0}, ScalarType::Float);
  args.G = G.const_data_ptr(), args.ldg = leading_dimension(G), args.ld_grad = 2 * args.I;
  args.grad_gate = grad_x.mutable_data_ptr();
  args.grad_up = static_cast<char*>(args.grad_gate) + args.I * static_cast<int64_t>(grad_x.element_size());
  if (want_weights) args.grad_weights = static_cast<float*>(grad_weights.mutable_data_ptr());
  kernels::swiglu_backward(args, host);
  return {grad_x, grad_weights};
}

struct RmsNorm {
  Tensor x;
  Bias weight;
  ScalarType out;
  RmsNormArgs plain;

  RmsNorm(const Tensor& x_, const std::optional<Tensor>& weight_, double eps, double offset, bool cast_first)
      : x(checked(x_)), weight(weight_, {x.size(1)}, "weight"), out(x.scalar_type()) {
    // As torch promotes two floating dtypes.
    if (cast_first && weight_.has_value() && weight_->scalar_type() != out) out = ScalarType::Float;
    const DType dtype = dtype_of(x, "x");
    plain = {.M = x.size(0),
             .H = x.size(1),
             .dtype = dtype,
             .out = out == ScalarType::Float ? DType::f32 : dtype,
             .X = x.const_data_ptr(),
             .ldx = leading_dimension(x),
             .weight = weight.data(),
             .eps = static_cast<float>(eps),
             .offset = static_cast<float>(offset),
             .cast_first = cast_first};
  }

 private:
  static Tensor checked(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions here, got ", x.dim(), ".");
    check_matrix(x, "x", x.size(0), x.size(1));
    return with_contiguous_rows(x);
  }
};

// x [M, H] -> (y [M, H], rstd [M] fp32)
std::tuple<Tensor, Tensor> rms_norm_op(const Tensor& x, std::optional<Tensor> weight, double eps, double offset,
                                       bool cast_first) {
  const Host host(x);
  RmsNorm norm(x, weight, eps, offset, cast_first);
  Tensor y = empty({norm.plain.M, norm.plain.H}, norm.out), rstd = empty({norm.plain.M}, ScalarType::Float);
  norm.plain.Y = y.mutable_data_ptr();
  norm.plain.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  kernels::rms_norm(norm.plain, host);
  return {y, rstd};
}

// grad_y [M, H] -> (grad_x [M, H], grad_weight [H] fp32); what is not wanted comes back empty.
std::tuple<Tensor, Tensor> rms_norm_backward_op(const Tensor& grad_y, const Tensor& x, std::optional<Tensor> weight,
                                                const Tensor& rstd, double offset, bool cast_first, bool want_x,
                                                bool want_weight) {
  const Host host(x);
  RmsNorm norm(x, weight, 0.0, offset, cast_first);
  RmsNormArgs& args = norm.plain;
  check_matrix(grad_y, "grad_y", args.M, args.H);
  STD_TORCH_CHECK(grad_y.scalar_type() == norm.out, "grad_y must have the dtype of the result.");
  STD_TORCH_CHECK(on_device(rstd) && rstd.is_contiguous() && rstd.scalar_type() == ScalarType::Float &&
                      rstd.dim() == 1 && rstd.size(0) == args.M,
                  "rstd must be ", args.M, " contiguous float32 values ", the_device, ".");
  STD_TORCH_CHECK(weight.has_value() || !want_weight, "want_weight asks for a weight that is not there.");
  const Tensor G = with_contiguous_rows(grad_y);
  Tensor grad_x = empty({want_x ? args.M : 0, args.H}, x.scalar_type());
  Tensor grad_weight = empty({want_weight ? args.H : 0}, ScalarType::Float);
  args.G = G.const_data_ptr(), args.ldg = leading_dimension(G);
  args.rstd = static_cast<float*>(const_cast<void*>(rstd.const_data_ptr()));
  if (want_x) args.dX = grad_x.mutable_data_ptr();
  if (want_weight) args.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
  kernels::rms_norm_backward(args, host);
  return {grad_x, grad_weight};
}

// logits [M, V], in and out; targets int64 [M]; weights fp32 [M] or [1] -> losses [M] fp32
Tensor cross_entropy_op(const Tensor& logits, const Tensor& targets, const Tensor& weights, double scale, double cap,
                        bool want_gradient) {
  const Host host(logits);
  STD_TORCH_CHECK(logits.dim() == 2, "logits must have 2 dimensions here, got ", logits.dim(), ".");
  check_matrix(logits, "logits", logits.size(0), logits.size(1));
  const int64_t M = logits.size(0), V = logits.size(1);
  STD_TORCH_CHECK((V <= 1 || logits.stride(1) == 1) && (M <= 1 || logits.stride(0) >= V),
                  "logits must have contiguous rows: they are overwritten.");
  check_shape(targets, "targets", {M});
  STD_TORCH_CHECK(targets.is_contiguous() && targets.scalar_type() == ScalarType::Long,
                  "targets must be contiguous int64 values.");
  const bool weight_per_row = weights.dim() != 1 || weights.size(0) != 1;
  check_shape(weights, "weights", {weight_per_row ? M : 1});
  STD_TORCH_CHECK(weights.is_contiguous() && weights.scalar_type() == ScalarType::Float,
                  "weights must be contiguous float32 values.");
  Tensor losses = empty({M}, ScalarType::Float);
  kernels::cross_entropy({.M = M,
                          .V = V,
                          .dtype = dtype_of(logits, "logits"),
                          .logits = logits.mutable_data_ptr(),
                          .ld = leading_dimension(logits),
                          .targets = static_cast<const int64_t*>(targets.const_data_ptr()),
                          .weights = static_cast<const float*>(weights.const_data_ptr()),
                          .weight_per_row = weight_per_row,
                          .want_gradient = want_gradient,
                          .scale = static_cast<float>(scale),
                          .cap = static_cast<float>(cap),
                          .losses = static_cast<float*>(losses.mutable_data_ptr())},
                         host);
  return losses;
}

}  // namespace

void register_rowwise(torch::stable::detail::StableLibrary& library) {
  library.impl("swiglu", TORCH_BOX(&swiglu_op));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_op));
  library.impl("weighted_swiglu", TORCH_BOX(&weighted_swiglu_op));
  library.impl("weighted_swiglu_backward", TORCH_BOX(&weighted_swiglu_backward_op));
  library.impl("rms_norm", TORCH_BOX(&rms_norm_op));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_op));
  library.impl("cross_entropy", TORCH_BOX(&cross_entropy_op));
}

}  // namespace peftfast
