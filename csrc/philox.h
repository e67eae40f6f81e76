// The dropout generator: Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
//
// One call turns a counter into four random words. Element i of an [M, K] matrix takes word i % 4 of counter
// (i / 4, adapter) under the key `seed`, and is kept when that word is at least dropout * 2^32. So a mask can be
// made again, anywhere and in any order, from the seed alone.
#pragma once

#include <cmath>
#include <cstdint>

namespace peftfast::philox {

constexpr uint32_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
constexpr uint32_t weyl0 = 0x9E3779B9u, weyl1 = 0xBB67AE85u;
constexpr int rounds = 10;

struct Key {
  uint32_t low, high;
};

inline Key key_of(int64_t seed) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

// A word below the threshold drops its element. dropout < 1 keeps the product in range.
inline uint32_t threshold_of(double dropout) {
  const double scaled = std::nearbyint(dropout * 4294967296.0);
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
}

}  // namespace peftfast::philox
