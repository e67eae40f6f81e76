// What an instruction set's .cpp includes before it opens its target region. Functions of the standard library are
// shared with every other file of the program, so they must be compiled for the baseline.
#pragma once

#if defined(PEFTFAST_EMULATE_AVX512)
#include "../simd_emulated_avx512.h"
#else
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "../../fourbit_format.h"
#include "../../kernels.h"
#include "../../philox.h"
#include "../scratch.h"
#include "../table.h"
