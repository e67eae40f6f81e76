// Checks that keep the kernels inside their memory, and the way from tensors to plain arguments. Messages name the
// argument, what came and what was wanted. The Python functions of peftfast.ops check first and raise ValueError or
// TypeError; these also guard a direct call of torch.ops.peftfast.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <span>
#include <string>
#include <vector>

#include "../kernels.h"
#include "host.h"

namespace peftfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16.");
  }
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(on_device(t), name, " must be ", the_device, ".");
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  std::string wanted;
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(static_cast<int64_t>(i)) == shape.begin()[i];
  if (same) return;
  for (const int64_t size : shape) wanted.append(wanted.empty() ? "" : ", ").append(std::to_string(size));
  STD_TORCH_CHECK(false, name, " has shape ", shape_text(t), ", expected [", wanted, "].");
}

inline void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check_shape(t, name, {rows, columns});
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType wanted, const char* as) {
  STD_TORCH_CHECK(t.scalar_type() == wanted, name, " must have the dtype of ", as, ".");
}

// torch's `empty` through the C interface: the stable header's own goes through the dispatcher and costs microseconds.
// Without strides it is contiguous.
inline Tensor empty(std::span<const int64_t> sizes, ScalarType dtype, const int64_t* strides = nullptr) {
  int64_t contiguous[4], count = 1;
  for (size_t i = sizes.size(); i-- > 0; count *= std::max<int64_t>(1, sizes[i])) contiguous[i] = count;
  AtenTensorHandle handle;
  // The interface does not say what went wrong, and with these arguments nothing else can.
  const AOTITorchError error = aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides ? strides : contiguous,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type(), device_index(), &handle);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, out_of_memory, " peftfast tried to allocate ", count, " elements.");
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const int64_t* strides = nullptr) {
  return empty(std::span(sizes.begin(), sizes.size()), dtype, strides);
}

inline Tensor contiguous_copy(const Tensor& t) {
  Tensor copy = empty(std::span(t.sizes().data(), t.sizes().size()), t.scalar_type());
  return torch::stable::copy_(copy, t);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : contiguous_copy(t); }

// The tensor itself when its rows are contiguous (rows may lie apart), else a contiguous copy.
inline Tensor with_contiguous_rows(const Tensor& t) {
  const bool contiguous = t.size(1) <= 1 || t.stride(1) == 1;
  const bool apart = t.size(0) <= 1 || t.stride(0) >= t.size(1);
  return contiguous && apart ? t : contiguous_copy(t);
}

// Elements between the starts of rows; what the stride of a single row says does not matter.
inline int64_t leading_dimension(const Tensor& t) { return t.size(0) <= 1 ? t.size(1) : t.stride(0); }

}  // namespace peftfast
