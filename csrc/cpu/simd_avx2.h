// AVX2, FMA and F16C: 8 floats. The members are described in simd_scalar.h.
#pragma once

#include <immintrin.h>

#include "generic/convert.h"

namespace peftfast::cpu {
namespace {

struct Avx2 {
  using F = __m256;
  using U = __m256i;
  static constexpr int width = 8;
  // 12 accumulators, 2 vectors of the panel and 1 of X: 15 of 16 registers, and enough independent
  // multiply-adds to cover their latency (4 cycles, two a cycle).
  static constexpr int tile_rows = 6, tile_vectors = 2;
  static constexpr bool has_bf16_dot = false, has_matrix_tiles = false;

  PEFTFAST_INLINE static F zero() { return _mm256_setzero_ps(); }
  PEFTFAST_INLINE static F set1(float x) { return _mm256_set1_ps(x); }
  PEFTFAST_INLINE static F set1(const f16* x) { return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(x->bits))); }
  PEFTFAST_INLINE static F set1_first(const bf16* pair) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(set1_pair(pair), 16));
  }
  PEFTFAST_INLINE static F set1_second(const bf16* pair) {
    alignas(32) static constexpr uint32_t upper_half[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                           0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
    F x;  // the mask stays in memory: register tiles take every register there is
    asm("vandps %2, %1, %0" : "=x"(x) : "x"(set1_pair(pair)), "m"(upper_half));
    return x;
  }
  PEFTFAST_INLINE static F load(const float* p) { return _mm256_loadu_ps(p); }
  PEFTFAST_INLINE static F load(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16));
  }
  PEFTFAST_INLINE static F load(const f16* p) { return _mm256_cvtph_ps(load_half(p)); }
  PEFTFAST_INLINE static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  PEFTFAST_INLINE static void store(bf16* p, F x) {
    const U bits = _mm256_castps_si256(x);
    const U odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const U rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const U is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const U result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
    store_half(p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08)));
  }
  PEFTFAST_INLINE static void store(f16* p, F x) { store_half(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
  PEFTFAST_INLINE static F add(F a, F b) { return _mm256_add_ps(a, b); }
  PEFTFAST_INLINE static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  PEFTFAST_INLINE static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  PEFTFAST_INLINE static F now(F x) {
    asm volatile("" : "+x"(x));
    return x;
  }
  PEFTFAST_INLINE static F fma_now(F a, F b, F c) {
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
    return c;
  }
  PEFTFAST_INLINE static void sum(F a, F b, F c, F d, float (&sums)[4]) {
    const F halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }
  PEFTFAST_INLINE static void transpose(F (&r)[8]) {
    F t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
  PEFTFAST_INLINE static void transpose(U (&r)[8]) {
    F t[8];
    for (int i = 0; i < 8; ++i) t[i] = _mm256_castsi256_ps(r[i]);
    transpose(t);
    for (int i = 0; i < 8; ++i) r[i] = _mm256_castps_si256(t[i]);
  }
  PEFTFAST_INLINE static F keep(F x, const uint32_t* words, uint32_t threshold) {
    const U limit = _mm256_set1_epi32(static_cast<int>(threshold));
    const U word = _mm256_loadu_si256(reinterpret_cast<const U*>(words));
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(word, limit), word)));
  }

  struct Codebook {
    F low, high;
  };
  PEFTFAST_INLINE static Codebook codebook(const float* values) { return {load(values), load(values + 8)}; }
  PEFTFAST_INLINE static F decode(const Codebook& values, U codes) {  // the fourth bit, moved to the sign, chooses
    const F low = _mm256_permutevar8x32_ps(values.low, codes), high = _mm256_permutevar8x32_ps(values.high, codes);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
  }
  // `width` codes that follow one another from the high half of *p on, in the lowest bits of the lanes.
  PEFTFAST_INLINE static U consecutive_codes(const uint8_t* p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof(bits));
    return _mm256_srlv_epi32(_mm256_set1_epi32(bits), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
  }
  // 64 codes at once, 8 vectors of them. Each byte of a float is looked up for 32 codes in one shuffle, then bytes are
  // put together; values of bf16 have but two, which costs half the shuffles. chunk_element() says which of the 64 a
  // lane gets.
  template <bool bf16_codes>
  struct ChunkCodebook {
    U bytes[4];
  };
  template <bool bf16_codes>
  PEFTFAST_INLINE static ChunkCodebook<bf16_codes> chunk_codebook(const float* values) {
    ChunkCodebook<bf16_codes> book;
    for (int b = 0; b < 4; ++b) {
      uint8_t plane[16];
      for (int i = 0; i < 16; ++i) {
        const float value = bf16_codes ? to_float(from_float<bf16>(values[i])) : values[i];
        plane[i] = static_cast<uint8_t>(bit_cast<uint32_t>(value) >> (8 * b));
      }
      book.bytes[b] = _mm256_broadcastsi128_si256(load_half(plane));
    }
    return book;
  }
  template <bool bf16_codes>
  PEFTFAST_INLINE static void decode_chunk(const ChunkCodebook<bf16_codes>& book, const uint8_t* p, F (&out)[8]) {
    const U both = load_words(p), low_bits = _mm256_set1_epi8(15);
    decode_32(book, _mm256_and_si256(_mm256_srli_epi16(both, 4), low_bits), out);
    decode_32(book, _mm256_and_si256(both, low_bits), out + 4);
  }
  template <bool bf16_codes>
  static constexpr int chunk_element(int vector, int lane) {
    const int half = lane / 4 * 16, v = vector % 4, place = lane % 4;  // of the byte: 16 to each half of the lanes
    const int byte = half + (bf16_codes ? v / 2 * 8 + 2 * place + v % 2 : 4 * v + place);
    return 2 * byte + vector / 4;
  }
  static int64_t look_up_bytes(const float*, const uint8_t*, int64_t, float*) { return 0; }
  // Of a chunk's lanes, from one scale for each `run` codes, 32 or 64.
  PEFTFAST_INLINE static U chunk_scale_places(int64_t run) {
    return run == 64 ? _mm256_setzero_si256() : _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
  }
  PEFTFAST_INLINE static F chunk_scales(const float* scales, U places) {
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(scales)), places);
  }
  PEFTFAST_INLINE static U count_above(U count, F x, F bound) {
    return _mm256_sub_epi32(count, _mm256_castps_si256(_mm256_cmp_ps(x, bound, _CMP_GT_OQ)));
  }
  PEFTFAST_INLINE static U magnitude(F x) {
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
  }

  PEFTFAST_INLINE static U load_words(const void* p) { return _mm256_loadu_si256(static_cast<const U*>(p)); }
  PEFTFAST_INLINE static void store_words(uint32_t* p, U x) { _mm256_storeu_si256(reinterpret_cast<U*>(p), x); }
  PEFTFAST_INLINE static U max(U a, U b) { return _mm256_max_epu32(a, b); }
  template <int n>
  PEFTFAST_INLINE static U shift_right(U x) {
    return _mm256_srli_epi32(x, n);
  }
  PEFTFAST_INLINE static U words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  using Wide = __m256i;
  static constexpr int wide_width = 4;
  PEFTFAST_INLINE static Wide wide(uint32_t x) { return words(x); }
  PEFTFAST_INLINE static Wide wide_counting_from(uint32_t x) {
    return _mm256_add_epi32(words(x), _mm256_setr_epi32(0, 0, 1, 0, 2, 0, 3, 0));
  }
  PEFTFAST_INLINE static Wide multiply(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
  PEFTFAST_INLINE static Wide upper(Wide x) { return _mm256_srli_epi64(x, 32); }
  PEFTFAST_INLINE static Wide exclusive_or(Wide a, Wide b, Wide c) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
  }
  PEFTFAST_INLINE static void store_interleaved(uint32_t* p, Wide a, Wide b, Wide c, Wide d) {
    const Wide ab = _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa);
    const Wide cd = _mm256_blend_epi32(c, _mm256_slli_epi64(d, 32), 0xaa);
    const Wide even = _mm256_unpacklo_epi64(ab, cd), odd = _mm256_unpackhi_epi64(ab, cd);  // lanes 0 and 2, 1 and 3
    Wide* q = reinterpret_cast<Wide*>(p);
    _mm256_storeu_si256(q, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(q + 1, _mm256_permute2x128_si256(even, odd, 0x31));
  }

 private:
  PEFTFAST_INLINE static U set1_pair(const bf16* pair) {
    int32_t bits;
    std::memcpy(&bits, pair, sizeof(bits));
    return _mm256_set1_epi32(bits);
  }
  PEFTFAST_INLINE static void decode_32(const ChunkCodebook<false>& book, U codes, F* out) {
    U byte[4];
    for (int b = 0; b < 4; ++b) byte[b] = _mm256_shuffle_epi8(book.bytes[b], codes);
    const U low0 = _mm256_unpacklo_epi8(byte[0], byte[1]), high0 = _mm256_unpacklo_epi8(byte[2], byte[3]);
    const U low1 = _mm256_unpackhi_epi8(byte[0], byte[1]), high1 = _mm256_unpackhi_epi8(byte[2], byte[3]);
    out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
    out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
    out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
    out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
  }
  PEFTFAST_INLINE static void decode_32(const ChunkCodebook<true>& book, U codes, F* out) {
    const U byte2 = _mm256_shuffle_epi8(book.bytes[2], codes), byte3 = _mm256_shuffle_epi8(book.bytes[3], codes);
    const U low = _mm256_unpacklo_epi8(byte2, byte3), high = _mm256_unpackhi_epi8(byte2, byte3);
    const U second = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
    out[1] = _mm256_castsi256_ps(_mm256_and_si256(low, second));
    out[2] = _mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
    out[3] = _mm256_castsi256_ps(_mm256_and_si256(high, second));
  }
  PEFTFAST_INLINE static __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  PEFTFAST_INLINE static void store_half(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
};

}  // namespace
}  // namespace peftfast::cpu
