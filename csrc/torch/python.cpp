// The module that Python imports to load the operators; it tells facts of the build and the machine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "checks.h"

#ifdef PEFTFAST_EMULATE_CUDA
#include <tuple>

#include "../cuda/steps.h"
#endif

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

#ifdef PEFTFAST_EMULATE_CUDA
// Which GPU kernel a base product of M rows would run on: its name, its rows at a time, whether W is decoded first, and
// how many blocks part the reduction.
std::tuple<std::string, int, bool, int64_t> cuda_choice(int64_t M, int64_t N, int64_t K, int64_t groups, int dtype,
                                                        int compute, bool four_bit, bool reduction_contiguous,
                                                        bool dropout, bool hopper, int decoding, int multiprocessors) {
  namespace cuda = peftfast::cuda;
  static const int64_t offsets[1] = {};
  cuda::Linear args{.rows = {M, {groups, groups > 1 ? offsets : nullptr}},
                    .P = N,
                    .Q = K,
                    .dtype = static_cast<peftfast::DType>(dtype),
                    .compute = static_cast<peftfast::DType>(compute),
                    .W = {.fourbit = {.blocksize = four_bit ? 64 : 0}},
                    .reduction_contiguous = reduction_contiguous,
                    .dropout = dropout};
  const cuda::Choice choice = cuda::pick(args, hopper, static_cast<cuda::Decoding>(decoding));
  const char* names[] = {"plain", "few", "tiled", "hopper"};
  return {names[choice.kernel], choice.tile_rows, choice.decode_first, cuda::splits_of(args, choice, multiprocessors)};
}

// How the blocks of one pass over G part its columns and its rows, and whether two passes are better.
std::tuple<int64_t, int64_t, bool> cuda_one_pass(int64_t M, int64_t N, int64_t R, int multiprocessors) {
  namespace cuda = peftfast::cuda;
  const cuda::OnePass pass = cuda::one_pass(M, N, R, cuda::ceil_div(R, cuda::rank_tile), multiprocessors);
  return {pass.column_splits, pass.row_splits, pass.pays};
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("isa_in_use", [] { return std::string(peftfast::cpu::isa_in_use()); });
  module.def("supported_isas", &supported_isas);
  module.def("machine_peak", &machine_peak, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.attr("version") = PEFTFAST_VERSION;
  module.attr("compiler") = PEFTFAST_COMPILER;
  module.attr("cuda") = PEFTFAST_CUDA_STATE;
#ifdef PEFTFAST_EMULATE_CUDA
  module.def("cuda_choice", &cuda_choice);
  module.def("cuda_one_pass", &cuda_one_pass);
#endif
}
