// The module that Python imports to load the operators; it tells facts of the build and the machine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "checks.h"

namespace {

double machine_peak(int dtype) {
  if (dtype < 0 || dtype >= peftfast::dtype_count) throw std::invalid_argument("dtype must be 0, 1 or 2.");
  return peftfast::cpu::machine_peak(static_cast<peftfast::DType>(dtype), peftfast::torch_threads());
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < peftfast::cpu::isa_count(); ++i) {
    const peftfast::cpu::IsaInfo info = peftfast::cpu::isa_info(i);
    if (info.supported) names.push_back(info.name);
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("isa_in_use", [] { return std::string(peftfast::cpu::isa_in_use()); });
  module.def("supported_isas", &supported_isas);
  module.def("machine_peak", &machine_peak, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.attr("version") = PEFTFAST_VERSION;
  module.attr("compiler") = PEFTFAST_COMPILER;
  module.attr("cuda") = PEFTFAST_CUDA_STATE;
}
