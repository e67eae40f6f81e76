// Dropout masks from Philox 4x32-10 (../../philox.h), two vectors of counters at a time.
#pragma once

#include "../../philox.h"
#include "../table.h"
#include "convert.h"

namespace peftfast::cpu {
namespace {

// random_words() may write this many words more than it was asked for.
template <class S>
constexpr int64_t random_slack = 16 * S::wide_width;

// The random words of elements [first, first + count) of the matrix; returned pointer is into `buffer`, which holds
// count + random_slack words. Counters start at a multiple of how many are computed together, so that their low half
// never wraps on the way.
template <class S>
const uint32_t* random_words(const Dropout& dropout, const Segment& segment, int64_t first, int64_t count,
                             uint32_t* buffer) {
  using Wide = typename S::Wide;
  constexpr int vectors = 2;  // one multiplies while the other waits for its product
  constexpr int together = vectors * S::wide_width;
  const Wide m0 = S::wide(philox::multiplier0), m1 = S::wide(philox::multiplier1);
  const uint64_t begin = static_cast<uint64_t>(first) / 4 / together * together;
  const uint64_t end = (static_cast<uint64_t>(first + count) + 3) / 4;
  uint32_t* out = buffer;
  for (uint64_t counter = begin; counter < end; counter += together, out += 4 * together) {
    Wide c[vectors][4];
    for (int v = 0; v < vectors; ++v) {
      c[v][0] = S::wide_counting_from(static_cast<uint32_t>(counter) + v * S::wide_width);
      c[v][1] = S::wide(static_cast<uint32_t>(counter >> 32));
      c[v][2] = S::wide(segment.adapter), c[v][3] = S::wide(0);
    }
    uint32_t k0 = dropout.key_low, k1 = dropout.key_high;
    for (int round = 0; round < philox::rounds; ++round, k0 += philox::weyl0, k1 += philox::weyl1)
      for (auto& [c0, c1, c2, c3] : c) {
        const Wide product0 = S::multiply(c0, m0), product1 = S::multiply(c2, m1);
        c0 = S::exclusive_or(S::upper(product1), c1, S::wide(k0)), c1 = product1;
        c2 = S::exclusive_or(S::upper(product0), c3, S::wide(k1)), c3 = product0;
      }
    for (int v = 0; v < vectors; ++v)
      S::store_interleaved(out + v * 4 * S::wide_width, c[v][0], c[v][1], c[v][2], c[v][3]);
  }
  return buffer + (static_cast<uint64_t>(first) - 4 * begin);
}

// Zeroes the dropped ones among x[0 .. count), which are elements first ... of the matrix.
template <class S>
void drop(const Dropout& dropout, const Segment& segment, int64_t first, int64_t count, float* x) {
  constexpr int64_t strip = 512;
  uint32_t buffer[strip + random_slack<S>];
  for (int64_t i = 0; i < count;) {
    // Strips end where random_words() starts anew, so that no counter is computed twice.
    const int64_t n = std::min(count - i, strip - (first + i) % (8 * S::wide_width));
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
