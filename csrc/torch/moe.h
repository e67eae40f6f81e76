// The CPU implementations of the moe family, for library.cpp.
#pragma once

#include <torch/csrc/stable/library.h>

namespace peftfast {

void register_moe(torch::stable::detail::StableLibrary& library);

}  // namespace peftfast
