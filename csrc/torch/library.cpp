// Every operator's schema, and where its kernels are registered. Faces, fakes and gradients: peftfast/ops.
#include <torch/csrc/stable/library.h>

#include <string>

#include "adapter.h"
#include "attention.h"
#include "fourbit.h"
#include "lora.h"
#include "moe.h"
#include "rowwise.h"

#ifndef PEFTFAST_CUDA
STABLE_TORCH_LIBRARY(peftfast, library) {
  library.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, "
      "float[] dropout, Tensor? seed, bool transposed) -> (Tensor y, Tensor u)");
  library.def(
      "lora_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor[] lora_A, Tensor[] lora_B, Tensor u, "
      "float[] scaling, float[] dropout, Tensor? seed, bool transposed, bool want_x, bool[] want_A, bool[] want_B) "
      "-> (Tensor grad_x, Tensor[] grad_A, Tensor[] grad_B)");
  library.def("linear_into(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias) -> ()");

  // A 4-bit weight is given by its parts; the three optional ones say how an absmax of 8-bit codes is read.
  const std::string weight =
      "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset, int blocksize, "
      "int nested_blocksize, int quant_type, ";
  const auto def = [&](const std::string& schema) { library.def(schema.c_str()); };
  def("fourbit_quantize(Tensor weight, int blocksize, int quant_type) -> (Tensor packed, Tensor absmax)");
  def("fourbit_quantize_absmax(Tensor absmax, Tensor offset, Tensor code, int blocksize) "
      "-> (Tensor codes, Tensor nested_absmax)");
  def("fourbit_dequantize(" + weight + "SymInt rows, SymInt columns, int dtype) -> Tensor");
  def("fourbit_linear(Tensor x, " + weight +
      "SymInt out_features, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, float[] dropout, "
      "Tensor? seed, int compute_dtype) -> (Tensor y, Tensor u)");
  def("fourbit_linear_backward(Tensor grad_y, Tensor x, " + weight +
      "Tensor[] lora_A, Tensor[] lora_B, Tensor u, float[] scaling, float[] dropout, Tensor? seed, int compute_dtype, "
      "bool want_x, bool[] want_A, bool[] want_B) -> (Tensor grad_x, Tensor[] grad_A, Tensor[] grad_B)");

  // A stack of weights [experts, N, K] is dense, in 4 bits when there is an absmax, or absent: adapters alone. offsets,
  // experts and slots say which rows of x meet which weight and adapter.
  const std::string stack =
      "Tensor? weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset, int "
      "blocksize, "
      "int nested_blocksize, int quant_type, SymInt[] shape, bool transposed, Tensor offsets, Tensor experts, "
      "Tensor slots, ";
  def("grouped_linear(Tensor x, " + stack +
      "Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling, float dropout, Tensor? seed, int compute_dtype) "
      "-> (Tensor y, Tensor u)");
  def("grouped_linear_backward(Tensor grad_y, Tensor x, " + stack +
      "Tensor? lora_A, Tensor? lora_B, Tensor u, float scaling, float dropout, Tensor? seed, int compute_dtype, "
      "bool want_x, bool want_A, bool want_B) -> (Tensor grad_x, Tensor grad_A, Tensor grad_B)");
  def("moe_combine(Tensor x, Tensor? weights, Tensor places) -> Tensor");
  def("moe_combine_backward(Tensor grad_y, Tensor x, Tensor? weights, Tensor places, bool want_weights) "
      "-> (Tensor grad_x, Tensor grad_weights)");

  // scaling stands for a learned_scaling that is missing. The gradients come in the order of the tensors, x first.
  const std::string adapter =
      "Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? learned_scaling, ";
  def("bottleneck_adapter(Tensor x, Tensor? residual, " + adapter +
      "float scaling, int activation, float norm_eps, float dropout, Tensor? seed, bool residual_is_x) "
      "-> (Tensor y, Tensor z)");
  def("bottleneck_adapter_backward(Tensor grad_y, Tensor x, " + adapter +
      "Tensor z, float scaling, int activation, float norm_eps, float dropout, Tensor? seed, bool residual_is_x, "
      "bool[] want) -> Tensor[]");

  def("swiglu(Tensor gate, Tensor up, int activation) -> Tensor");
  def("swiglu_backward(Tensor grad_y, Tensor gate, Tensor up, int activation, bool want_gate, bool want_up) "
      "-> (Tensor grad_gate, Tensor grad_up)");
  def("weighted_swiglu(Tensor x, Tensor weights, int activation) -> Tensor");
  def("weighted_swiglu_backward(Tensor grad_y, Tensor x, Tensor weights, int activation, bool want_weights) "
      "-> (Tensor grad_x, Tensor grad_weights)");
  def("rms_norm(Tensor x, Tensor? weight, float eps, float offset, bool cast_first) -> (Tensor y, Tensor rstd)");
  def("rms_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor rstd, float offset, bool cast_first, "
      "bool want_x, bool want_weight) -> (Tensor grad_x, Tensor grad_weight)");
  def("cross_entropy(Tensor(a!) logits, Tensor targets, Tensor weights, float scale, float cap, bool want_gradient) "
      "-> Tensor losses");
  def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> (Tensor y, Tensor lse)");
  def("attention_backward(Tensor grad_y, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor y, Tensor lse, "
      "bool causal, float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast, CPU, library) {
  peftfast::register_adapter(library);
  peftfast::register_attention(library);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(peftfast, PEFTFAST_DISPATCH_KEY, library) {
  peftfast::register_lora(library);
  peftfast::register_fourbit(library);
  peftfast::register_moe(library);
  peftfast::register_rowwise(library);
}
