// AVX-512 with BF16: pairs of bf16 are multiplied and added to an fp32 lane in one instruction.
#pragma once

#include "simd_avx512.h"

namespace peftfast::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr bool has_bf16_dot = true;
  using Avx512::decode_chunk;
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

  // The values that the codes of two rows stand for, rounded as by round_pairs().
  PEFTFAST_INLINE static Pairs codebook_of_two(F first, F second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(bit_cast<__m256i>(_mm512_cvtneps_pbh(first))),
                              bit_cast<__m256i>(_mm512_cvtneps_pbh(second)), 1);
  }
  // 32 codes of either row: out[0] gets the pairs of the first 16.
  PEFTFAST_INLINE static void decode_two(Pairs values, const uint8_t* first, const uint8_t* second, Pairs (&out)[2]) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
    out[0] = look_up_two(values, _mm_unpacklo_epi64(a, b)), out[1] = look_up_two(values, _mm_unpackhi_epi64(a, b));
  }

  // The values that codes stand for, rounded as by round_pairs(), twice: an index has five bits, of which the first is
  // of another code.
  PEFTFAST_INLINE static Pairs codebook_of_one(F values) { return codebook_of_two(values, values); }
  // 128 codes at once, 4 vectors of them: a lane of each holds two codes of one word.
  PEFTFAST_INLINE static void decode_chunk(Pairs values, const uint8_t* p, Pairs (&out)[4]) {
    const U words = load_words(p);
    out[0] = _mm512_permutexvar_epi16(shift_right<4>(words), values);
    out[1] = _mm512_permutexvar_epi16(words, values);
    out[2] = _mm512_permutexvar_epi16(shift_right<12>(words), values);
    out[3] = _mm512_permutexvar_epi16(shift_right<8>(words), values);
  }

 private:
  // Each byte of the first row, in the lower half, to the low halves of two words of 32 bits, of the second to the high
  // ones; the first of two words is shifted to its code. The second row's values are 16 places further on.
  PEFTFAST_INLINE static Pairs look_up_two(Pairs values, __m128i rows) {
    const __m512i bytes = _mm512_shuffle_epi8(
        _mm512_broadcast_i32x4(rows),
        _mm512_set_epi8(-1, 15, -1, 7, -1, 15, -1, 7, -1, 14, -1, 6, -1, 14, -1, 6, -1, 13, -1, 5, -1, 13, -1, 5, -1,
                        12, -1, 4, -1, 12, -1, 4, -1, 11, -1, 3, -1, 11, -1, 3, -1, 10, -1, 2, -1, 10, -1, 2, -1, 9, -1,
                        1, -1, 9, -1, 1, -1, 8, -1, 0, -1, 8, -1, 0));
    const __m512i codes = _mm512_srlv_epi32(bytes, _mm512_set1_epi64(4));
    constexpr int and_then_or = 0xea;
    return _mm512_permutexvar_epi16(
        _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32(0x000f000f), _mm512_set1_epi32(0x00100000), and_then_or),
        values);
  }
};

}  // namespace
}  // namespace peftfast::cpu
