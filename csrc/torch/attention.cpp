// The operators of the attention family: checks, allocation and the way to the kernels.
#include "../attention.h"

#include "attention.h"
#include "checks.h"

namespace peftfast {
namespace {

void check_vectors(const Tensor& t, const char* name, int64_t batch, int64_t heads, int64_t tokens, int64_t D) {
  check_shape(t, name, {batch, heads, tokens, D});
}

// The tensor itself when its vectors are contiguous, else a contiguous copy.
Tensor with_contiguous_vectors(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : contiguous_copy(t); }

Vectors vectors(const Tensor& t) {
  return {.data = t.const_data_ptr(), .batch = t.stride(0), .head = t.stride(1), .row = t.stride(2)};
}

// The arguments of both directions, and what they keep alive.
struct Attention {
  Tensor q, k, v, mask;
  AttentionArgs plain;

  Attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& mask_, bool causal,
            double scale)
      : q(checked(q_)), k(k_), v(v_), mask(q_) {
    STD_TORCH_CHECK(k.dim() == 4, "k must have 4 dimensions, got ", k.dim(), ".");
    const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3), kv_heads = k.size(1), S = k.size(2);
    check_vectors(k, "k", B, kv_heads, S, D);
    check_vectors(v, "v", B, kv_heads, S, D);
    check_dtype(k, "k", q.scalar_type(), "q");
    check_dtype(v, "v", q.scalar_type(), "q");
    STD_TORCH_CHECK(kv_heads > 0 ? H % kv_heads == 0 : H == 0, "k has ", kv_heads, " heads, which do not divide the ",
                    H, " of q.");
    STD_TORCH_CHECK(scale > 0, "scale must be positive, got ", scale, ".");
    k = with_contiguous_vectors(k), v = with_contiguous_vectors(v);
    plain = {.batch = B,
             .heads = H,
             .kv_heads = kv_heads,
             .T = T,
             .S = S,
             .D = D,
             .dtype = dtype_of(q, "q"),
             .Q = vectors(q),
             .K = vectors(k),
             .V = vectors(v),
             .causal = causal,
             .scale = static_cast<float>(scale)};
    if (!mask_.has_value()) return;
    check_shape(*mask_, "mask", {B, H, T, S});
    STD_TORCH_CHECK(mask_->scalar_type() == ScalarType::Bool, "mask must be bool.");
    mask = with_contiguous_vectors(*mask_);
    plain.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    for (int i = 0; i < 3; ++i) plain.mask_strides[i] = mask.stride(i);
  }

 private:
  static Tensor checked(const Tensor& q) {
    STD_TORCH_CHECK(q.dim() == 4, "q must have 4 dimensions, got ", q.dim(), ".");
    check_vectors(q, "q", q.size(0), q.size(1), q.size(2), q.size(3));
    return with_contiguous_vectors(q);
  }
};

// q [B, H, T, D]; k, v [B, kv_heads, S, D]; mask bool [B, H, T, S] -> (y [B, T, H, D], lse [B, H, T] fp32)
std::tuple<Tensor, Tensor> attention_op(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> mask,
                                        bool causal, double scale) {
  Attention attention(q, k, v, mask, causal, scale);
  AttentionArgs& args = attention.plain;
  Tensor y = empty({args.batch, args.T, args.heads, args.D}, q.scalar_type());
  Tensor lse = empty({args.batch, args.heads, args.T}, ScalarType::Float);
  args.Y = y.mutable_data_ptr(), args.lse = static_cast<float*>(lse.mutable_data_ptr());
  cpu::attention(args, torch_threads());
  return {y, lse};
}

// grad_y [B, H, T, D] -> (grad_q [B, T, H, D], grad_k, grad_v [B, S, kv_heads, D])
std::tuple<Tensor, Tensor, Tensor> attention_backward_op(const Tensor& grad_y, const Tensor& q, const Tensor& k,
                                                         const Tensor& v, std::optional<Tensor> mask, const Tensor& y,
                                                         const Tensor& lse, bool causal, double scale) {
  Attention attention(q, k, v, mask, causal, scale);
  AttentionArgs& args = attention.plain;
  check_vectors(grad_y, "grad_y", args.batch, args.heads, args.T, args.D);
  check_dtype(grad_y, "grad_y", q.scalar_type(), "q");
  check_shape(y, "y", {args.batch, args.T, args.heads, args.D});
  check_dtype(y, "y", q.scalar_type(), "q");
  check_shape(lse, "lse", {args.batch, args.heads, args.T});
  STD_TORCH_CHECK(y.is_contiguous() && lse.is_contiguous() && lse.scalar_type() == ScalarType::Float,
                  "y and lse must be as attention made them.");
  const Tensor G = with_contiguous_vectors(grad_y);
  Tensor grad_q = empty({args.batch, args.T, args.heads, args.D}, q.scalar_type());
  Tensor grad_k = empty({args.batch, args.S, args.kv_heads, args.D}, q.scalar_type());
  Tensor grad_v = empty({args.batch, args.S, args.kv_heads, args.D}, q.scalar_type());
  args.Y = const_cast<void*>(y.const_data_ptr());
  args.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  cpu::attention_backward({.of = args,
                           .G = vectors(G),
                           .dQ = grad_q.mutable_data_ptr(),
                           .dK = grad_k.mutable_data_ptr(),
                           .dV = grad_v.mutable_data_ptr()},
                          torch_threads());
  return {grad_q, grad_k, grad_v};
}

}  // namespace

void register_attention(torch::stable::detail::StableLibrary& library) {
  library.impl("attention", TORCH_BOX(&attention_op));
  library.impl("attention_backward", TORCH_BOX(&attention_backward_op));
}

}  // namespace peftfast
