// The micro-kernels for AMX with BF16. What is not assembly in simd_amx.h is AVX-512 with BF16.
#include "generic/before_region.h"

#if defined(PEFTFAST_EMULATE_AVX512)  // no region: plain C++
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

#include "generic/lora.h"
#include "simd_amx.h"

namespace peftfast::cpu {

extern const Table amx_table = make_table<Amx>();

}  // namespace peftfast::cpu

#if defined(PEFTFAST_EMULATE_AVX512)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
