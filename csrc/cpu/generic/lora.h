// The micro-kernels of the lora family; csrc/cpu/lora.cpp says how they make up forward and backward.
#pragma once

#include <algorithm>

#include "../scratch.h"
#include "../table.h"
#include "adapter.h"
#include "dropout.h"
#include "fourbit.h"
#include "gemm.h"
#include "moe.h"
#include "rowwise.h"

namespace peftfast::cpu {
namespace {

// A packed panel takes half of a 1 MiB L2: 512 KiB over 64 columns.
constexpr int64_t panel_bytes = 512 * 1024;

template <class S, class From>
void convert(const void* x, int64_t count, DType to, void* out) {
  if (to == DType::f32)
    convert<S>(static_cast<const From*>(x), count, static_cast<float*>(out));
  else
    convert<S>(static_cast<const From*>(x), count, static_cast<bf16*>(out));
}

template <class S, class T>
void transpose(const TransposeArgs& args, int64_t begin, int64_t end) {
  const T* B = static_cast<const T*>(args.B);
  for (int64_t n = begin; n < end; n += S::width) {
    const int64_t rows = std::min<int64_t>(S::width, end - n);
    for (int64_t j = 0; j < args.rank; j += S::width) {
      const int64_t ranks = std::min<int64_t>(S::width, args.rank - j);
      typename S::F block[S::width];
      for (int i = 0; i < S::width; ++i) {
        const T* source = B + (n + i) * args.rank + j;
        block[i] = i >= rows ? S::zero() : ranks == S::width ? S::load(source) : load_first<S>(source, ranks);
      }
      S::transpose(block);
      for (int64_t i = 0; i < ranks; ++i) {
        float* out = args.out + (j + i) * args.N + n;
        if (rows == S::width)
          S::store(out, block[i]);
        else
          store_first<S>(out, block[i], rows);
      }
    }
  }
}

// x = rstd * (x - mean)
template <class S>
PEFTFAST_INLINE void normalize(float mean, float rstd, int64_t count, float* x) {
  int64_t i = 0;
  for (; i + S::width <= count; i += S::width)
    S::store(x + i, S::mul(S::set1(rstd), S::add(S::load(x + i), S::set1(-mean))));
  for (; i < count; ++i) x[i] = rstd * (x[i] - mean);
}

// U = scale * dropout(norm(X)) A^T. Rows of X and of A are both contiguous along the reduction: dot products. A block
// of X is widened, normalized and dropped once into L1 and meets every rank. More ranks than a part of A in L2 has
// would read A again for every tile of rows: there, several tiles of X in L2 meet one part after the other.
template <class S, class T>
void down(const DownArgs& args, int64_t row_begin, int64_t row_end) {
  constexpr int64_t block = 1024, part = 32;  // of the reduction; of the ranks
  const int64_t group = args.R > part ? 8 * S::tile_rows : S::tile_rows;
  thread_local Scratch scratch;
  float* dropped = scratch.floats(group * block);
  const T* X = static_cast<const T*>(args.X);
  for (int64_t m = row_begin; m < row_end; m += group) {
    const int64_t rows = std::min(group, row_end - m);
    float* U = args.U + m * args.R;
    std::fill(U, U + rows * args.R, 0.0f);
    for (int64_t q = 0; q < args.Q; q += block) {
      const int64_t n = std::min(block, args.Q - q);
      for (int s = 0; s < args.dropout.segment_count; ++s) {
        const Segment& segment = args.dropout.segments[s];
        const float* x = dropped;
        int64_t ldx = block;
        if (std::is_same_v<T, float> && segment.threshold == 0 && !args.norm.mean) {
          x = reinterpret_cast<const float*>(X) + m * args.ldx + q;
          ldx = args.ldx;
        } else {
          for (int64_t i = 0; i < rows; ++i) {
            convert<S>(X + (m + i) * args.ldx + q, n, dropped + i * block);
            if (args.norm.mean) normalize<S>(args.norm.mean[m + i], args.norm.rstd[m + i], n, dropped + i * block);
            if (segment.threshold)
              drop<S>(args.dropout, segment, (args.first_row + m + i) * args.Q + q, n, dropped + i * block);
          }
        }
        for (int64_t j = segment.begin; j < segment.end; j += part)
          for (int64_t i = 0; i < rows; i += S::tile_rows)
            dot_rows<S, float>(x + i * ldx, ldx, std::min<int64_t>(S::tile_rows, rows - i), args.A + j * args.Q + q,
                               args.Q, std::min(part, segment.end - j), n, U + i * args.R + j, args.R);
      }
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < args.R; ++j) U[i * args.R + j] *= args.scale[j];
  }
}

// One panel of Y. The register tile starts from the bias and the low-rank term and goes on through the reduction of the
// base product, so that Y is written once. A reduction too long for the panel's share of L2 runs in blocks, with the
// accumulators parked in fp32 between them.
template <class S, class T>
class LinearPanel {
 public:
  LinearPanel(const LinearArgs& args, int64_t column)
      : args_(args), column_(column), columns_(std::min(panel_columns, args.P - column)) {}

  void run(int64_t row_begin, int64_t row_end) {
    const int64_t block_size = panel_bytes / panel_columns / (sizeof(Panel) * Mode::panel_rows) * Mode::unit;
    const int64_t blocks = std::max<int64_t>(1, (args_.Q + block_size - 1) / block_size);
    const int64_t block = std::max<int64_t>(64, ((args_.Q + blocks - 1) / blocks + 63) / 64 * 64);
    // Few rows of a 4-bit weight are read as floats: others could not follow the precision of its decoded values.
    const bool few = args_.M <= few_rows && args_.reduction_contiguous && (!args_.fourbit || std::is_same_v<T, float>);
    const bool straight =
        !args_.reduction_contiguous && !args_.fourbit && args_.M <= S::tile_rows && columns_ == panel_columns;
    const bool parked = blocks > 1 || few || straight;
    const int64_t rows = row_end - row_begin;

    const int64_t low_rank_floats = panel_columns * args_.R;
    const int64_t panel_floats = few        ? 0
                                 : straight ? rows * args_.Q
                                            : panel_columns * (block / Mode::unit + 1) * Mode::panel_rows;
    const int64_t words_floats = S::tile_rows * (panel_columns + random_slack<S>);
    thread_local Scratch scratch;
    low_rank_ =
        scratch.floats(low_rank_floats + panel_floats + words_floats + (parked ? rows * panel_columns : 0) + 64);
    float* workspace = low_rank_ + low_rank_floats;
    words_ = reinterpret_cast<uint32_t*>(workspace + panel_floats);
    parked_ = reinterpret_cast<float*>(words_) + words_floats;
    row_begin_ = row_begin;
    if (args_.R > 0)
      pack_straight<Widened<S, float, float>>(args_.L + column_, args_.P, columns_, args_.R, low_rank_, args_.R * NR);

    if (few || straight) {
      for_tiles(row_begin, row_end,
                [&](auto n, int64_t m, int64_t p) { tile<n.value>(m, p, nullptr, 0, 0, true, false); });
      if (few)
        dot_products(row_begin, row_end);
      else
        straight_products(row_begin, row_end, workspace);
      for (int64_t m = row_begin; m < row_end; ++m) store_row(m);
      return;
    }
    Panel* panel = reinterpret_cast<Panel*>(workspace);
    for (int64_t q = 0; q < std::max<int64_t>(1, args_.Q); q += block) {
      const int64_t n = std::min(block, args_.Q - q);
      const int64_t subpanel = (n + Mode::unit - 1) / Mode::unit * Mode::panel_rows * NR;
      if (n > 0) pack(q, n, panel, subpanel);  // a 4-bit weight of no elements has no scales to read
      for_tiles(row_begin, row_end, [&](auto rows_of_tile, int64_t m, int64_t p) {
        tile<rows_of_tile.value>(m, p, panel + p / NR * subpanel, q, n, q == 0, q + n >= args_.Q);
      });
    }
  }

 private:
  using Mode = typename BaseMode<S, T>::type;
  using Panel = typename Mode::Panel;
  using LowRank = Widened<S, float, float>;
  static constexpr int64_t NR = tile_columns<S>;

  const T* X() const { return static_cast<const T*>(args_.X); }
  const T* W() const { return static_cast<const T*>(args_.W); }

  void pack(int64_t q, int64_t n, Panel* panel, int64_t subpanel) {
    if (args_.fourbit && args_.reduction_contiguous)
      pack_fourbit_transposed<Mode>(*args_.fourbit, args_.Q, args_.fourbit_row + column_, columns_, q, n, panel,
                                    subpanel);
    else if (args_.fourbit)
      pack_fourbit_straight<Mode>(*args_.fourbit, args_.P, column_, columns_, args_.fourbit_row + q, n, panel,
                                  subpanel);
    else if (args_.reduction_contiguous)
      pack_transposed<Mode>(W() + column_ * args_.ldw + q, args_.ldw, columns_, n, panel, subpanel);
    else
      pack_straight<Mode>(W() + q * args_.ldw + column_, args_.ldw, columns_, n, panel, subpanel);
  }

  template <class F>
  PEFTFAST_INLINE void for_tiles(int64_t row_begin, int64_t row_end, F f) {
    for (int64_t m = row_begin; m < row_end; m += S::tile_rows) {
      const int64_t rows = std::min<int64_t>(S::tile_rows, row_end - m);
      with_rows<S::tile_rows>(rows, [&](auto n) {
        for (int64_t p = 0; p < columns_; p += NR) f(n, m, p);
      });
    }
  }

  // Rows [m, m + rows) of the sub-panel at p: `first` starts from bias and low-rank term, `last` writes Y.
  template <int rows>
  [[gnu::noinline]] void tile(int64_t m, int64_t p, const Panel* panel, int64_t q, int64_t n, bool first, bool last) {
    Accumulators<S, rows> c;
    float* parked = parked_ + (m - row_begin_) * panel_columns + p;
    if (first)
      start<rows>(c, m, p);
    else
      load_tile<S, rows>(c, parked, panel_columns);
    const T* x = X() + m * args_.ldx + q;
    if constexpr (std::is_same_v<T, float>)
      multiply_add_in_chains<Mode, rows>(c, x, args_.ldx, 1, panel, NR, n);
    else
      multiply_add<Mode, rows>(c, x, args_.ldx, 1, panel, NR, n);
    if (!last) {
      store_tile<S, rows>(c, parked, panel_columns);
      return;
    }
    if (args_.out != dtype_of<T>) {
      store_tile<S, rows>(c, before_, NR);
      for (int i = 0; i < rows; ++i) store_columns(before_ + i * NR, m + i, p, std::min(NR, columns_ - p));
      return;
    }
    T* Y = static_cast<T*>(args_.Y) + m * args_.P + column_ + p;
    for (int j = 0; j < S::tile_vectors; ++j) {
      const int64_t valid = columns_ - p - j * S::width;
      for (int i = 0; i < rows; ++i) {
        if (valid >= S::width)
          S::store(Y + i * args_.P + j * S::width, c[i][j]);
        else if (valid > 0)
          store_first<S>(Y + i * args_.P + j * S::width, c[i][j], valid);
      }
    }
  }

  template <int rows>
  PEFTFAST_INLINE void start(Accumulators<S, rows>& c, int64_t m, int64_t p) {
    clear<S, rows>(c);
    for (int s = 0; s < args_.dropout.segment_count; ++s) {
      const Segment& segment = args_.dropout.segments[s];
      const bool apart = segment.threshold != 0 && s > 0;  // its mask must not touch what is there already
      if (apart) {
        store_tile<S, rows>(c, before_, NR);
        clear<S, rows>(c);
      }
      const float* U = args_.U + m * args_.R + segment.begin;
      const float* L = low_rank_ + p / NR * (args_.R * NR) + segment.begin * NR;
      const int64_t ranks = segment.end - segment.begin;
      if constexpr (std::is_same_v<T, float>)
        multiply_add_in_chains<LowRank, rows>(c, U, args_.R, 1, L, NR, ranks);
      else
        multiply_add<LowRank, rows>(c, U, args_.R, 1, L, NR, ranks);
      if (segment.threshold == 0) continue;
      const typename S::F scale = S::set1(segment.keep_scale);
      for (int i = 0; i < rows; ++i) {
        const uint32_t* words = mask_words(segment, m, i, p);
        for (int j = 0; j < S::tile_vectors; ++j)
          c[i][j] = S::mul(scale, S::keep(c[i][j], words + j * S::width, segment.threshold));
      }
      if (apart)
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < S::tile_vectors; ++j) c[i][j] = S::add(c[i][j], S::load(before_ + i * NR + j * S::width));
    }
    if (args_.bias != nullptr)
      for (int j = 0; j < S::tile_vectors; ++j) {
        const int64_t valid = columns_ - p - j * S::width;
        const float* bias = args_.bias + column_ + p + j * S::width;
        const typename S::F b = valid >= S::width ? S::load(bias) : valid > 0 ? load_first<S>(bias, valid) : S::zero();
        for (int i = 0; i < rows; ++i) c[i][j] = S::add(c[i][j], b);
      }
    for (const Addend& addend : args_.addends)
      if (addend.X != nullptr) add<rows>(c, addend, m, p);
  }

  template <int rows>
  PEFTFAST_INLINE void add(Accumulators<S, rows>& c, const Addend& addend, int64_t m, int64_t p) {
    for (int i = 0; i < rows; ++i) {
      const T* x = static_cast<const T*>(addend.X) + (m + i) * addend.ld + column_ + p;
      const float scale = addend.scale ? addend.scale[m + i] : 1.0f, center = addend.center ? addend.center[m + i] : 0;
      for (int j = 0; j < S::tile_vectors; ++j) {
        const int64_t valid = columns_ - p - j * S::width;
        if (valid <= 0) break;
        const typename S::F value =
            valid >= S::width ? S::load(x + j * S::width) : load_first<S>(x + j * S::width, valid);
        c[i][j] = S::fma(S::set1(scale), S::add(value, S::set1(-center)), c[i][j]);
      }
    }
  }

  // The words of the whole panel's row are made with its first tile and serve the tiles beside it, as long as one
  // segment drops; with more, each tile makes its own.
  PEFTFAST_INLINE const uint32_t* mask_words(const Segment& segment, int64_t m, int i, int64_t p) {
    uint32_t* buffer = words_ + i * (panel_columns + random_slack<S>);
    const int64_t first = (args_.first_row + m + i) * args_.P + column_;
    if (args_.dropout.segment_count > 1) return random_words<S>(args_.dropout, segment, first + p, NR, buffer);
    if (p == 0) row_words_[i] = random_words<S>(args_.dropout, segment, first, panel_columns, buffer);
    return row_words_[i] + p;
  }

  // Few rows, reduction contiguous: nothing is packed. Eight rows of W stay in L1 and L2 while all rows of X meet them.
  void dot_products(int64_t row_begin, int64_t row_end) {
    if constexpr (std::is_same_v<T, float>)
      if (args_.fourbit) {
        dot_rows_fourbit<S>(X() + row_begin * args_.ldx, args_.ldx, row_end - row_begin, *args_.fourbit,
                            args_.bf16_codes, args_.fourbit_row + column_, columns_, args_.Q, parked_, panel_columns);
        return;
      }
    for (int64_t p = 0; p < columns_; p += 8)
      for (int64_t m = row_begin; m < row_end; m += S::tile_rows)
        dot_rows<S, T>(X() + m * args_.ldx, args_.ldx, std::min<int64_t>(S::tile_rows, row_end - m),
                       W() + (column_ + p) * args_.ldw, args_.ldw, std::min<int64_t>(8, columns_ - p), args_.Q,
                       parked_ + (m - row_begin) * panel_columns + p, panel_columns);
  }

  // At most one tile of rows, columns contiguous: W itself is the panel.
  void straight_products(int64_t row_begin, int64_t row_end, float* workspace) {
    using Straight = Widened<S, float, T>;
    for (int64_t m = row_begin; m < row_end; ++m)
      convert<S>(X() + m * args_.ldx, args_.Q, workspace + (m - row_begin) * args_.Q);
    with_rows<S::tile_rows>(row_end - row_begin, [&](auto n) {
      for (int64_t p = 0; p < columns_; p += NR) {
        Accumulators<S, n.value> c;
        load_tile<S, n.value>(c, parked_ + p, panel_columns);
        multiply_add_in_chains<Straight, n.value>(c, workspace, args_.Q, 1, W() + column_ + p, args_.ldw, args_.Q);
        store_tile<S, n.value>(c, parked_ + p, panel_columns);
      }
    });
  }

  void store_row(int64_t m) { store_columns(parked_ + (m - row_begin_) * panel_columns, m, 0, columns_); }

  // `count` elements of Y's row m from column p of the panel on; `values` may be read to the end of a vector.
  void store_columns(const float* values, int64_t m, int64_t p, int64_t count) {
    const int64_t first = m * args_.P + column_ + p;
    if (args_.out == DType::f32) store_columns_as(values, count, static_cast<float*>(args_.Y) + first);
    if (args_.out == DType::bf16) store_columns_as(values, count, static_cast<bf16*>(args_.Y) + first);
    if (args_.out == DType::f16) store_columns_as(values, count, static_cast<f16*>(args_.Y) + first);
  }

  template <class Out>
  PEFTFAST_INLINE void store_columns_as(const float* values, int64_t count, Out* out) {
    for (int64_t p = 0; p < count; p += S::width) {
      if (p + S::width <= count)
        S::store(out + p, S::load(values + p));
      else
        store_first<S>(out + p, S::load(values + p), count - p);
    }
  }

  const LinearArgs& args_;
  const int64_t column_, columns_;
  int64_t row_begin_ = 0;
  float* low_rank_ = nullptr;  // this panel of L, in sub-panels
  float* parked_ = nullptr;    // [rows, panel_columns]
  uint32_t* words_ = nullptr;  // [tile_rows, panel_columns + slack]
  const uint32_t* row_words_[S::tile_rows] = {};
  float before_[S::tile_rows * NR];  // accumulators set aside while another adapter's term is made
};

template <class S, class T>
void linear(const LinearArgs& args, int64_t column, int64_t row_begin, int64_t row_end) {
  LinearPanel<S, T>(args, column).run(row_begin, row_end);
}

// D = V^T dropout(norm(X)), one panel of columns over all rows. X is the panel here, packed, widened, normalized and
// dropped a block of rows at a time; the ranks are the rows of the tile.
template <class S, class T>
void outer(const OuterArgs& args, int64_t column) {
  using Mode = Widened<S, float, float>;
  constexpr int64_t block = 256, NR = tile_columns<S>;
  const int64_t columns = std::min(panel_columns, args.P - column);
  thread_local Scratch scratch;
  float* panel = scratch.floats((block + args.R) * panel_columns);
  float* sums = panel + block * panel_columns;  // [R, panel_columns]
  std::fill(sums, sums + args.R * panel_columns, 0.0f);
  const T* X = static_cast<const T*>(args.X) + column;
  for (int64_t m = 0; m < args.M; m += block) {
    const int64_t rows = std::min(block, args.M - m);
    for (int s = 0; s < args.dropout.segment_count; ++s) {
      const Segment& segment = args.dropout.segments[s];
      if (s == 0 || segment.threshold || args.dropout.segments[s - 1].threshold) {
        pack_straight<Mode>(X + m * args.ldx, args.ldx, columns, rows, panel, block * NR);
        if (args.norm.mean)
          for (int64_t p = 0; p < columns; p += NR)
            for (int64_t i = 0; i < rows; ++i)
              normalize<S>(args.norm.mean[m + i], args.norm.rstd[m + i], NR, panel + (p / NR * block + i) * NR);
        if (segment.threshold)
          for (int64_t i = 0; i < rows; ++i) {
            uint32_t buffer[panel_columns + random_slack<S>];
            const uint32_t* words = random_words<S>(args.dropout, segment, (args.first_row + m + i) * args.P + column,
                                                    panel_columns, buffer);
            for (int64_t p = 0; p < columns; p += S::width) {
              float* x = panel + p / NR * (block * NR) + i * NR + p % NR;
              S::store(x, S::keep(S::load(x), words + p, segment.threshold));
            }
          }
      }
      for (int64_t p = 0; p < columns; p += NR)
        for (int64_t j = segment.begin; j < segment.end; j += S::tile_rows)
          with_rows<S::tile_rows>(std::min<int64_t>(S::tile_rows, segment.end - j), [&](auto n) {
            Accumulators<S, n.value> c;
            float* sum = sums + j * panel_columns + p;
            load_tile<S, n.value>(c, sum, panel_columns);
            multiply_add_in_chains<Mode, n.value>(c, args.V + m * args.R + j, 1, args.R, panel + p / NR * (block * NR),
                                                  NR, rows);
            store_tile<S, n.value>(c, sum, panel_columns);
          });
    }
  }
  for (int s = 0; s < args.dropout.segment_count; ++s) {
    const Segment& segment = args.dropout.segments[s];
    for (int64_t j = segment.begin; j < segment.end; ++j)
      for (int64_t p = 0; p < columns; ++p) {
        float& D = args.D[j * args.P + column + p];
        D = (args.accumulate ? D : 0.0f) + sums[j * panel_columns + p] * segment.keep_scale;
      }
  }
}

// Back-to-back multiply-adds on independent registers, as many as the kernels' tile holds.
template <class S, class T>
double flops_of_loop(int64_t iterations) {
  constexpr bool pairs = S::has_bf16_dot && std::is_same_v<T, bf16>;
  constexpr int count = 12;
  typename S::F c[count];
  for (int i = 0; i < count; ++i) c[i] = S::set1(static_cast<float>(i));
  const float one = 1.0f;
  for (int64_t k = 0; k < iterations; ++k) {
    if constexpr (pairs) {
      const bf16 pair[2] = {bf16{0x3f80}, bf16{0x3f80}};
      const auto a = S::set1_pairs(pair);
#pragma GCC unroll 12
      for (int i = 0; i < count; ++i) c[i] = S::dot(a, a, c[i]);
    } else {
      const auto a = S::set1(one);
#pragma GCC unroll 12
      for (int i = 0; i < count; ++i) c[i] = S::fma(a, c[i], a);
    }
#pragma GCC unroll 12
    for (int i = 0; i < count; ++i) c[i] = S::now(c[i]);
  }
  for (int i = 1; i < count; ++i) c[0] = S::add(c[0], c[i]);
  float sums[4];
  S::sum(c[0], c[0], c[0], c[0], sums);
  return iterations * count * S::width * (pairs ? 4.0 : 2.0) + (sums[0] == 0.5f ? 1 : 0);  // used, so not left out
}

template <class S>
constexpr Table make_table() {
  return {
      S::has_bf16_dot,
      {transpose<S, float>, transpose<S, bf16>, transpose<S, f16>},
      {down<S, float>, down<S, bf16>, down<S, f16>},
      {linear<S, float>, linear<S, bf16>, linear<S, f16>},
      {outer<S, float>, outer<S, bf16>, outer<S, f16>},
      {convert<S, float>, convert<S, bf16>, convert<S, f16>},
      {combine<S, float>, combine<S, bf16>, combine<S, f16>},
      {combine_backward<S, float>, combine_backward<S, bf16>, combine_backward<S, f16>},
      {swiglu<S, float>, swiglu<S, bf16>, swiglu<S, f16>},
      {swiglu_backward<S, float>, swiglu_backward<S, bf16>, swiglu_backward<S, f16>},
      {rms_norm<S, float>, rms_norm<S, bf16>, rms_norm<S, f16>},
      {rms_norm_backward<S, float>, rms_norm_backward<S, bf16>, rms_norm_backward<S, f16>},
      {moments<S, float>, moments<S, bf16>, moments<S, f16>},
      bottleneck<S>,
      bottleneck_backward<S>,
      arranged_size<S>,
      arrange<S>,
      {fourbit_quantize<S, float>, fourbit_quantize<S, bf16>, fourbit_quantize<S, f16>},
      {fourbit_dequantize<S, float>, fourbit_dequantize<S, bf16>, fourbit_dequantize<S, f16>},
      {flops_of_loop<S, float>, flops_of_loop<S, bf16>, flops_of_loop<S, f16>},
  };
}

}  // namespace
}  // namespace peftfast::cpu
