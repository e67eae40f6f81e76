// Every operator's schema, and where its kernels are registered. Faces, fakes and gradients: peftfast/ops.
#include <torch/csrc/stable/library.h>

#include "lora.h"

STABLE_TORCH_LIBRARY(peftfast, library) {
  library.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, "
      "float[] dropout, Tensor? seed, bool transposed) -> (Tensor y, Tensor u)");
  library.def(
      "lora_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor[] lora_A, Tensor[] lora_B, Tensor u, "
      "float[] scaling, float[] dropout, Tensor? seed, bool transposed, bool want_x, bool[] want_A, bool[] want_B) "
      "-> (Tensor grad_x, Tensor[] grad_A, Tensor[] grad_B)");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast, CPU, library) { peftfast::register_lora(library); }
