// The instruction sets compiled in, best first, and the one in use.
#pragma once

#include "../kernels.h"

namespace peftfast::cpu {

struct IsaInfo {
  const char* name;
  bool supported;
};
int isa_count();
IsaInfo isa_info(int index);
const char* isa_in_use();  // a PEFTFAST_CPU_ISA that cannot run throws std::invalid_argument

// FLOP per second of back-to-back multiply-adds, as the kernels use them for `dtype`: the ceiling of a benchmark.
double machine_peak(DType dtype, const Threads& threads);

}  // namespace peftfast::cpu
