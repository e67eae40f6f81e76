// The micro-kernels for AVX-512.
#include "generic/before_region.h"

#if defined(PEFTFAST_EMULATE_AVX512)  // no region: plain C++
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif

#include "generic/lora.h"
#include "simd_avx512.h"

namespace peftfast::cpu {

extern const Table avx512_table = make_table<Avx512>();

}  // namespace peftfast::cpu

#if defined(PEFTFAST_EMULATE_AVX512)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
