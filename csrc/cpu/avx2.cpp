// The micro-kernels for AVX2 with FMA and F16C.
#include "generic/before_region.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "generic/lora.h"
#include "simd_avx2.h"

namespace peftfast::cpu {

extern const Table avx2_table = make_table<Avx2>();

}  // namespace peftfast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
