// The implementations of the rowwise family, for library.cpp.
#pragma once

#include <torch/csrc/stable/library.h>

namespace peftfast {

void register_rowwise(torch::stable::detail::StableLibrary& library);

}  // namespace peftfast
