// For tests on machines without AVX-512: the intrinsics that simd_avx512*.h use, written in C++. SIMDe has most of
// them; those that the release in Debian 12 lacks, or has otherwise, follow.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES  // the intrinsics by their own names
#include <simde/x86/avx512.h>

#include "generic/convert.h"

namespace peftfast::cpu {
namespace {

using __mmask16 = simde__mmask16;

template <class T>
struct Lanes {
  T lane[16];
};

template <class T, class Vector>
inline Lanes<T> lanes(const Vector& v) {
  return bit_cast<Lanes<T>>(v);
}

template <class To, class From, class F>
inline Lanes<To> map_lanes(const Lanes<From>& from, F f) {
  Lanes<To> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = f(from.lane[i]);
  return to;
}

// SIMDe's rounds the product too, which the rule of accuracy notices.
#undef _mm512_fmadd_ps
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  Lanes<float> sum = lanes<float>(c);
  for (int i = 0; i < 16; ++i)
    sum.lane[i] = static_cast<float>(double{lanes<float>(a).lane[i]} * lanes<float>(b).lane[i] + sum.lane[i]);
  return bit_cast<__m512>(sum);
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  return bit_cast<__m512>(map_lanes<float>(lanes<f16>(a), [](f16 x) { return to_float(x); }));
}
inline __m256i _mm512_cvtps_ph(__m512 a, int) {
  return bit_cast<__m256i>(map_lanes<f16>(lanes<float>(a), [](float x) { return from_float<f16>(x); }));
}
inline __m256i _mm512_cvtneps_pbh(__m512 a) {
  return bit_cast<__m256i>(map_lanes<bf16>(lanes<float>(a), [](float x) { return from_float<bf16>(x); }));
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return bit_cast<__m512i>(map_lanes<uint32_t>(lanes<uint16_t>(a), [](uint16_t x) { return uint32_t{x}; }));
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return bit_cast<__m256i>(
      map_lanes<uint16_t>(lanes<uint32_t>(a), [](uint32_t x) { return static_cast<uint16_t>(x); }));
}
inline __m256 _mm512_extractf32x8_ps(__m512 a, int half) {
  __m256 result;
  std::memcpy(&result, reinterpret_cast<const char*>(&a) + 32 * half, 32);
  return result;
}
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int control) {
  __m512 result;
  for (int i = 0; i < 4; ++i)
    std::memcpy(reinterpret_cast<char*>(&result) + 16 * i,
                reinterpret_cast<const char*>(i < 2 ? &a : &b) + 16 * ((control >> (2 * i)) & 3), 16);
  return result;
}

}  // namespace
}  // namespace peftfast::cpu
