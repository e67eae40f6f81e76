// The CPU implementations of the lora family, for library.cpp.
#pragma once

#include <torch/csrc/stable/library.h>

namespace peftfast {

void register_lora(torch::stable::detail::StableLibrary& library);

}  // namespace peftfast
