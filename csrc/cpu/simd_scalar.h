// One value at a time, in plain C++: runs everywhere, and says what the other simd_*.h must do. It computes in double:
// a single lane has no other lanes to share a long sum with, and no instruction that multiplies and adds with one
// rounding.
#pragma once

#include "generic/convert.h"

namespace peftfast::cpu {
namespace {

struct Scalar {
  using F = double;    // `width` floats
  using U = uint32_t;  // `width` 32-bit words
  static constexpr int width = 1;
  static constexpr int tile_rows = 3, tile_vectors = 4;  // the register tile: rows x vectors of accumulators
  static constexpr bool has_bf16_dot = false;            // multiplies pairs of bf16 in one instruction
  static constexpr bool has_matrix_tiles = false;        // multiplies whole tiles of bf16 in one: see simd_amx.h

  PEFTFAST_INLINE static F zero() { return 0.0; }
  PEFTFAST_INLINE static F set1(float x) { return x; }
  PEFTFAST_INLINE static F set1(const f16* x) { return to_float(*x); }
  // The first or second of a pair of bf16, in every lane.
  PEFTFAST_INLINE static F set1_first(const bf16* pair) { return to_float(pair[0]); }
  PEFTFAST_INLINE static F set1_second(const bf16* pair) { return to_float(pair[1]); }
  template <class T>
  PEFTFAST_INLINE static F load(const T* p) {
    return to_float(*p);
  }
  template <class T>
  PEFTFAST_INLINE static void store(T* p, F x) {
    *p = from_float<T>(static_cast<float>(x));
  }
  PEFTFAST_INLINE static F add(F a, F b) { return a + b; }
  PEFTFAST_INLINE static F mul(F a, F b) { return a * b; }
  PEFTFAST_INLINE static F fma(F a, F b, F c) { return a * b + c; }
  // x, computed here and now: keeps the compiler from an order that needs more registers than there are.
  PEFTFAST_INLINE static F now(F x) {
    asm volatile("" : "+x"(x));
    return x;
  }
  PEFTFAST_INLINE static F fma_now(F a, F b, F c) { return now(fma(a, b, c)); }
  // The sum over the lanes of each.
  PEFTFAST_INLINE static void sum(F a, F b, F c, F d, float (&sums)[4]) {
    const F values[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) sums[i] = static_cast<float>(values[i]);
  }
  PEFTFAST_INLINE static void transpose(F (&)[1]) {}
  PEFTFAST_INLINE static void transpose(U (&)[1]) {}
  // x where its word is at least the threshold, else 0.
  PEFTFAST_INLINE static F keep(F x, const uint32_t* words, uint32_t threshold) {
    return *words >= threshold ? x : 0.0;
  }

  // The value that each lane's lowest four bits stand for, of 16.
  using Codebook = const float*;
  PEFTFAST_INLINE static Codebook codebook(const float* values) { return values; }
  PEFTFAST_INLINE static F decode(Codebook values, U codes) { return values[codes & 15]; }
  // out[i] = table[codes[i]], for as many of `count` codes as vectors gain by; returns how many those are.
  static int64_t look_up_bytes(const float*, const uint8_t*, int64_t, float*) { return 0; }
  // How many of the bounds a value was above so far, and whether it is above this one too.
  PEFTFAST_INLINE static U count_above(U count, F x, F bound) { return count + (x > bound); }
  PEFTFAST_INLINE static U magnitude(F x) { return bit_cast<uint32_t>(static_cast<float>(x)) & 0x7fffffffu; }  // bits

  PEFTFAST_INLINE static U words(uint32_t x) { return x; }
  PEFTFAST_INLINE static U load_words(const void* p) {
    U x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  PEFTFAST_INLINE static void store_words(uint32_t* p, U x) { *p = x; }
  PEFTFAST_INLINE static U max(U a, U b) { return a > b ? a : b; }
  template <int n>
  PEFTFAST_INLINE static U shift_right(U x) {
    return x >> n;
  }
  // Words that are multiplied into products twice as wide: each is the lower half of a lane of its own, and what the
  // upper halves hold is not said.
  using Wide = uint64_t;
  static constexpr int wide_width = 1;
  PEFTFAST_INLINE static Wide wide(uint32_t x) { return x; }
  PEFTFAST_INLINE static Wide wide_counting_from(uint32_t x) { return x; }  // x, x + 1, ...
  PEFTFAST_INLINE static Wide multiply(Wide a, Wide b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
  PEFTFAST_INLINE static Wide upper(Wide x) { return x >> 32; }
  PEFTFAST_INLINE static Wide exclusive_or(Wide a, Wide b, Wide c) { return a ^ b ^ c; }
  // Four words of each lane, lane after lane.
  PEFTFAST_INLINE static void store_interleaved(uint32_t* p, Wide a, Wide b, Wide c, Wide d) {
    p[0] = static_cast<uint32_t>(a), p[1] = static_cast<uint32_t>(b);
    p[2] = static_cast<uint32_t>(c), p[3] = static_cast<uint32_t>(d);
  }
};

}  // namespace
}  // namespace peftfast::cpu
