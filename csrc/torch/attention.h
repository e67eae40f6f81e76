// The implementations of the attention family, for library.cpp.
#pragma once

#include <torch/csrc/stable/library.h>

namespace peftfast {

void register_attention(torch::stable::detail::StableLibrary& library);

}  // namespace peftfast
