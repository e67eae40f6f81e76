// The micro-kernels of the fourbit family: values to codes and back, and a 4-bit weight as the panel of a product.
//
// A panel of 64 columns is decoded from the packed bytes straight into the layout of generic/gemm.h:
//
//   forward    rows of W are columns of the panel. A word holds 8 codes of one row; a square of words is transposed in
//              registers, so that a vector holds the same 8 columns of `width` rows, and each code is shifted to the
//              low bits and looked up
//   backward   rows of W are rows of the panel: `width` codes of a row are `width` lanes
//
// code * absmax is computed in fp32 and rounded once, when the panel is 16 bits wide; an fp32 panel keeps it as it is.
#pragma once

#include "../../fourbit_format.h"
#include "../scratch.h"
#include "../table.h"
#include "gemm.h"

namespace peftfast::cpu {
namespace {

// Block sizes are powers of two: a block is found by a shift.
template <class S>
class AbsmaxReader {
 public:
  explicit AbsmaxReader(const FourBitMatrix& W)
      : W_(W),
        shift_(__builtin_ctzll(W.blocksize)),
        nested_shift_(W.nested_blocksize ? __builtin_ctzll(W.nested_blocksize) : 0) {}

  PEFTFAST_INLINE int64_t block_of(int64_t element) const { return element >> shift_; }
  PEFTFAST_INLINE int64_t first_of(int64_t block) const { return block << shift_; }

  PEFTFAST_INLINE float operator()(int64_t block) const {
    if (W_.nested_blocksize == 0) return W_.absmax[block];
    const float scaled = W_.nested_code[W_.absmax_codes[block]] * W_.nested_absmax[block >> nested_shift_];
    return scaled + *W_.nested_offset;
  }

  // The scales of `count` runs of 32 elements from `first`, a multiple of 32, on.
  void each_32(int64_t first, int64_t count, float* out) const {
    const int shift = shift_ - 5;  // from runs to blocks
    constexpr int64_t at_once = 256;
    float scales[at_once + 1];
    for (int64_t i = 0; i < count;) {
      const int64_t run = first / 32 + i, block = run >> shift, skipped = run - (block << shift);
      const int64_t n = std::min(count - i, at_once << shift);
      read(block, ((skipped + n - 1) >> shift) + 1, scales);
      if (shift == 1 && skipped == 0) {  // the usual, for which a compiler has vectors
        for (int64_t k = 0; k < n / 2; ++k) out[i + 2 * k] = out[i + 2 * k + 1] = scales[k];
        if (n % 2) out[i + n - 1] = scales[n / 2];
      } else {
        for (int64_t k = 0; k < n; ++k) out[i + k] = scales[(skipped + k) >> shift];
      }
      i += n;
    }
  }

  // The scales of `count` blocks: all are looked up, then all scaled. Of what is left to look up one by one a compiler
  // would make vectors that it fills lane by lane, were not the place hidden.
  void read(int64_t first, int64_t count, float* out) const {
    if (W_.nested_blocksize == 0) {
      std::copy_n(W_.absmax + first, count, out);
      return;
    }
    const float* code = W_.nested_code;
    const uint8_t* codes = W_.absmax_codes + first;
    for (int64_t i = S::look_up_bytes(code, codes, count, out); i < count; ++i) out[i] = *hidden(code + codes[i]);
    const float offset = *W_.nested_offset;
    for (int64_t i = 0; i < count;) {
      const int64_t block = (first + i) >> nested_shift_;
      const int64_t end = std::min(count, ((block + 1) << nested_shift_) - first);
      for (const float scale = W_.nested_absmax[block]; i < end; ++i) {
        const float scaled = out[i] * scale;
        out[i] = scaled + offset;
      }
    }
  }

 private:
  const FourBitMatrix& W_;
  const int shift_, nested_shift_;
};

PEFTFAST_INLINE int code_at(const uint8_t* packed, int64_t element) {
  return element % 2 ? packed[element / 2] & 15 : packed[element / 2] >> 4;
}

// out[i] = element first + i, for i < count.
template <class S, class T>
void decode_run(const FourBitMatrix& W, const AbsmaxReader<S>& absmax, int64_t first, int64_t count, T* out) {
  const float* values = fourbit::codebook_of(W.type);
  const auto codebook = S::codebook(values);
  for (int64_t e = first; e < first + count;) {
    const int64_t block = absmax.block_of(e), end = std::min(first + count, absmax.first_of(block + 1));
    const float scale = absmax(block);
    const auto one = [&] { out[e - first] = from_float<T>(values[code_at(W.packed, e)] * scale), ++e; };
    if constexpr (S::width > 1) {
      if (e % 2) one();
      const typename S::F scales = S::set1(scale);
      for (; e + S::width <= end; e += S::width)
        S::store(out + e - first, S::mul(S::decode(codebook, S::consecutive_codes(W.packed + e / 2)), scales));
    }
    while (e < end) one();
  }
}

// `rows` rows of `count` elements, `ld` of W apart, the first from element `first` on, in bf16: all rows' first 32,
// then their next. Rows and blocks are cut into whole runs of 32, for each of which there is a scale: scale and
// rounding are for the 16 values of a run, not for its elements. What lies `ahead` elements further on is asked for.
template <class S>
void decode_runs(const FourBitMatrix& W, int64_t first, int64_t ld, int64_t rows, int64_t count, const float* scales,
                 int64_t ahead, bf16* out) {
  const auto values = S::codebook(fourbit::codebook_of(W.type));
  const int64_t runs = count / 32;
  for (int64_t i = 0; i < rows; ++i, first += ld, scales += ld / 32, out += 32) {
    const uint8_t* packed = W.packed + first / 2;
    prefetch_row(hidden(packed) + ahead / 2, count / 2);
    const auto codebook = [&](int64_t r) { return S::codebook_of_one(S::mul(values, S::set1(scales[r]))); };
    const auto decode = [&](const typename S::Pairs& codebook, int64_t r) {
      S::store_pairs(out + r * rows * 32, S::decode_one(codebook, packed + r * 16));
    };
    int64_t r = 0;
    for (; r + 2 <= runs; r += 2) {
      auto of_both = codebook(r);
      decode(of_both, r);
      if (scales[r + 1] != scales[r]) of_both = codebook(r + 1);
      decode(of_both, r + 1);
    }
    if (r < runs) decode(codebook(r), r);
  }
}

// The scale of the block that was decoded last.
struct BlockScale {
  int64_t block = -1;
  float scale = 0;
};

// Elements first ... first + n - 1 in the first lanes, n <= width; what the other lanes hold is not said.
template <class S, class Codebook>
PEFTFAST_INLINE typename S::F decode_vector(const FourBitMatrix& W, const AbsmaxReader<S>& absmax,
                                            const Codebook& codebook, int64_t first, int64_t n, BlockScale& last) {
  if constexpr (S::width > 1) {
    const int64_t block = absmax.block_of(first);
    if (n == S::width && first % 2 == 0 && absmax.block_of(first + S::width - 1) == block) {
      if (block != last.block) last = {block, absmax(block)};
      return S::mul(S::decode(codebook, S::consecutive_codes(W.packed + first / 2)), S::set1(last.scale));
    }
  }
  float values[S::width] = {};
  decode_run<S>(W, absmax, first, n, values);
  return S::load(values);
}

// A panel from W [P, K] with the reduction along its rows: columns `column` ... of the panel are rows of W, and the
// reduction runs from q over Q elements.
template <class Mode>
void pack_fourbit_transposed(const FourBitMatrix& W, int64_t K, int64_t column, int64_t columns, int64_t q, int64_t Q,
                             typename Mode::Panel* panel, int64_t subpanel_size) {
  using S = typename Mode::S;
  constexpr bool pairs = std::is_same_v<typename Mode::Panel, uint32_t>;
  constexpr int64_t NR = Mode::columns;
  constexpr int codes = 8;  // in a word
  const AbsmaxReader<S> absmax(W);
  thread_local Scratch scratch;

  if (K % codes != 0) {  // words would straddle rows: decode rows, then pack them as dense ones
    using T = std::conditional_t<pairs, bf16, float>;
    T* rows = reinterpret_cast<T*>(scratch.floats(NR * Q));
    for (int64_t p = 0; p < columns; p += NR) {
      const int64_t n = std::min(NR, columns - p);
      for (int64_t i = 0; i < n; ++i) decode_run<S>(W, absmax, (column + p + i) * K + q, Q, rows + i * Q);
      pack_transposed<Mode>(rows, Q, n, Q, panel + p / NR * subpanel_size, subpanel_size);
    }
    return;
  }

  const auto codebook = S::codebook(fourbit::codebook_of(W.type));
  // Reduction elements that share a scale: a block where blocks start with the rows, else one word.
  const bool whole_blocks = K % W.blocksize == 0;
  const int64_t span = whole_blocks ? W.blocksize : codes;
  const int64_t first_span = q / span, spans = (q + Q - 1) / span - first_span + 1, words = Q / codes;
  float* scales = scratch.floats(spans * (S::width + 1));
  float* of_row = scales + spans * S::width;
  for (int64_t p = 0; p < (columns + NR - 1) / NR * NR; p += S::width) {
    for (int i = 0; i < S::width; ++i) {
      const int64_t first = (column + p + i) * K + first_span * span;
      if (p + i >= columns)
        std::fill_n(of_row, spans, 0.0f);
      else if (whole_blocks)
        absmax.read(absmax.block_of(first), spans, of_row);
      else
        for (int64_t s = 0; s < spans; ++s) of_row[s] = absmax(absmax.block_of(first + s * span));
      for (int64_t s = 0; s < spans; ++s) scales[s * S::width + i] = of_row[s];
    }
    typename Mode::Panel* out = panel + p / NR * subpanel_size + p % NR;
    for (int64_t word = 0; word < words; word += S::width) {
      const int64_t n = std::min<int64_t>(S::width, words - word);
      typename S::U block[S::width];
      for (int i = 0; i < S::width; ++i) {
        const uint8_t* source = W.packed + ((column + p + i) * K + q) / 2 + word * 4;
        if (p + i >= columns) {
          block[i] = S::words(0);
        } else if (n == S::width) {
          block[i] = S::load_words(source);
        } else {
          uint32_t part[S::width] = {};
          std::memcpy(part, source, n * 4);
          block[i] = S::load_words(part);
        }
      }
      S::transpose(block);
      for (int64_t j = 0; j < n; ++j) {
        const int64_t element = (word + j) * codes;
        const typename S::F scale = S::load(scales + ((q + element) / span - first_span) * S::width);
        const auto pair = [&](auto byte) __attribute__((always_inline)) {  // the first of two is in the high half
          const auto first = S::mul(S::decode(codebook, S::template shift_right<8 * byte.value + 4>(block[j])), scale);
          const auto second = S::mul(S::decode(codebook, S::template shift_right<8 * byte.value>(block[j])), scale);
          if constexpr (pairs) {
            S::store_pairs(out + (element / 2 + byte.value) * NR, S::round_pairs(first, second));
          } else {
            S::store(out + (element + 2 * byte.value) * NR, first);
            S::store(out + (element + 2 * byte.value + 1) * NR, second);
          }
        };
        pair(std::integral_constant<int, 0>{}), pair(std::integral_constant<int, 1>{});
        pair(std::integral_constant<int, 2>{}), pair(std::integral_constant<int, 3>{});
      }
    }
  }
}

// pack_fourbit_straight in pairs, of a W whose rows and blocks are cut into whole runs of 32: scale and rounding are
// for the 16 values of a run, not for its elements.
template <class Mode>
void pack_fourbit_runs(const FourBitMatrix& W, int64_t P, int64_t column, int64_t columns, int64_t q, int64_t Q,
                       uint32_t* panel, int64_t subpanel_size) {
  using S = typename Mode::S;
  constexpr int64_t NR = Mode::columns, run = 32;
  const AbsmaxReader<S> absmax(W);
  const auto values = S::codebook(fourbit::codebook_of(W.type));
  thread_local Scratch scratch;
  float* scales[2] = {scratch.floats(2 * (columns / run + 1)), nullptr};  // of the blocks in two rows
  scales[1] = scales[0] + columns / run + 1;
  for (int64_t r = 0; r < Q; r += 2) {
    const bool odd = r + 1 == Q;  // a last row alone is paired with zeros
    int64_t first[2], first_block[2];
    for (int64_t i = 0; i < 2; ++i) {
      first[i] = (q + r + (odd ? 0 : i)) * P + column, first_block[i] = absmax.block_of(first[i]);
      const int64_t blocks = absmax.block_of(first[i] + columns - 1) + 1 - first_block[i];
      if (odd && i == 1)
        std::fill_n(scales[i], blocks, 0.0f);
      else
        absmax.read(first_block[i], blocks, scales[i]);
      prefetch_row(W.packed + ((q + std::min(r + i + rows_ahead, Q - 1)) * P + column) / 2, columns / 2);
    }
    int64_t block[2] = {-1, -1};
    typename S::Pairs codebook{};
    for (int64_t p = 0; p < columns; p += run) {
      const int64_t blocks[2] = {absmax.block_of(first[0] + p), absmax.block_of(first[1] + p)};
      if (blocks[0] != block[0] || blocks[1] != block[1]) {
        const auto scaled = [&](int i) { return S::mul(values, S::set1(scales[i][blocks[i] - first_block[i]])); };
        codebook = S::codebook_of_two(scaled(0), scaled(1));
        block[0] = blocks[0], block[1] = blocks[1];
      }
      typename S::Pairs pairs[2];
      S::decode_two(codebook, W.packed + (first[0] + p) / 2, W.packed + (first[1] + p) / 2, pairs);
      uint32_t* out = panel + p / NR * subpanel_size + r / 2 * NR + p % NR;
      S::store_pairs(out, pairs[0]), S::store_pairs(out + S::width, pairs[1]);
    }
    for (int64_t p = columns; p % NR != 0; p += S::width)
      S::store_pairs(panel + p / NR * subpanel_size + r / 2 * NR + p % NR, S::words(0));
  }
}

// A panel from W [N, P] with the reduction down its columns, from row q over Q rows.
template <class Mode>
void pack_fourbit_straight(const FourBitMatrix& W, int64_t P, int64_t column, int64_t columns, int64_t q, int64_t Q,
                           typename Mode::Panel* panel, int64_t subpanel_size) {
  using S = typename Mode::S;
  constexpr bool pairs = std::is_same_v<typename Mode::Panel, uint32_t>;
  constexpr int64_t NR = Mode::columns, per_row = pairs ? 2 : 1;  // rows of W in one row of the panel
  if constexpr (pairs)
    if (P % 32 == 0) return pack_fourbit_runs<Mode>(W, P, column, columns, q, Q, panel, subpanel_size);
  const AbsmaxReader<S> absmax(W);
  const auto codebook = S::codebook(fourbit::codebook_of(W.type));
  const int64_t padded = (Q + Mode::unit - 1) / Mode::unit * Mode::unit;
  BlockScale scales[per_row];
  for (int64_t r = 0; r < padded; r += per_row) {
    prefetch_row(W.packed + ((q + std::min(r + rows_ahead, Q - 1)) * P + column) / 2, (columns + 1) / 2);
    for (int64_t p = 0; p < (columns + NR - 1) / NR * NR; p += S::width) {
      const int64_t n = std::clamp<int64_t>(columns - p, 0, S::width);
      const auto row = [&](int64_t i) __attribute__((always_inline)) {
        if (r + i >= Q || n == 0) return S::zero();
        return decode_vector<S>(W, absmax, codebook, (q + r + i) * P + column + p, n, scales[i]);
      };
      auto* out = panel + p / NR * subpanel_size + r / per_row * NR + p % NR;
      if constexpr (pairs)
        S::store_pairs(out, S::round_pairs(row(0), row(1)));
      else
        S::store(out, row(0));
    }
  }
}

// ---- few rows of X -----------------------------------------------------------------------------------------------
// Nothing is packed: a row of W meets every row of X as it is decoded, so that the bytes of W are read once. What comes
// out of a shuffle in one order meets an X that was brought into that order beforehand: "arranged". A block's scale
// multiplies the sum of its products. Where the product is asked for in bf16, the codes may stand for values rounded to
// bf16, which loses less than to round each element of W; some instruction sets decode them faster.

template <class S>
constexpr int64_t chunk_codes = 8 * S::width;  // decoded at once; at least the shortest block, 32

// A chunk's products with a row of X, a lane of which sums eight that follow one another: of vectors widened to fp32
// or, where an instruction multiplies them, of pairs in bf16.
template <class S, bool bf16_codes, bool = bf16_codes && S::has_bf16_dot>
struct ChunkDot {
  using X = float;
  using Vector = typename S::F;
  static constexpr int vectors = 8, elements = S::width;  // of X in a vector
  static constexpr int rows = S::tile_rows;               // at most, while a chunk is in registers
  PEFTFAST_INLINE static auto codebook(const float* values) { return S::template chunk_codebook<bf16_codes>(values); }
  PEFTFAST_INLINE static typename S::F first(Vector w, const X* x) { return S::mul(w, S::load(x)); }
  PEFTFAST_INLINE static typename S::F add(Vector w, const X* x, typename S::F sum) {
    return S::fma(w, S::load(x), sum);
  }
  static constexpr int element(int vector, int place) { return S::template chunk_element<bf16_codes>(vector, place); }
};
template <class S, bool bf16_codes>
struct ChunkDot<S, bf16_codes, true> {
  using X = bf16;
  using Vector = typename S::Pairs;
  static constexpr int vectors = 4, elements = 2 * S::width, rows = 16;
  PEFTFAST_INLINE static auto codebook(const float* values) { return S::codebook_of_one(S::codebook(values)); }
  PEFTFAST_INLINE static typename S::F first(Vector w, const X* x) { return S::dot(w, S::load_pairs(x), S::zero()); }
  PEFTFAST_INLINE static typename S::F add(Vector w, const X* x, typename S::F sum) {
    return S::dot(w, S::load_pairs(x), sum);
  }
  static constexpr int element(int vector, int place) { return place / 2 * 8 + place % 2 * 4 + vector; }
};

// Whether rows of W are cut into whole chunks whose blocks begin at multiples of 32.
template <class S>
PEFTFAST_INLINE bool in_chunks(int64_t Q) {
  return S::width > 1 && Q % 32 == 0;
}

// Of a row of X, in floats, whatever it is arranged as.
template <class S>
int64_t arranged_size(int64_t Q) {
  return in_chunks<S>(Q) ? (Q + chunk_codes<S> - 1) / chunk_codes<S> * chunk_codes<S> : 0;
}

template <class S, bool bf16_codes>
void arrange_for(const float* x, int64_t Q, int64_t row, int64_t rows, void* out) {
  if constexpr (S::width > 1) {
    using Dot = ChunkDot<S, bf16_codes>;
    auto* to = static_cast<typename Dot::X*>(out) + row * chunk_codes<S>;
    for (int64_t q = 0; q < Q; q += chunk_codes<S>, to += rows * chunk_codes<S>)
      for (int v = 0; v < Dot::vectors; ++v)
        for (int place = 0; place < Dot::elements; ++place) {
          const int64_t element = q + Dot::element(v, place);
          to[v * Dot::elements + place] = from_float<typename Dot::X>(element < Q ? x[element] : 0.0f);
        }
  }
}

// x [Q] -> chunks in the order of S::decode_chunk, each beside the same chunk of the other rows; zeros up to the end of
// the last chunk.
template <class S>
void arrange(const float* x, int64_t Q, bool bf16_codes, int64_t row, int64_t rows, void* out) {
  bf16_codes ? arrange_for<S, true>(x, Q, row, rows, out) : arrange_for<S, false>(x, Q, row, rows, out);
}

// out[i] += x[i] . one row of W, over `chunks` chunks from `packed` on. x is arranged, of `all` rows; scales has one
// for each `run` codes; what lies `ahead` bytes on is asked for.
template <class S, class Dot, int rows, class Codebook>
void dot_chunks(const typename Dot::X* x, int64_t all, const Codebook& codebook, const uint8_t* packed,
                const float* scales, int64_t run, int64_t chunks, int64_t ahead, float* out, int64_t ldo) {
  typename S::F sums[rows];
  for (int i = 0; i < rows; ++i) sums[i] = S::zero();
  const auto places = S::chunk_scale_places(run);
  for (int64_t c = 0; c < chunks; ++c, packed += 4 * S::width, scales += chunk_codes<S> / run) {
    __builtin_prefetch(hidden(packed) + ahead);
    typename Dot::Vector w[Dot::vectors];
    S::decode_chunk(codebook, packed, w);
    const typename S::F scale = S::chunk_scales(scales, places);
    const typename Dot::X* row = x + c * all * chunk_codes<S>;
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i, row += chunk_codes<S>) {
      typename S::F products = Dot::first(w[0], row);
      for (int v = 1; v < Dot::vectors; ++v) products = Dot::add(w[v], row + v * Dot::elements, products);
      sums[i] = S::fma(products, scale, sums[i]);
    }
  }
  for (int i = 0; i < rows; i += 4) {
    float total[4];
    const auto sum = [&](int k) { return k < rows ? sums[k] : S::zero(); };
    S::sum(sum(i), sum(i + 1), sum(i + 2), sum(i + 3), total);
    for (int k = i; k < std::min(i + 4, rows); ++k) out[k * ldo] += total[k - i];
  }
}

// dot_rows_fourbit of a W whose rows are cut into chunks.
template <class S, bool bf16_codes>
void dot_rows_of_chunks(const void* arranged, int64_t rows, const FourBitMatrix& W, int64_t row, int64_t columns,
                        int64_t Q, float* out, int64_t ldo) {
  using Dot = ChunkDot<S, bf16_codes>;
  const AbsmaxReader<S> absmax(W);
  const int64_t chunks = Q / chunk_codes<S>;
  const auto codebook = Dot::codebook(fourbit::codebook_of(W.type));
  const auto* x = static_cast<const typename Dot::X*>(arranged);
  // A block of the reduction keeps all rows of X in L1 while the rows of W go by.
  constexpr int64_t most = 16384 / sizeof(typename Dot::X);
  const int64_t block = std::clamp<int64_t>(most / rows / chunk_codes<S>, 4, most / chunk_codes<S>);
  const int64_t ahead = block < chunks ? 4 * Q : 2 * Q;  // bytes: eight rows on, of which a block is short, or four
  const bool whole_blocks = W.blocksize == 64 && Q % 64 == 0;  // the usual, whose scales are as they are read
  const int64_t run = whole_blocks ? 64 : 32, per_row = Q / run;
  thread_local Scratch scratch;
  float* scales = scratch.floats(columns * per_row + 4);  // four are read at once
  if (whole_blocks)
    absmax.read(absmax.block_of(row * Q), columns * per_row, scales);
  else
    absmax.each_32(row * Q, columns * per_row, scales);
  for (int64_t c = 0; c < chunks; c += block)
    for (int64_t m = 0; m < rows; m += Dot::rows)
      with_rows<Dot::rows>(std::min<int64_t>(Dot::rows, rows - m), [&](auto n) {
        for (int64_t j = 0; j < columns; ++j)
          dot_chunks<S, Dot, n.value>(x + (c * rows + m) * chunk_codes<S>, rows, codebook,
                                      W.packed + (row + j) * Q / 2 + c * 4 * S::width,
                                      scales + j * per_row + c * chunk_codes<S> / run, run, std::min(block, chunks - c),
                                      ahead, out + m * ldo + j, ldo);
      });
  if (const int64_t done = chunks * chunk_codes<S>; done < Q) {  // the last of each row, under scales of zero beyond it
    for (int64_t j = 0; j < columns; ++j) {
      uint8_t packed[4 * S::width] = {};
      float last_scales[S::width / 4 + 4] = {};
      std::memcpy(packed, W.packed + ((row + j) * Q + done) / 2, (Q - done) / 2);
      std::copy_n(scales + j * per_row + done / run, (Q - done) / run, last_scales);
      for (int64_t m = 0; m < rows; ++m)
        dot_chunks<S, Dot, 1>(x + (chunks * rows + m) * chunk_codes<S>, rows, codebook, packed, last_scales, run, 1, 0,
                              out + m * ldo + j, ldo);
    }
  }
}

// out[i, j] += x[i] . row (row + j) of W, for j < columns and all rows of X, arranged if they can be.
template <class S>
void dot_rows_fourbit(const float* x, int64_t ldx, int64_t rows, const FourBitMatrix& W, bool bf16_codes, int64_t row,
                      int64_t columns, int64_t Q, float* out, int64_t ldo) {
  if constexpr (S::width > 1) {
    if (in_chunks<S>(Q)) {
      const auto dot = bf16_codes ? dot_rows_of_chunks<S, true> : dot_rows_of_chunks<S, false>;
      dot(x, rows, W, row, columns, Q, out, ldo);
      return;
    }
  }
  const AbsmaxReader<S> absmax(W);
  constexpr int64_t at_once = 4, block = 1024;
  alignas(64) float weights[at_once * block];
  for (int64_t j = 0; j < columns; j += at_once) {
    const int64_t n = std::min(at_once, columns - j);
    for (int64_t q = 0; q < Q; q += block) {
      const int64_t length = std::min(block, Q - q);
      for (int64_t i = 0; i < n; ++i) decode_run<S>(W, absmax, (row + j + i) * Q + q, length, weights + i * block);
      for (int64_t m = 0; m < rows; m += S::tile_rows)
        dot_rows<S, float>(x + m * ldx + q, ldx, std::min<int64_t>(S::tile_rows, rows - m), weights, block, n, length,
                           out + m * ldo + j, ldo);
    }
  }
}

// ---- values to codes
// -------------------------------------------------------------------------------------------------

// Codes of the blocks [begin, end).
template <class S, class T>
void fourbit_quantize(const FourBitQuantizeArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t strip = 64;
  const T* W = static_cast<const T*>(args.W);
  const uint8_t* order = fourbit::order_of(args.type);
  typename S::F bounds[15];
  for (int i = 0; i < 15; ++i) bounds[i] = S::set1(fourbit::bound(args.type, i));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * args.blocksize, count = std::min(args.blocksize, args.count - first);
    const bool whole = count == args.blocksize;

    // The largest magnitude as bits: an infinity or a NaN wins.
    typename S::U largest = S::words(0);
    int64_t i = 0;
    for (; i + S::width <= count; i += S::width) largest = S::max(largest, S::magnitude(S::load(W + first + i)));
    uint32_t lanes[S::width];
    S::store_words(lanes, largest);
    uint32_t bits = *std::max_element(lanes, lanes + S::width);
    for (; i < count; ++i) bits = std::max(bits, bit_cast<uint32_t>(to_float(W[first + i])) & 0x7fffffffu);
    float absmax = bit_cast<float>(bits);
    const float divisor = absmax < fourbit::smallest_absmax ? fourbit::smallest_absmax : absmax;
    // bitsandbytes divides in a block that is not full, and keeps the divisor; others are multiplied by the inverse.
    if (!whole) absmax = divisor;
    args.absmax[block] = absmax;

    const float inverse = 1.0f / divisor;
    for (int64_t s = 0; s < count; s += strip) {
      const int64_t n = std::min(strip, count - s);
      float values[strip] = {};
      uint32_t codes[strip];
      for (int64_t j = 0; j < n; j += S::width) {
        if (whole) {
          const auto scaled = S::mul(S::load(W + first + s + j), S::set1(inverse));
          S::store(values + j, scaled);
        } else {
          for (int64_t k = j; k < std::min<int64_t>(n, j + S::width); ++k)
            values[k] = to_float(W[first + s + k]) / divisor;
        }
      }
      for (int64_t j = 0; j < strip; j += S::width) {
        typename S::U code = S::words(0);
        const typename S::F value = S::load(values + j);
        for (int k = 0; k < 15; ++k) code = S::count_above(code, value, bounds[k]);
        S::store_words(codes + j, code);
      }
      if (args.type == FourBitType::fp4)
        for (uint32_t& code : codes) code = order[code];
      uint8_t* out = args.packed + (first + s) / 2;
      for (int64_t j = 0; j < (n + 1) / 2; ++j) out[j] = static_cast<uint8_t>(codes[2 * j] << 4 | codes[2 * j + 1]);
    }
  }
}

template <class S, class T>
void fourbit_dequantize(const FourBitDequantizeArgs& args, int64_t begin, int64_t end) {
  decode_run<S>(args.W, AbsmaxReader<S>(args.W), begin, end - begin, static_cast<T*>(args.out) + begin);
}

}  // namespace
}  // namespace peftfast::cpu
