// 4-bit weights as arguments of operators, and the fourbit family's implementations, for library.cpp.
#pragma once

#include <optional>

#include "checks.h"

namespace peftfast {

// Types are numbers here, not names: the stable interface never frees a string.
inline FourBitType type_of(int64_t quant_type) {
  STD_TORCH_CHECK(quant_type == 0 || quant_type == 1, "quant_type must be 0 (nf4) or 1 (fp4), got ", quant_type, ".");
  return static_cast<FourBitType>(quant_type);
}

inline bool is_power_of_two(int64_t x) { return x > 0 && (x & (x - 1)) == 0; }

inline void check_blocksize(int64_t blocksize) {
  STD_TORCH_CHECK(is_power_of_two(blocksize) && blocksize >= 32 && blocksize <= 4096,
                  "blocksize must be a power of two from 32 to 4096, got ", blocksize, ".");
}

inline const void* checked(const Tensor& t, const char* name, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(on_device(t) && t.is_contiguous() && t.scalar_type() == type, name, " must be contiguous ",
                  type == ScalarType::Byte ? "uint8" : "float32", " ", the_device, ".");
  STD_TORCH_CHECK(t.numel() == count, name, " has ", t.numel(), " elements, expected ", count, ".");
  return t.const_data_ptr();
}

// A 4-bit matrix of `count` elements; the tensors stay the caller's.
inline FourBitMatrix matrix_of(const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
                               const std::optional<Tensor>& nested_code, const std::optional<Tensor>& nested_offset,
                               int64_t blocksize, int64_t nested_blocksize, int64_t quant_type, int64_t count) {
  check_blocksize(blocksize);
  FourBitMatrix W{};
  W.type = type_of(quant_type);
  W.packed = static_cast<const uint8_t*>(checked(packed, "packed", ScalarType::Byte, (count + 1) / 2));
  W.blocksize = blocksize;
  const int64_t blocks = (count + blocksize - 1) / blocksize;
  if (!nested_absmax.has_value()) {
    W.absmax = static_cast<const float*>(checked(absmax, "absmax", ScalarType::Float, blocks));
    return W;
  }
  STD_TORCH_CHECK(nested_code.has_value() && nested_offset.has_value(),
                  "nested_code and nested_offset must come with nested_absmax.");
  STD_TORCH_CHECK(is_power_of_two(nested_blocksize), "nested_blocksize must be a power of two, got ", nested_blocksize,
                  ".");
  W.absmax_codes = static_cast<const uint8_t*>(checked(absmax, "absmax", ScalarType::Byte, blocks));
  W.nested_absmax = static_cast<const float*>(
      checked(*nested_absmax, "nested_absmax", ScalarType::Float, (blocks + nested_blocksize - 1) / nested_blocksize));
  W.nested_code = static_cast<const float*>(checked(*nested_code, "nested_code", ScalarType::Float, 256));
  W.nested_offset = static_cast<const float*>(checked(*nested_offset, "nested_offset", ScalarType::Float, 1));
  W.nested_blocksize = nested_blocksize;
  return W;
}

inline ScalarType scalar_type_of(DType dtype) {
  return dtype == DType::f32 ? ScalarType::Float : dtype == DType::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
}

inline DType numbered_dtype(int64_t number, const char* argument) {
  STD_TORCH_CHECK(number >= 0 && number < dtype_count, argument,
                  " must be 0 (float32), 1 (bfloat16) or 2 (float16), got ", number, ".");
  return static_cast<DType>(number);
}

void register_fourbit(torch::stable::detail::StableLibrary& library);

}  // namespace peftfast
