// Single values between fp32 and the 16-bit formats, in plain C++: round to nearest even, NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../kernels.h"

#define PEFTFAST_INLINE [[gnu::always_inline]] inline

namespace peftfast {

// Storage types of the 16-bit formats. Arithmetic happens in fp32 only.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace cpu {
namespace {

template <class To, class From>
PEFTFAST_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

PEFTFAST_INLINE float to_float(float x) { return x; }

PEFTFAST_INLINE float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu, fraction = x.bits & 0x3ffu;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  return bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline bf16 from_float<bf16>(float x) {
  if (x != x) return {0x7fc0};
  const uint32_t bits = bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline f16 from_float<f16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;  // rounds past the largest finite value, 65504
  } else if (magnitude < 0x38800000u) {
    // Below the smallest normal value, 2^-14: adding 0.5 leaves the fraction, rounded, in the lowest bits.
    result = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}

}  // namespace
}  // namespace cpu
}  // namespace peftfast
