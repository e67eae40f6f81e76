// The micro-kernels for any machine.
#include "generic/lora.h"
#include "simd_scalar.h"

namespace peftfast::cpu {

extern const Table scalar_table = make_table<Scalar>();

}  // namespace peftfast::cpu
