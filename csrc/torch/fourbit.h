// The CPU implementations of the fourbit family, for library.cpp.
#pragma once

#include <torch/csrc/stable/library.h>

namespace peftfast {

void register_fourbit(torch::stable::detail::StableLibrary& library);

}  // namespace peftfast
