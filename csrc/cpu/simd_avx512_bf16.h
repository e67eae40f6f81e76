// AVX-512 with BF16: pairs of bf16 are multiplied and added to an fp32 lane in one instruction.
#pragma once

#include "simd_avx512.h"

namespace peftfast::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr bool has_bf16_dot = true;
  using Pairs = __m512i;  // `width` pairs of bf16

  PEFTFAST_INLINE static Pairs load_pairs(const void* p) { return _mm512_loadu_si512(p); }
  PEFTFAST_INLINE static void store_pairs(void* p, Pairs x) { _mm512_storeu_si512(p, x); }
  PEFTFAST_INLINE static Pairs set1_pairs(const bf16* pair) { return set1_pair(pair); }
  // (first[i], second[i]) in lane i.
  PEFTFAST_INLINE static Pairs zip(const bf16* first, const bf16* second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(load_half(first)),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(second)), 16));
  }
  // The same of two vectors of floats, rounded; what is too small for a normal number becomes zero. store() has no use
  // for that instruction: dequantized values keep what is that small.
  PEFTFAST_INLINE static Pairs round_pairs(F first, F second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(bit_cast<__m256i>(_mm512_cvtneps_pbh(first))),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(bit_cast<__m256i>(_mm512_cvtneps_pbh(second))), 16));
  }
  PEFTFAST_INLINE static F dot(Pairs a, Pairs b, F c) {
    return _mm512_dpbf16_ps(c, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
  }
};

}  // namespace
}  // namespace peftfast::cpu
