// peftfast::grouped_linear, moe_combine and their backwards: from tensors to the kernels' arguments.
#include "moe.h"

#include <tuple>

#include "adapters.h"
#include "fourbit.h"

namespace peftfast {
namespace {

const int64_t* int64s(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(on_device(t) && t.is_contiguous() && t.scalar_type() == ScalarType::Long && t.numel() == count, name,
                  " must be ", count, " contiguous int64 values ", the_device, ".");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// Groups whose offsets ascend within M rows and whose experts and slots exist; on a GPU, where reading them would mean
// to wait, whoever calls answers for that.
Groups groups_of(const Tensor& offsets, const Tensor& experts, const Tensor& slots, int64_t M, int64_t expert_count,
                 int64_t slot_count) {
  const int64_t count = experts.numel();
  const Groups groups{count, int64s(offsets, "offsets", count + 1), int64s(experts, "experts", count),
                      int64s(slots, "slots", count)};
  if constexpr (!host_reads_tensors) return groups;
  STD_TORCH_CHECK(groups.offsets[0] >= 0 && groups.offsets[count] <= M, "offsets must be within [0, ", M, "].");
  for (int64_t g = 0; g < count; ++g) {
    STD_TORCH_CHECK(groups.offsets[g] <= groups.offsets[g + 1], "offsets must ascend.");
    STD_TORCH_CHECK(groups.experts[g] >= 0 && groups.experts[g] < expert_count, "experts must be in [0, ", expert_count,
                    "), got ", groups.experts[g], ".");
    STD_TORCH_CHECK(groups.slots[g] < slot_count, "slots must be below ", slot_count, ", got ", groups.slots[g], ".");
  }
  return groups;
}

// The weights of all experts: dense [experts, N, K] (or [experts, K, N]), the same in 4 bits, or none.
struct Weights {
  std::optional<Tensor> dense;
  BaseWeight plain{};
  int64_t experts, N, K;

  Weights(const std::optional<Tensor>& weight, const std::optional<Tensor>& absmax,
          const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
          const std::optional<Tensor>& nested_offset, int64_t blocksize, int64_t nested_blocksize, int64_t quant_type,
          const std::vector<int64_t>& shape, bool transposed, ScalarType type, int64_t compute_dtype)
      : dense(weight) {
    STD_TORCH_CHECK(shape.size() == 3 && shape[0] >= 0 && shape[1] >= 0 && shape[2] >= 0,
                    "weight must have 3 dimensions, got ", shape.size(), ".");
    experts = shape[0], N = shape[transposed ? 2 : 1], K = shape[transposed ? 1 : 2];
    plain.transposed = transposed;
    plain.ld = shape[2];
    if (!weight.has_value()) return;
    STD_TORCH_CHECK(on_device(*weight), "weight must be ", the_device, ".");
    if (absmax.has_value()) {
      plain.fourbit = matrix_of(*weight, *absmax, nested_absmax, nested_code, nested_offset, blocksize,
                                nested_blocksize, quant_type, experts * N * K);
      plain.compute = numbered_dtype(compute_dtype, "compute_dtype");
    } else {
      STD_TORCH_CHECK(weight->dim() == 3 && weight->numel() == experts * N * K, "weight has shape ",
                      shape_text(*weight), ", expected [", shape[0], ", ", shape[1], ", ", shape[2], "].");
      check_dtype(*weight, "weight", type, "x");
      dense = as_contiguous(*weight);
      plain.dense = dense->const_data_ptr();
    }
  }
};

struct Stack {
  std::optional<Tensor> A;
  LoraStack plain{};

  Stack(const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B, double scaling, double dropout,
        int64_t N, int64_t K, DType base) {
    STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value(), "lora_A and lora_B must come together.");
    if (!lora_A.has_value()) return;
    STD_TORCH_CHECK(on_device(*lora_A) && on_device(*lora_B), "lora_A and lora_B must be ", the_device, ".");
    STD_TORCH_CHECK(lora_A->dim() == 3 && lora_A->size(2) == K, "lora_A has shape ", shape_text(*lora_A),
                    ", expected [slots, rank, ", K, "].");
    const int64_t slots = lora_A->size(0), rank = lora_A->size(1);
    STD_TORCH_CHECK(lora_B->dim() == 3 && lora_B->size(0) == slots && lora_B->size(1) == N && lora_B->size(2) == rank,
                    "lora_B has shape ", shape_text(*lora_B), ", expected [", slots, ", ", N, ", ", rank, "].");
    check_dtype(*lora_B, "lora_B", lora_A->scalar_type(), "lora_A");
    const DType dtype = dtype_of(*lora_A, "lora_A");
    STD_TORCH_CHECK(dtype == base || dtype == DType::f32, "lora_A must be float32 or have the dtype of x.");
    STD_TORCH_CHECK(dropout >= 0 && dropout < 1, "dropout must be in [0, 1), got ", dropout, ".");
    A = as_contiguous(*lora_A);
    plain = {.slots = slots,
             .rank = rank,
             .dtype = dtype,
             .A = A->const_data_ptr(),
             .B = lora_B->const_data_ptr(),
             .B_strides = {lora_B->stride(0), lora_B->stride(1), lora_B->stride(2)},
             .scaling = static_cast<float>(scaling),
             .dropout = static_cast<float>(dropout)};
  }
};

// x [M, K] in groups, weight [experts, N, K] or none -> (y [M, N], u [M, rank] fp32)
std::tuple<Tensor, Tensor> grouped_linear_op(const Tensor& x, std::optional<Tensor> weight,
                                             std::optional<Tensor> absmax, std::optional<Tensor> nested_absmax,
                                             std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset,
                                             int64_t blocksize, int64_t nested_blocksize, int64_t quant_type,
                                             std::vector<int64_t> shape, bool transposed, const Tensor& offsets,
                                             const Tensor& experts, const Tensor& slots, std::optional<Tensor> bias,
                                             std::optional<Tensor> lora_A, std::optional<Tensor> lora_B, double scaling,
                                             double dropout, std::optional<Tensor> seed, int64_t compute_dtype) {
  const Host host(x);
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions here, got ", x.dim(), ".");
  const Weights W(weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, quant_type,
                  shape, transposed, x.scalar_type(), compute_dtype);
  const int64_t M = x.size(0);
  check_matrix(x, "x", M, W.K);
  const DType dtype = dtype_of(x, "x");
  const Stack stack(lora_A, lora_B, scaling, dropout, W.N, W.K, dtype);
  std::optional<Tensor> bias32;
  if (bias.has_value()) {
    check_matrix(*bias, "bias", W.experts, W.N);
    dtype_of(*bias, "bias");
    bias32 = as_contiguous(torch::stable::to(*bias, ScalarType::Float));
  }
  const Tensor X = with_contiguous_rows(x);
  Tensor y = empty({M, W.N}, x.scalar_type()), u = empty({M, stack.plain.rank}, ScalarType::Float);
  kernels::grouped_linear({.M = M,
                           .N = W.N,
                           .K = W.K,
                           .dtype = dtype,
                           .groups = groups_of(offsets, experts, slots, M, W.experts, stack.plain.slots),
                           .X = X.const_data_ptr(),
                           .ldx = leading_dimension(X),
                           .W = W.plain,
                           .bias = bias32 ? static_cast<const float*>(bias32->const_data_ptr()) : nullptr,
                           .lora = stack.plain,
                           .seed = seed_of(seed, stack.plain.dropout > 0),
                           .U = static_cast<float*>(u.mutable_data_ptr()),
                           .Y = y.mutable_data_ptr()},
                          host);
  return {y, u};
}

// grad_y [M, N] -> (grad_x [M, K], grad_A, grad_B); what is not wanted comes back empty.
std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward_op(
    const Tensor& grad_y, const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> absmax,
    std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset,
    int64_t blocksize, int64_t nested_blocksize, int64_t quant_type, std::vector<int64_t> shape, bool transposed,
    const Tensor& offsets, const Tensor& experts, const Tensor& slots, std::optional<Tensor> lora_A,
    std::optional<Tensor> lora_B, const Tensor& u, double scaling, double dropout, std::optional<Tensor> seed,
    int64_t compute_dtype, bool want_x, bool want_A, bool want_B) {
  const Host host(x);
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions here, got ", x.dim(), ".");
  const Weights W(weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, quant_type,
                  shape, transposed, x.scalar_type(), compute_dtype);
  const int64_t M = x.size(0);
  check_matrix(x, "x", M, W.K);
  check_matrix(grad_y, "grad_y", M, W.N);
  check_dtype(grad_y, "grad_y", x.scalar_type(), "x");
  const DType dtype = dtype_of(x, "x");
  Stack stack(lora_A, lora_B, scaling, dropout, W.N, W.K, dtype);
  LoraStack& lora = stack.plain;
  check_matrix(u, "u", M, lora.rank);
  STD_TORCH_CHECK(u.scalar_type() == ScalarType::Float && u.is_contiguous(), "u must be contiguous float32.");
  const ScalarType type = lora_A.has_value() ? lora_A->scalar_type() : ScalarType::Float;
  want_A &= lora_A.has_value(), want_B &= lora_A.has_value();
  Tensor grad_x = empty({want_x ? M : 0, W.K}, x.scalar_type());
  Tensor grad_A = empty({want_A ? lora.slots : 0, lora.rank, W.K}, type);
  Tensor grad_B = empty({want_B ? lora.slots : 0, W.N, lora.rank}, type);
  if (want_A) lora.grad_A = grad_A.mutable_data_ptr();
  if (want_B) lora.grad_B = grad_B.mutable_data_ptr();
  const Tensor G = with_contiguous_rows(grad_y), X = want_A ? with_contiguous_rows(x) : x;
  const GroupedLinearArgs of{.M = M,
                             .N = W.N,
                             .K = W.K,
                             .dtype = dtype,
                             .groups = groups_of(offsets, experts, slots, M, W.experts, lora.slots),
                             .X = X.const_data_ptr(),
                             .ldx = leading_dimension(X),
                             .W = W.plain,
                             .lora = lora,
                             .seed = seed_of(seed, lora.dropout > 0),
                             .U = static_cast<float*>(const_cast<void*>(u.const_data_ptr()))};
  kernels::grouped_linear_backward(
      {of, G.const_data_ptr(), leading_dimension(G), want_x ? grad_x.mutable_data_ptr() : nullptr}, host);
  return {grad_x, grad_A, grad_B};
}

CombineArgs combine_args(const Tensor& x, const std::optional<Tensor>& weights, const Tensor& places) {
  STD_TORCH_CHECK(places.dim() == 2 && x.dim() == 2 && on_device(x) && x.is_contiguous(),
                  "x [tokens * top_k, H] must be contiguous ", the_device, ", and places [tokens, top_k].");
  CombineArgs args{.tokens = places.size(0), .top_k = places.size(1), .H = x.size(1), .dtype = dtype_of(x, "x")};
  STD_TORCH_CHECK(x.size(0) == places.numel(), "x has ", x.size(0), " rows, expected ", places.numel(), ".");
  args.X = x.const_data_ptr();
  args.places = int64s(places, "places", places.numel());
  for (int64_t i = 0; host_reads_tensors && i < places.numel(); ++i)
    STD_TORCH_CHECK(args.places[i] >= 0 && args.places[i] < x.size(0), "places must be in [0, ", x.size(0), ").");
  if (weights.has_value()) {
    check_matrix(*weights, "weights", args.tokens, args.top_k);
    args.weights = static_cast<const float*>(checked(*weights, "weights", ScalarType::Float, places.numel()));
  }
  return args;
}

// x [tokens * top_k, H] -> y [tokens, H]
Tensor moe_combine_op(const Tensor& x, std::optional<Tensor> weights, const Tensor& places) {
  const Host host(x);
  CombineArgs args = combine_args(x, weights, places);
  Tensor y = empty({args.tokens, args.H}, x.scalar_type());
  args.Y = y.mutable_data_ptr();
  kernels::combine(args, host);
  return y;
}

// grad_y [tokens, H] -> (grad_x [tokens * top_k, H], grad_weights [tokens, top_k])
std::tuple<Tensor, Tensor> moe_combine_backward_op(const Tensor& grad_y, const Tensor& x, std::optional<Tensor> weights,
                                                   const Tensor& places, bool want_weights) {
  const Host host(x);
  const CombineArgs of = combine_args(x, weights, places);
  check_matrix(grad_y, "grad_y", of.tokens, of.H);
  check_dtype(grad_y, "grad_y", x.scalar_type(), "x");
  const Tensor G = as_contiguous(grad_y);
  Tensor grad_x = empty({x.size(0), of.H}, x.scalar_type());
  Tensor grad_weights = empty({want_weights ? of.tokens : 0, of.top_k}, ScalarType::Float);
  kernels::combine_backward({of, G.const_data_ptr(), grad_x.mutable_data_ptr(),
                             want_weights ? static_cast<float*>(grad_weights.mutable_data_ptr()) : nullptr},
                            host);
  return {grad_x, grad_weights};
}

}  // namespace

void register_moe(torch::stable::detail::StableLibrary& library) {
  library.impl("grouped_linear", TORCH_BOX(&grouped_linear_op));
  library.impl("grouped_linear_backward", TORCH_BOX(&grouped_linear_backward_op));
  library.impl("moe_combine", TORCH_BOX(&moe_combine_op));
  library.impl("moe_combine_backward", TORCH_BOX(&moe_combine_backward_op));
}

}  // namespace peftfast
