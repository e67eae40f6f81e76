// What every linear operator has beside its weight: adapters, their gradients, a bias and a seed.
#pragma once

#include <optional>
#include <vector>

#include "checks.h"

namespace peftfast {

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

inline const int64_t* seed_of(const std::optional<Tensor>& seed, bool wanted) {
  if (!wanted) return nullptr;
  STD_TORCH_CHECK(seed.has_value() && on_device(*seed) && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                  "seed must be a one-element int64 tensor on the device of x when dropout is not 0.");
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

inline bool any_of(const std::vector<bool>& wanted) {
  return std::find(wanted.begin(), wanted.end(), true) != wanted.end();
}

// Room for the gradients that are wanted; the others stay empty.
struct Gradients {
  std::vector<Tensor> A, B;

  Gradients(AdapterList& adapters, const std::vector<bool>& want_A, const std::vector<bool>& want_B, int64_t N,
            int64_t K) {
    const size_t count = adapters.plain.size();
    STD_TORCH_CHECK(want_A.size() == count && want_B.size() == count,
                    "want_A and want_B must have one entry per adapter.");
    for (size_t i = 0; i < count; ++i) {
      LoraAdapter& adapter = adapters.plain[i];
      const ScalarType type = adapters.A[i].scalar_type();
      A.push_back(empty({want_A[i] ? adapter.rank : 0, K}, type));
      B.push_back(empty({want_B[i] ? N : 0, adapter.rank}, type));
      if (want_A[i]) adapter.grad_A = A[i].mutable_data_ptr();
      if (want_B[i]) adapter.grad_B = B[i].mutable_data_ptr();
    }
  }
};

// A bias, or another vector, in fp32, or none.
class Bias {
 public:
  Bias(const std::optional<Tensor>& bias, int64_t N, const char* name = "bias") {
    if (!bias.has_value()) return;
    STD_TORCH_CHECK(on_device(*bias) && bias->dim() == 1 && bias->size(0) == N, name, " has shape ", shape_text(*bias),
                    ", expected [", N, "] ", the_device, ".");
    dtype_of(*bias, name);
    fp32_ =
        as_contiguous(bias->scalar_type() == ScalarType::Float ? *bias : torch::stable::to(*bias, ScalarType::Float));
  }

  const float* data() const { return fp32_ ? static_cast<const float*>(fp32_->const_data_ptr()) : nullptr; }

 private:
  std::optional<Tensor> fp32_;
};

}  // namespace peftfast
