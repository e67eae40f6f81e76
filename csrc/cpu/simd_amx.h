// AMX with BF16: eight registers of 16 rows of 64 bytes, "matrix tiles", and one instruction that multiplies two of
// them into a third. Everything else is as on AVX-512 with BF16.
#pragma once

#include "simd_avx512_bf16.h"

namespace peftfast::cpu {
namespace {

struct Amx : Avx512Bf16 {
  static constexpr bool has_matrix_tiles = true;
  static constexpr int64_t matrix_rows = 16, matrix_columns = 16, matrix_depth = 32;

  // 32 codes at p.
  PEFTFAST_INLINE static Pairs decode_one(Pairs values, const uint8_t* p) {
    // Each byte to both halves of a word of 32 bits, the first half shifted to its code.
    const __m512i bytes = _mm512_shuffle_epi8(
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
        _mm512_set_epi8(-1, 15, -1, 15, -1, 14, -1, 14, -1, 13, -1, 13, -1, 12, -1, 12, -1, 11, -1, 11, -1, 10, -1, 10,
                        -1, 9, -1, 9, -1, 8, -1, 8, -1, 7, -1, 7, -1, 6, -1, 6, -1, 5, -1, 5, -1, 4, -1, 4, -1, 3, -1,
                        3, -1, 2, -1, 2, -1, 1, -1, 1, -1, 0, -1, 0));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(bytes, _mm512_set1_epi32(4)), values);
  }

  // While one lives, its thread has the tiles.
  class Tiles {
   public:
#if defined(PEFTFAST_EMULATE_AVX512)
    Tiles() { std::memset(tile_, 0xff, sizeof(tile_)); }  // NaN: nothing may count on what is there

    template <int tile>
    void clear() {
      std::memset(tile_[tile], 0, sizeof(tile_[tile]));
    }
    template <int tile>
    void load(const void* p, int64_t row_bytes) {
      for (int64_t i = 0; i < 16; ++i) std::memcpy(tile_[tile][i], static_cast<const char*>(p) + i * row_bytes, 64);
    }
    template <int tile>
    void store(void* p, int64_t row_bytes) {
      for (int64_t i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(p) + i * row_bytes, tile_[tile][i], 64);
    }
    template <int c, int a, int b>
    void dot() {
      for (int64_t i = 0; i < 16; ++i) {
        F sums = Amx::load(tile_[c][i]);
        for (int64_t k = 0; k < 16; ++k)
          sums = Amx::dot(set1_pairs(reinterpret_cast<const bf16*>(tile_[a][i] + k)), load_pairs(tile_[b][k]), sums);
        Amx::store(tile_[c][i], sums);
      }
    }

   private:
    alignas(64) float tile_[8][16][16];
#else
    // Assembly, since GCC's intrinsics do not say which memory they read and write.
    Tiles() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
      } shapes;
      for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;
      asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    template <int tile>
    PEFTFAST_INLINE void clear() {
      asm volatile("tilezero %%tmm%c0" ::"i"(tile));
    }
    template <int tile>
    PEFTFAST_INLINE void load(const void* p, int64_t row_bytes) {
      asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(p), "r"(row_bytes) : "memory");
    }
    template <int tile>
    PEFTFAST_INLINE void store(void* p, int64_t row_bytes) {
      asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(p), "r"(row_bytes) : "memory");
    }
    // c[i, j] += sum over k of a[i, 2 k] b[k, 2 j] + a[i, 2 k + 1] b[k, 2 j + 1]: a has rows of 32 bf16, b of 16 pairs.
    template <int c, int a, int b>
    PEFTFAST_INLINE void dot() {
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
    }
#endif
  };
};

}  // namespace
}  // namespace peftfast::cpu
