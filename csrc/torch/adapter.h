// The CPU implementations of the adapter family, for library.cpp.
#pragma once

#include <torch/csrc/stable/library.h>

namespace peftfast {

void register_adapter(torch::stable::detail::StableLibrary& library);

}  // namespace peftfast
