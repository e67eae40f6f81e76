// AVX-512 F, BW, VL and DQ: 16 floats. The members are described in simd_scalar.h.
#pragma once

#include "generic/convert.h"

namespace peftfast::cpu {
namespace {

struct Avx512 {
  using F = __m512;
  using U = __m512i;
  static constexpr int width = 16;
  // 24 accumulators, 4 vectors of the panel and 1 of X: 29 of 32 registers.
  static constexpr int tile_rows = 6, tile_vectors = 4;
  static constexpr bool has_bf16_dot = false, has_matrix_tiles = false;

  PEFTFAST_INLINE static F zero() { return _mm512_setzero_ps(); }
  PEFTFAST_INLINE static F set1(float x) { return _mm512_set1_ps(x); }
  PEFTFAST_INLINE static F set1(const f16* x) {
    return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(x->bits)));
  }
  PEFTFAST_INLINE static F set1_first(const bf16* pair) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(set1_pair(pair), 16));
  }
  PEFTFAST_INLINE static F set1_second(const bf16* pair) {
    return _mm512_castsi512_ps(_mm512_and_si512(set1_pair(pair), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  PEFTFAST_INLINE static F load(const float* p) { return _mm512_loadu_ps(p); }
  PEFTFAST_INLINE static F load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(p)), 16));
  }
  PEFTFAST_INLINE static F load(const f16* p) { return _mm512_cvtph_ps(load_half(p)); }
  PEFTFAST_INLINE static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  PEFTFAST_INLINE static void store(bf16* p, F x) {
    const U bits = _mm512_castps_si512(x);
    const U odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const U rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    store_half(p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0))));
  }
  PEFTFAST_INLINE static void store(f16* p, F x) { store_half(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
  PEFTFAST_INLINE static F add(F a, F b) { return _mm512_add_ps(a, b); }
  PEFTFAST_INLINE static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  PEFTFAST_INLINE static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  PEFTFAST_INLINE static F now(F x) {
#if !defined(PEFTFAST_EMULATE_AVX512)  // there x is no register
    asm volatile("" : "+v"(x));
#endif
    return x;
  }
  PEFTFAST_INLINE static F fma_now(F a, F b, F c) { return now(fma(a, b, c)); }
  PEFTFAST_INLINE static void sum(F a, F b, F c, F d, float (&sums)[4]) {
    const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(fold(a), fold(b)), _mm256_hadd_ps(fold(c), fold(d)));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }
  // Four rounds that each exchange ever larger blocks: single floats, pairs, quarters, halves.
  PEFTFAST_INLINE static void transpose(F (&r)[16]) {
    F t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 16; i += 8)
      for (int j = 0; j < 4; ++j) {
        t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
        t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
      }
    for (int j = 0; j < 8; ++j) {
      r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
      r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
    }
  }
  PEFTFAST_INLINE static void transpose(U (&r)[16]) {
    F t[16];
    for (int i = 0; i < 16; ++i) t[i] = _mm512_castsi512_ps(r[i]);
    transpose(t);
    for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(t[i]);
  }
  PEFTFAST_INLINE static F keep(F x, const uint32_t* words, uint32_t threshold) {
    const U word = _mm512_loadu_si512(words);
    return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(word, _mm512_set1_epi32(static_cast<int>(threshold))), x);
  }

  using Codebook = F;
  PEFTFAST_INLINE static Codebook codebook(const float* values) { return load(values); }
  PEFTFAST_INLINE static F decode(const Codebook& values, U codes) { return _mm512_permutexvar_ps(codes, values); }
  PEFTFAST_INLINE static U consecutive_codes(const uint8_t* p) {
    int32_t bits[2];
    std::memcpy(bits, p, sizeof(bits));
    const U both = _mm512_inserti64x4(_mm512_set1_epi32(bits[0]), _mm256_set1_epi32(bits[1]), 1);
    return _mm512_srlv_epi32(both, _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4));
  }
  // 128 codes at once, 8 vectors of them: a lane of each holds the codes of one word.
  template <bool>
  using ChunkCodebook = F;
  template <bool>
  PEFTFAST_INLINE static F chunk_codebook(const float* values) {
    return load(values);
  }
  PEFTFAST_INLINE static void decode_chunk(const F& book, const uint8_t* p, F (&out)[8]) {
    const U words = load_words(p);
    out[0] = decode(book, shift_right<4>(words)), out[1] = decode(book, words);
    out[2] = decode(book, shift_right<12>(words)), out[3] = decode(book, shift_right<8>(words));
    out[4] = decode(book, shift_right<20>(words)), out[5] = decode(book, shift_right<16>(words));
    out[6] = decode(book, shift_right<28>(words)), out[7] = decode(book, shift_right<24>(words));
  }
  template <bool>
  static constexpr int chunk_element(int vector, int lane) {
    return 8 * lane + vector;
  }
  // The table's 256 values lie in 16 registers: 8 have their lower halves, of 16 bits, 8 their upper ones.
  static int64_t look_up_bytes(const float* table, const uint8_t* codes, int64_t count, float* out) {
    if (count < 64) return 0;
    const U lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const U even = _mm512_or_si512(_mm512_slli_epi32(lanes, 2), _mm512_slli_epi32(lanes, 18));  // 4 i of both lanes
    const U lower = _mm512_add_epi32(even, _mm512_set1_epi32(2 << 16));
    const U upper = _mm512_add_epi32(lower, _mm512_set1_epi16(1));
    U lows[8], highs[8];
    for (int i = 0; i < 8; ++i) {
      const U first = load_words(table + 32 * i), second = load_words(table + 32 * i + 16);
      lows[i] = _mm512_permutex2var_epi16(first, lower, second);
      highs[i] = _mm512_permutex2var_epi16(first, upper, second);
    }
    int64_t done = 0;
    for (; done + 32 <= count; done += 32) {
      // Four codes of the first 16 beside four of the others in each quarter, which unpacking parts again.
      const __m256i bytes = _mm256_permutevar8x32_epi32(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + done)), _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
      const U place = _mm512_cvtepi8_epi16(bytes);  // of which the lowest eight bits matter
      const auto beyond_64 = _mm512_test_epi16_mask(place, _mm512_set1_epi16(64));
      const auto beyond_128 = _mm512_test_epi16_mask(place, _mm512_set1_epi16(128));
      const auto find = [&](const U(&half)[8]) __attribute__((always_inline)) {
        const auto quarter = [&](int i) __attribute__((always_inline)) {
          return _mm512_permutex2var_epi16(half[i], place, half[i + 1]);
        };
        return _mm512_mask_blend_epi16(beyond_128, _mm512_mask_blend_epi16(beyond_64, quarter(0), quarter(2)),
                                       _mm512_mask_blend_epi16(beyond_64, quarter(4), quarter(6)));
      };
      const U low = find(lows), high = find(highs);
      store_words(reinterpret_cast<uint32_t*>(out + done), _mm512_unpacklo_epi16(low, high));
      store_words(reinterpret_cast<uint32_t*>(out + done + 16), _mm512_unpackhi_epi16(low, high));
    }
    return done;
  }
  // Of a chunk's lanes, from one scale for each `run` codes, 32 or 64.
  PEFTFAST_INLINE static U chunk_scale_places(int64_t run) {
    const U lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return run == 64 ? shift_right<3>(lanes) : shift_right<2>(lanes);
  }
  PEFTFAST_INLINE static F chunk_scales(const float* scales, U places) {
    return _mm512_permutexvar_ps(places, _mm512_castps128_ps512(_mm_loadu_ps(scales)));
  }
  PEFTFAST_INLINE static U count_above(U count, F x, F bound) {
    return _mm512_mask_add_epi32(count, _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), count, _mm512_set1_epi32(1));
  }
  PEFTFAST_INLINE static U magnitude(F x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
  }

  PEFTFAST_INLINE static U load_words(const void* p) { return _mm512_loadu_si512(p); }
  PEFTFAST_INLINE static void store_words(uint32_t* p, U x) { _mm512_storeu_si512(p, x); }
  PEFTFAST_INLINE static U max(U a, U b) { return _mm512_max_epu32(a, b); }
  template <int n>
  PEFTFAST_INLINE static U shift_right(U x) {
    return _mm512_srli_epi32(x, n);
  }
  PEFTFAST_INLINE static U words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  using Wide = __m512i;
  static constexpr int wide_width = 8;
  PEFTFAST_INLINE static Wide wide(uint32_t x) { return words(x); }
  PEFTFAST_INLINE static Wide wide_counting_from(uint32_t x) {
    return _mm512_add_epi32(words(x), _mm512_set_epi32(0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0));
  }
  PEFTFAST_INLINE static Wide multiply(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
  PEFTFAST_INLINE static Wide upper(Wide x) { return _mm512_srli_epi64(x, 32); }
  PEFTFAST_INLINE static Wide exclusive_or(Wide a, Wide b, Wide c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  PEFTFAST_INLINE static void store_interleaved(uint32_t* p, Wide a, Wide b, Wide c, Wide d) {
    const Wide ab = _mm512_mask_mov_epi32(a, 0xaaaa, _mm512_slli_epi64(b, 32));
    const Wide cd = _mm512_mask_mov_epi32(c, 0xaaaa, _mm512_slli_epi64(d, 32));
    const Wide first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0),
               second = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi64(ab, first, cd));
    _mm512_storeu_si512(p + 16, _mm512_permutex2var_epi64(ab, second, cd));
  }

 protected:
  PEFTFAST_INLINE static __m256 fold(F a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  }
  PEFTFAST_INLINE static U set1_pair(const bf16* pair) {
    int32_t bits;
    std::memcpy(&bits, pair, sizeof(bits));
    return _mm512_set1_epi32(bits);
  }
  PEFTFAST_INLINE static __m256i load_half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  PEFTFAST_INLINE static void store_half(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
};

}  // namespace
}  // namespace peftfast::cpu
