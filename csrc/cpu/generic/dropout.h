// Dropout masks from Philox 4x32-10 (../../philox.h), `width` counters at a time.
#pragma once

#include "../../philox.h"
#include "../table.h"
#include "convert.h"

namespace peftfast::cpu {
namespace {

// random_words() may write this many words more than it was asked for.
template <class S>
constexpr int64_t random_slack = 8 * S::width;

// The random words of elements [first, first + count) of the matrix; returned pointer is into `buffer`, which holds
// count + random_slack words. Counters start at a multiple of `width`, so that their low half never wraps inside a
// vector.
template <class S>
const uint32_t* random_words(const Dropout& dropout, const Segment& segment, int64_t first, int64_t count,
                             uint32_t* buffer) {
  using U = typename S::U;
  const uint64_t begin = (static_cast<uint64_t>(first) / 4) & ~static_cast<uint64_t>(S::width - 1);
  const uint64_t end = (static_cast<uint64_t>(first + count) + 3) / 4;
  uint32_t* out = buffer;
  for (uint64_t counter = begin; counter < end; counter += S::width, out += 4 * S::width) {
    U c0 = S::counting_from(static_cast<uint32_t>(counter)), c1 = S::words(static_cast<uint32_t>(counter >> 32));
    U c2 = S::words(segment.adapter), c3 = S::words(0);
    uint32_t k0 = dropout.key_low, k1 = dropout.key_high;
    for (int round = 0; round < philox::rounds; ++round, k0 += philox::weyl0, k1 += philox::weyl1) {
      U high0, low0, high1, low1;
      S::multiply(c0, philox::multiplier0, high0, low0);
      S::multiply(c2, philox::multiplier1, high1, low1);
      c0 = S::exclusive_or(S::exclusive_or(high1, c1), S::words(k0));
      c1 = low1;
      c2 = S::exclusive_or(S::exclusive_or(high0, c3), S::words(k1));
      c3 = low0;
    }
    S::store_interleaved(out, c0, c1, c2, c3);
  }
  return buffer + (static_cast<uint64_t>(first) - 4 * begin);
}

// Zeroes the dropped ones among x[0 .. count), which are elements first ... of the matrix.
template <class S>
void drop(const Dropout& dropout, const Segment& segment, int64_t first, int64_t count, float* x) {
  constexpr int64_t strip = 512;
  uint32_t buffer[strip + random_slack<S>];
  for (int64_t i = 0; i < count;) {
    // Strips end at multiples of 4 * width of the element index, so that no counter is computed twice.
    const int64_t n = std::min(count - i, strip - (first + i) % (4 * S::width));
    const uint32_t* words = random_words<S>(dropout, segment, first + i, n, buffer);
    int64_t j = 0;
    for (; j + S::width <= n; j += S::width)
      S::store(x + i + j, S::keep(S::load(x + i + j), words + j, segment.threshold));
    for (; j < n; ++j)
      if (words[j] < segment.threshold) x[i + j] = 0.0f;
    i += n;
  }
}

}  // namespace
}  // namespace peftfast::cpu
