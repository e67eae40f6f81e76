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
struct Experts : Layer {
  std::optional<Tensor> tensor;
  int64_t count;

  Experts(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& absmax,
          const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
          const std::optional<Tensor>& nested_offset, int64_t blocksize, int64_t nested_blocksize, int64_t quant_type,
          const std::vector<int64_t>& shape, bool transposed, int64_t compute_dtype)
      : Layer{} {
    STD_TORCH_CHECK(shape.size() == 3 && shape[0] >= 0 && shape[1] >= 0 && shape[2] >= 0,
                    "weight must have 3 dimensions, got ", shape.size(), ".");
    count = shape[0], N = shape[transposed ? 2 : 1], K = shape[transposed ? 1 : 2];
    W.transposed = transposed;
    W.ld = shape[2];
    if (!weight.has_value()) return;
    if (absmax.has_value()) {
      W.fourbit = matrix_of(*weight, *absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize,
                            quant_type, count * N * K);
      W.compute = numbered_dtype(compute_dtype, "compute_dtype");
    } else {
      check_shape(*weight, "weight", {shape[0], shape[1], shape[2]});
      check_dtype(*weight, "weight", x.scalar_type(), "x");
      tensor = as_contiguous(*weight);
      W.dense = tensor->const_data_ptr();
    }
  }
};

AdapterList stack_of(const Tensor& x, const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B,
                     double scaling, double dropout, const Layer& layer) {
  STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value(), "lora_A and lora_B must come together.");
  const DType dtype = dtype_of(x, "x");
  if (!lora_A.has_value()) return AdapterList({}, {}, {}, {}, layer.K, layer.N, dtype, true);
  return AdapterList({*lora_A}, {*lora_B}, {scaling}, {dropout}, layer.K, layer.N, dtype, true);
}

int64_t slots_of(const AdapterList& stack) { return stack.plain.empty() ? 0 : stack.plain[0].slots; }

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
  Experts base(x, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, quant_type,
               shape, transposed, compute_dtype);
  const AdapterList stack = stack_of(x, lora_A, lora_B, scaling, dropout, base);
  base.groups = groups_of(offsets, experts, slots, x.size(0), base.count, slots_of(stack));
  return forward(host, x, base, Bias(bias, {base.count, base.N}).data(), stack, seed);
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
  Experts base(x, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, quant_type,
               shape, transposed, compute_dtype);
  AdapterList stack = stack_of(x, lora_A, lora_B, scaling, dropout, base);
  base.groups = groups_of(offsets, experts, slots, x.size(0), base.count, slots_of(stack));
  const size_t count = stack.plain.size();  // one or none
  const auto [grad_x, grad_A, grad_B] = backward(host, grad_y, x, base, stack, u, seed, want_x,
                                                 std::vector<bool>(count, want_A), std::vector<bool>(count, want_B));
  if (count == 0) return {grad_x, empty({0, 0, base.K}, ScalarType::Float), empty({0, base.N, 0}, ScalarType::Float)};
  return {grad_x, grad_A[0], grad_B[0]};
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
