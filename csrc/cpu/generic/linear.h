// Y = X W + bias + dropout(U L) + addends, a strip of columns at a time: the base product of every linear layer, with
// what is added to it. Vector units run gemm.h's register tiles down a packed panel. Matrix tiles, where there are any,
// multiply so much faster than L2 delivers that loops are cut for them alone. Where the reduction runs down W's
// columns:
//
//                      256 columns
//                 ┌───────────────────────────┐
//                 │       packed W            │ 512     in L2, for all rows
//        512      ├──────┬──────┬──────┬──────┤
//      ┌───────┐  │ 2x2  │      │      │      │
//   32 │   X   │  │matrix│  ->  │  ->  │      │         a block of X, copied to tiles, stays in L1 while the columns
//      └───────┘  │tiles │      │      │      │         go by; sums are parked in fp32 between blocks
//                 └──────┴──────┴──────┴──────┘
//
// Where it runs along W's rows, nothing is packed: Y^T = W X^T, "in place", with rows of W as they lie as the left
// operand and X, arranged as pairs, as the right one.
//
//        512          64 rows of X
//      ┌───────┐  ┌──────┬──────┬──────┬──────┐
//   16 │   W   │  │ tile │  ->  │  ->  │  ->  │         decoded or copied to L1; loaded from memory itself, 32 rows at
//      └───────┘  └──────┴──────┴──────┴──────┘         a time, where X has few
#pragma once

#include <algorithm>

#include "../scratch.h"
#include "../table.h"
#include "dropout.h"
#include "fourbit.h"
#include "gemm.h"

namespace peftfast::cpu {
namespace {

// A packed panel takes half of a 1 MiB L2: 512 KiB over 64 columns.
constexpr int64_t panel_bytes = 512 * 1024;

template <class S, class T>
constexpr bool in_matrix_tiles = S::has_matrix_tiles && std::is_same_v<T, bf16>;

// At most one register tile of rows, columns contiguous: W itself is the panel.
template <class S, class T>
bool down_columns(const LinearArgs& args) {
  constexpr int64_t most = in_matrix_tiles<S, T> ? 2 : S::tile_rows;
  return args.M <= most && !args.reduction_contiguous && !args.fourbit && args.P % panel_columns == 0;
}

// Up to so many rows, X and a strip of a dense W share L2, and W is worth no copy. For fewer than three rows the codes
// of a 4-bit W are better decoded in registers.
constexpr int64_t most_rows_from_memory = 112, fewest_rows_in_place_fourbit = 3;

template <class S>
MatrixTiles matrix_tiles(const LinearArgs& args) {
  if constexpr (S::has_matrix_tiles) {
    if (down_columns<S, bf16>(args)) return MatrixTiles::none;
    bool in_place = args.reduction_contiguous;
    if (args.fourbit) in_place &= args.M >= fewest_rows_in_place_fourbit && args.Q % S::matrix_depth == 0;
    return in_place ? MatrixTiles::in_place : MatrixTiles::packed;
  }
  return MatrixTiles::none;
}

template <class S, class T>
constexpr int64_t few_rows = in_matrix_tiles<S, T> ? 4 : 16;

template <class S, class T>  // what the product is asked for in
constexpr int64_t few_rows_fourbit =
    in_matrix_tiles<S, T> ? 4 : std::max<int64_t>(12, ChunkDot<S, std::is_same_v<T, bf16>>::rows);

template <class S, class T>
constexpr int64_t packed_columns = in_matrix_tiles<S, T> ? 4 * panel_columns : panel_columns;

// What will be packed next is asked for, a line at a time, while what is packed is multiplied.
class NextPanel {
 public:
  NextPanel() = default;
  // `rows` pieces of `bytes` bytes, `stride` bytes apart, in as many steps as are to come.
  NextPanel(const void* first, int64_t stride, int64_t rows, int64_t bytes, int64_t steps)
      : at_(static_cast<const char*>(first)), stride_(stride), bytes_(bytes), rows_(rows) {
    const int64_t lines = rows * (bytes + 63) / 64;
    while (lines > 0 && 2 * (mask_ + 1) * lines <= steps) mask_ = 2 * mask_ + 1;
  }
  PEFTFAST_INLINE void step(int64_t s) {
    if ((s & mask_) != 0 || rows_ == 0) return;
    __builtin_prefetch(at_ + done_, 0, 2);
    done_ += 64;
    if (done_ < bytes_) return;
    done_ = 0, at_ += stride_, --rows_;
  }

 private:
  const char* at_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0, rows_ = 0, done_ = 0, mask_ = 0;
};

// One strip of Y. The register tile starts from the bias and the low-rank term and goes on through the reduction of the
// base product, so that Y is written once. A reduction too long for the panel's share of L2 runs in blocks, with the
// accumulators parked in fp32 between them. A strip may be several panels wide: in a block they come one after another,
// and share the rows of X and the pages of W that it takes.
template <class S, class T>
class LinearStrip {
 public:
  LinearStrip(const LinearArgs& args, int64_t column, int64_t columns)
      : args_(args),
        column_(column),
        columns_(std::min(columns, args.P - column)),
        width_((columns_ + panel_columns - 1) / panel_columns * panel_columns) {}

  void run(int64_t row_begin, int64_t row_end) {
    const int64_t at_once = packed_at_once();
    const int64_t most = panel_bytes / at_once / (sizeof(Panel) * Mode::panel_rows) * Mode::unit;
    const int64_t block_size = in_matrix_tiles<S, T> ? block_of_tiles : most;
    const int64_t blocks = std::max<int64_t>(1, (args_.Q + block_size - 1) / block_size);
    const int64_t block = std::max<int64_t>(64, ((args_.Q + blocks - 1) / blocks + 63) / 64 * 64);
    const bool few = args_.along_rows, straight = down_columns<S, T>(args_);
    const bool in_place = in_matrix_tiles<S, T> && args_.tiles == MatrixTiles::in_place;
    const bool parked = blocks > 1 || few || straight || in_matrix_tiles<S, T>;
    const int64_t rows = row_end - row_begin;

    const int64_t low_rank_floats = width_ * args_.R;
    const int64_t panel_floats = few || in_place ? 0
                                 : straight ? rows * args_.Q
                                            : std::min(width_, at_once) * (block / Mode::unit + 1) * Mode::panel_rows;
    const int64_t words_floats = S::tile_rows * (width_ + random_slack<S>);
    const int64_t parked_floats = parked ? (rows + 15) / 16 * 16 * ld_parked() : 0;
    thread_local Scratch scratch;
    low_rank_ = scratch.floats(low_rank_floats + panel_floats + words_floats + parked_floats + 64);
    float* workspace = low_rank_ + low_rank_floats;
    words_ = reinterpret_cast<uint32_t*>(workspace + panel_floats);
    parked_ = reinterpret_cast<float*>(words_) + words_floats;
    row_begin_ = row_begin;
    if (args_.R > 0)
      pack_straight<Widened<S, float, float>>(args_.L + column_, args_.P, columns_, args_.R, low_rank_, args_.R * NR);

    if (few || straight || in_place) {
      for_tiles(row_begin, row_end,
                [&](auto n, int64_t m, int64_t p) { tile<n.value>(m, p, nullptr, 0, 0, true, false); });
      if (few)
        dot_products(row_begin, row_end);
      else if (straight)
        straight_products(row_begin, row_end, workspace);
      else if constexpr (in_matrix_tiles<S, T>)
        for (int64_t m = row_begin; m < row_end; m += rows_in_place)
          products_in_place(m, std::min(m + rows_in_place, row_end));
      for (int64_t m = row_begin; m < row_end; ++m) store_row(m);
      return;
    }
    Panel* panel = reinterpret_cast<Panel*>(workspace);
    for (int64_t q = 0; q < std::max<int64_t>(1, args_.Q); q += block) {
      const int64_t n = std::min(block, args_.Q - q);
      const bool first = q == 0, last = q + n >= args_.Q;
      for (begin_ = 0; begin_ < columns_; begin_ = end_) {
        end_ = std::min(begin_ + at_once, columns_);
        if constexpr (in_matrix_tiles<S, T>) {
          products_in_tiles(row_begin, row_end, panel, q, n, first, last);
        } else {
          const int64_t subpanel = (n + Mode::unit - 1) / Mode::unit * Mode::panel_rows * NR;
          if (n > 0) pack(q, n, panel, subpanel);  // a 4-bit weight of no elements has no scales to read
          const bool beside = end_ < columns_;     // else below
          next_ = next_panel(beside ? q : q + n, beside ? n : std::min(block, args_.Q - q - n), beside ? end_ : 0,
                             std::min(at_once, beside ? columns_ - end_ : columns_), row_end - row_begin);
          for_tiles(row_begin, row_end, [&](auto rows_of_tile, int64_t m, int64_t p) {
            tile<rows_of_tile.value>(m, p, panel + (p - begin_) / NR * subpanel, q, n, first, last);
          });
        }
      }
    }
  }

 private:
  using Mode = typename BaseMode<S, T>::type;
  using Panel = typename Mode::Panel;
  using LowRank = Widened<S, float, float>;
  static constexpr int64_t NR = tile_columns<S>;
  static constexpr int64_t block_in_place = 512, rows_in_place = 512;  // of the reduction, of X
  static constexpr int64_t block_of_tiles = 512;                       // of the reduction

  const T* X() const { return static_cast<const T*>(args_.X); }
  const T* W() const { return static_cast<const T*>(args_.W); }

  // Columns to pack together. Down W's columns each element is on another page, and worth a visit for 512 bytes.
  int64_t packed_at_once() const {
    if (in_matrix_tiles<S, T> || args_.reduction_contiguous) return packed_columns<S, T>;
    return args_.fourbit ? 2 * panel_columns : 512 / static_cast<int64_t>(sizeof(T));
  }

  // A line more than a row: a tile's rows a power of two apart would share too few sets of the caches.
  int64_t ld_parked() const { return width_ + 16; }

  // The `columns` columns from `begin` on of the block that starts at q, while `rows` rows of X are multiplied.
  NextPanel next_panel(int64_t q, int64_t n, int64_t begin, int64_t columns, int64_t rows) const {
    if (n <= 0) return {};
    const int64_t tiles = (rows + S::tile_rows - 1) / S::tile_rows * ((end_ - begin_ + NR - 1) / NR);
    const int64_t steps = tiles * (n / Mode::unit);
    const bool along = args_.reduction_contiguous;
    const int64_t pieces = along ? columns : n, length = along ? n : columns;  // of rows of W
    const int64_t row = along ? column_ + begin : q, element = along ? q : column_ + begin;
    if (args_.fourbit) {
      const int64_t ld = along ? args_.Q : args_.P;
      const uint8_t* first = args_.fourbit->packed + ((args_.fourbit_row + row) * ld + element) / 2;
      return {first, ld / 2, pieces, length / 2, steps};
    }
    constexpr int64_t size = sizeof(T);
    return {W() + row * args_.ldw + element, args_.ldw * size, pieces, length * size, steps};
  }

  void pack(int64_t q, int64_t n, Panel* panel, int64_t subpanel) {
    const int64_t column = column_ + begin_, columns = end_ - begin_;
    if (args_.fourbit && args_.reduction_contiguous)
      pack_fourbit_transposed<Mode>(*args_.fourbit, args_.Q, args_.fourbit_row + column, columns, q, n, panel,
                                    subpanel);
    else if (args_.fourbit)
      pack_fourbit_straight<Mode>(*args_.fourbit, args_.P, column, columns, args_.fourbit_row + q, n, panel, subpanel);
    else if (args_.reduction_contiguous)
      pack_transposed<Mode>(W() + column * args_.ldw + q, args_.ldw, columns, n, panel, subpanel);
    else
      pack_straight<Mode>(W() + q * args_.ldw + column, args_.ldw, columns, n, panel, subpanel);
  }

  template <class F>
  PEFTFAST_INLINE void for_tiles(int64_t row_begin, int64_t row_end, F f) {
    for (int64_t m = row_begin; m < row_end; m += S::tile_rows) {
      const int64_t rows = std::min<int64_t>(S::tile_rows, row_end - m);
      with_rows<S::tile_rows>(rows, [&](auto n) {
        for (int64_t p = begin_; p < end_; p += NR) f(n, m, p);
      });
    }
  }

  // One block of the reduction, in matrix tiles.
  void products_in_tiles(int64_t row_begin, int64_t row_end, Panel* panel, int64_t q, int64_t n, bool first,
                         bool last) {
    constexpr int64_t depth = S::matrix_depth;
    const int64_t steps = (n + depth - 1) / depth, subpanel = steps * (depth / 2) * Mode::columns;
    if (n > 0) pack(q, n, panel, subpanel);
    if (n % depth)
      for (int64_t p = begin_; p < end_; p += Mode::columns) {
        Panel* end = panel + ((p - begin_) / Mode::columns + 1) * subpanel;
        std::fill(end - subpanel + (n + 1) / 2 * Mode::columns, end, Panel{0});
      }
    typename S::Tiles tiles;
    alignas(64) T near[rows_in_tiles * block_of_tiles];
    for (int64_t m = row_begin; m < row_end; m += rows_in_tiles) {
      const int64_t rows = std::min(rows_in_tiles, row_end - m);
      if (first)
        for_tiles(m, m + rows, [&](auto r, int64_t i, int64_t p) { tile<r.value>(i, p, nullptr, 0, 0, true, false); });
      const int64_t ahead = m + rows < row_end ? rows * args_.ldx : n - (m - row_begin) * args_.ldx;
      copy_runs({X() + m * args_.ldx + q, args_.ldx, depth, rows, n}, ahead, rows_in_tiles, near);
      for (int64_t p = begin_; p < end_ && steps > 0; p += Mode::columns) {
        float* sums = parked_ + (m - row_begin_) * ld_parked() + p;
        const Panel* w = panel + (p - begin_) / Mode::columns * subpanel;
        rows > S::matrix_rows ? multiply<2>(tiles, near, w, steps, sums) : multiply<1>(tiles, near, w, steps, sums);
      }
      for (int64_t i = m; last && i < m + rows; ++i) store_row(i);
    }
  }

  // sums [16 row_tiles, 32] += x times a sub-panel. A tile is loaded again as soon as its last product is under way.
  template <int row_tiles, class Tiles>
  void multiply(Tiles& tiles, const T* x, const Panel* w, int64_t steps, float* sums) {
    constexpr int64_t tile = S::matrix_rows * S::matrix_depth;
    const int64_t row_bytes = ld_parked() * sizeof(float);
    const auto load_upper = [&]() __attribute__((always_inline)) { tiles.template load<4>(x, 2 * S::matrix_depth); };
    const auto load_lower = [&]() __attribute__((always_inline)) {
      if constexpr (row_tiles == 2) tiles.template load<5>(x + tile, 2 * S::matrix_depth);
    };
    const auto load_left = [&]() __attribute__((always_inline)) { tiles.template load<6>(w, 4 * Mode::columns); };
    const auto load_right = [&]() __attribute__((always_inline)) {
      tiles.template load<7>(w + S::matrix_columns, 4 * Mode::columns);
    };
    float* lower = sums + S::matrix_rows * ld_parked();
    tiles.template load<0>(sums, row_bytes);
    tiles.template load<1>(sums + S::matrix_columns, row_bytes);
    if constexpr (row_tiles == 2) {
      tiles.template load<2>(lower, row_bytes);
      tiles.template load<3>(lower + S::matrix_columns, row_bytes);
    }
    load_upper(), load_left(), load_right(), load_lower();
    for (int64_t s = 1; s <= steps; ++s) {
      if (s < steps) x += 2 * tile, w += S::matrix_depth / 2 * Mode::columns;  // the last step loads its own again
      tiles.template dot<0, 4, 6>();
      tiles.template dot<1, 4, 7>();
      load_upper();
      if constexpr (row_tiles == 2) tiles.template dot<2, 5, 6>();
      load_left();
      if constexpr (row_tiles == 2) tiles.template dot<3, 5, 7>();
      load_lower(), load_right();
    }
    tiles.template store<0>(sums, row_bytes);
    tiles.template store<1>(sums + S::matrix_columns, row_bytes);
    if constexpr (row_tiles == 2) {
      tiles.template store<2>(lower, row_bytes);
      tiles.template store<3>(lower + S::matrix_columns, row_bytes);
    }
  }

  // Y^T += W X^T. Four tiles of sums are two of W by two of X or, where a block of W is brought to L1 for more rows
  // than that, one by four.
  void products_in_place(int64_t row_begin, int64_t row_end) {
    constexpr int64_t tile = S::matrix_rows, depth = S::matrix_depth;
    const bool copied = !args_.fourbit && args_.M > most_rows_from_memory;
    const bool tall = copied || (args_.fourbit && row_end - row_begin > rows_in_tiles);
    const int64_t w_rows = tall ? tile : 2 * tile, x_rows = tall ? 4 * tile : 2 * tile;
    const int64_t groups = (row_end - row_begin + x_rows - 1) / x_rows, padded = (args_.Q + depth - 1) / depth * depth;
    const int64_t block = args_.fourbit || copied ? block_in_place : padded, runs = padded / depth;
    thread_local Scratch scratch;
    float* sums = scratch.floats(width_ / w_rows * groups * 4 * tile * tile + (args_.fourbit ? columns_ * runs : 0));
    float* scales = sums + width_ / w_rows * groups * 4 * tile * tile;
    if (args_.fourbit) AbsmaxReader<S>(*args_.fourbit).each_32(first_code(), columns_ * runs, scales);
    typename S::Tiles tiles;
    alignas(64) T near[2 * tile * block_in_place];
    for (int64_t q = 0; q < padded; q += block)
      for (int64_t p = 0; p < columns_; p += w_rows) {
        Rows rows{nullptr, args_.ldw, depth, std::min(w_rows, columns_ - p), std::min(block, args_.Q - q)};
        // Pieces of rows are too short for the hardware to fetch ahead.
        const int64_t ld = args_.fourbit ? args_.Q : args_.ldw;
        const int64_t ahead = p + w_rows < columns_ ? w_rows * ld : block - p * ld;
        if (args_.fourbit)
          decode_runs<S>(*args_.fourbit, first_code() + p * args_.Q + q, args_.Q, rows.count, rows.elements,
                         scales + p * runs + q / depth, ahead, near);
        else
          rows.w = W() + (column_ + p) * args_.ldw + q;
        if (copied) copy_runs(rows, ahead, rows.count, near);
        if (args_.fourbit || copied)
          rows = {near, depth, rows.count * depth, w_rows, (rows.elements + depth - 1) / depth * depth};
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t m = row_begin + g * x_rows, x_tiles = std::min(x_rows, row_end - m + tile - 1) / tile;
          const T* x = X() + m * padded + q * rows_in_tiles;
          float* sum = sums + (p / w_rows * groups + g) * 4 * tile * tile;
          if (tall)
            x_tiles > 3   ? multiply_rows<1, 4>(tiles, rows, x, padded, q == 0, sum)
            : x_tiles > 2 ? multiply_rows<1, 3>(tiles, rows, x, padded, q == 0, sum)
                          : multiply_rows<1, 2>(tiles, rows, x, padded, q == 0, sum);
          else
            x_tiles > 1 ? multiply_rows<2, 2>(tiles, rows, x, padded, q == 0, sum)
                        : multiply_rows<2, 1>(tiles, rows, x, padded, q == 0, sum);
        }
      }
    for (int64_t p = 0; p < columns_ && padded > 0; p += w_rows)
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t i = 0; i < 4; ++i, sums += tile * tile) {
          const int64_t m = row_begin + g * x_rows + (tall ? i : i % 2) * tile;
          if (m < row_end) add_transposed(sums, m, row_end, p + (tall ? 0 : i / 2 * tile));
        }
  }

  int64_t first_code() const { return (args_.fourbit_row + column_) * args_.Q; }

  // Rows of a matrix, or of a block of it: `ldw` apart, their next 32 elements `step` further on.
  struct Rows {
    const T* w;
    int64_t ldw, step, count, elements;
  };

  // All rows' first 32 elements, then their next, with zeros beyond the last; in `out` those are `apart` rows apart.
  // What lies `ahead` is asked for.
  void copy_runs(const Rows& rows, int64_t ahead, int64_t apart, T* out) const {
    constexpr int64_t depth = S::matrix_depth;
    for (int64_t i = 0; i < rows.count; ++i, out += depth) {
      const T* w = rows.w + i * rows.ldw;
      prefetch_row(hidden(w) + ahead, rows.elements);
      int64_t k = 0;
      for (; k + depth <= rows.elements; k += depth) S::store_pairs(out + k * apart, S::load_pairs(w + k));
      if (k == rows.elements) continue;
      T last[depth] = {};
      std::memcpy(last, w + k, (rows.elements - k) * sizeof(T));
      S::store_pairs(out + k * apart, S::load_pairs(last));
    }
  }

  // f(integral_constant) for each tile of sums: 2 w + x for two tiles of W, x for one.
  template <int w_tiles, int x_tiles, class F>
  PEFTFAST_INLINE static void each_sum(F f) {
    f(std::integral_constant<int, 0>{});
    if constexpr (x_tiles > 1) f(std::integral_constant<int, 1>{});
    if constexpr (w_tiles == 2 || x_tiles > 2) f(std::integral_constant<int, 2>{});
    if constexpr (w_tiles * x_tiles == 4) f(std::integral_constant<int, 3>{});
  }

  // Tiles of sums, one after another, += rows of W by rows of X, whose third and fourth tile are in the next group of
  // rows. The first product starts from nothing.
  template <int w_tiles, int x_tiles, class Tiles>
  void multiply_rows(Tiles& tiles, const Rows& rows, const T* x, int64_t ldx, bool first, float* sums) {
    constexpr int64_t depth = S::matrix_depth, tile = S::matrix_rows, at_once = w_tiles * tile;
    each_sum<w_tiles, x_tiles>([&](auto i) {
      if (first)
        tiles.template clear<i.value>();
      else
        tiles.template load<i.value>(sums + i.value * tile * tile, 4 * tile);
    });
    const int64_t steps = (rows.elements + depth - 1) / depth;
    const int64_t whole = rows.count == at_once ? rows.elements / depth : 0;
    const T *w = rows.w, *next_x = x + rows_in_tiles * ldx;
    for (int64_t s = 0; s < steps; ++s, w += rows.step, x += 2 * tile * depth, next_x += 2 * tile * depth) {
      if (s < whole) {
        step<w_tiles, x_tiles>(tiles, w, rows.ldw, x, next_x);
        continue;
      }
      alignas(64) T rest[at_once * depth] = {};
      for (int64_t i = 0; i < rows.count; ++i)
        std::memcpy(rest + i * depth, w + i * rows.ldw, std::min(depth, rows.elements - s * depth) * sizeof(T));
      step<w_tiles, x_tiles>(tiles, rest, depth, x, next_x);
    }
    each_sum<w_tiles, x_tiles>([&](auto i) { tiles.template store<i.value>(sums + i.value * tile * tile, 4 * tile); });
  }

  // One step of the reduction.
  template <int w_tiles, int x_tiles, class Tiles>
  PEFTFAST_INLINE void step(Tiles& tiles, const T* w, int64_t ldw, const T* x, const T* next_x) {
    constexpr int64_t rows = S::matrix_rows, tile = rows * S::matrix_depth;
    tiles.template load<4>(w, ldw * sizeof(T));
    tiles.template load<6>(x, 4 * rows);
    tiles.template dot<0, 4, 6>();
    if constexpr (x_tiles > 1) {
      tiles.template load<7>(x + tile, 4 * rows);
      tiles.template dot<1, 4, 7>();
    }
    if constexpr (w_tiles == 2) {
      tiles.template load<5>(w + rows * ldw, ldw * sizeof(T));
      tiles.template dot<2, 5, 6>();
      if constexpr (x_tiles > 1) tiles.template dot<3, 5, 7>();
    }
    if constexpr (x_tiles > 2) {
      tiles.template load<6>(next_x, 4 * rows);
      tiles.template dot<2, 4, 6>();
    }
    if constexpr (x_tiles > 3) {
      tiles.template load<7>(next_x + tile, 4 * rows);
      tiles.template dot<3, 4, 7>();
    }
  }

  // Adds sums [columns, rows], a tile, to what is parked of rows from m on and columns from p on.
  void add_transposed(const float* sums, int64_t m, int64_t row_end, int64_t p) {
    typename S::F block[S::width];
    for (int i = 0; i < S::width; ++i) block[i] = S::load(sums + i * S::width);
    S::transpose(block);
    for (int64_t i = 0; i < std::min<int64_t>(S::width, row_end - m); ++i) {
      float* parked = parked_ + (m + i - row_begin_) * ld_parked() + p;
      S::store(parked, S::add(S::load(parked), block[i]));
    }
  }

  // Rows [m, m + rows) of the sub-panel at p: `first` starts from bias and low-rank term, `last` writes Y.
  template <int rows>
  [[gnu::noinline]] void tile(int64_t m, int64_t p, const Panel* panel, int64_t q, int64_t n, bool first, bool last) {
    Accumulators<S, rows> c;
    float* parked = parked_ + (m - row_begin_) * ld_parked() + p;
    if (first)
      start<rows>(c, m, p);
    else
      load_tile<S, rows>(c, parked, ld_parked());
    const T* x = X() + m * args_.ldx + q;
    if constexpr (std::is_same_v<T, float>)
      multiply_add_in_chains<Mode, rows>(c, x, args_.ldx, 1, panel, NR, n, chain_for(args_.M, args_.Q));
    else
      multiply_add<Mode, rows>(c, x, args_.ldx, 1, panel, NR, n, [&](int64_t s) { next_.step(s); });
    if (!last) {
      store_tile<S, rows>(c, parked, ld_parked());
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
        multiply_add_in_chains<LowRank, rows>(c, U, args_.R, 1, L, NR, ranks, chain);
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
    uint32_t* buffer = words_ + i * (width_ + random_slack<S>);
    const int64_t first = (args_.first_row + m + i) * args_.P + column_;
    if (args_.dropout.segment_count > 1) return random_words<S>(args_.dropout, segment, first + p, NR, buffer);
    if (p == begin_)
      row_words_[i] = random_words<S>(args_.dropout, segment, first + p, (end_ - p + NR - 1) / NR * NR, buffer);
    return row_words_[i] + p - begin_;
  }

  // Few rows, reduction contiguous: nothing is packed.
  void dot_products(int64_t row_begin, int64_t row_end) {
    if constexpr (std::is_same_v<T, float>)
      if (args_.fourbit) {
        dot_rows_fourbit<S>(X() + row_begin * args_.ldx, args_.ldx, row_end - row_begin, *args_.fourbit,
                            args_.bf16_codes, args_.fourbit_row + column_, columns_, args_.Q, parked_, ld_parked());
        return;
      }
    const int64_t rows = row_end - row_begin;
    const auto dot = rows <= rows_near<S> / 2 ? dot_rows<S, T> : dot_rows_from_memory<S, T>;
    dot(X() + row_begin * args_.ldx, args_.ldx, rows, W() + column_ * args_.ldw, args_.ldw, columns_, args_.Q, parked_,
        ld_parked());
  }

  // At most one tile of rows, columns contiguous: W itself is the panel.
  void straight_products(int64_t row_begin, int64_t row_end, float* workspace) {
    using Straight = Widened<S, float, T>;
    for (int64_t m = row_begin; m < row_end; ++m)
      convert<S>(X() + m * args_.ldx, args_.Q, workspace + (m - row_begin) * args_.Q);
    with_rows<S::tile_rows>(row_end - row_begin, [&](auto n) {
      for (int64_t p = 0; p < columns_; p += NR) {
        Accumulators<S, n.value> c;
        load_tile<S, n.value>(c, parked_ + p, ld_parked());
        multiply_add_in_chains<Straight, n.value>(c, workspace, args_.Q, 1, W() + column_ + p, args_.ldw, args_.Q,
                                                  chain_for(args_.M, args_.Q));
        store_tile<S, n.value>(c, parked_ + p, ld_parked());
      }
    });
  }

  void store_row(int64_t m) {
    store_columns(parked_ + (m - row_begin_) * ld_parked() + begin_, m, begin_, end_ - begin_);
  }

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
  const int64_t column_, columns_, width_;  // width_: columns_, rounded up to whole panels
  int64_t begin_ = 0, end_ = columns_;      // of the strip, the columns that are packed
  int64_t row_begin_ = 0;
  NextPanel next_;
  float* low_rank_ = nullptr;  // this strip of L, in sub-panels
  float* parked_ = nullptr;    // [rows, ld_parked()]
  uint32_t* words_ = nullptr;  // [tile_rows, width_ + slack]
  const uint32_t* row_words_[S::tile_rows] = {};
  float before_[S::tile_rows * NR];  // accumulators set aside while another adapter's term is made
};

// One row of X [Q] to its places among rows_in_tiles rows of X transposed, for W in place: for each step of the
// reduction two tiles, with pairs of the row's elements above each other.
template <class S>
void arrange_in_tiles(const void* x, int64_t Q, int64_t row, void* out) {
  if constexpr (S::has_matrix_tiles) {
    constexpr int64_t depth = S::matrix_depth, tile = S::matrix_rows * depth;
    bf16* to = static_cast<bf16*>(out) + row / S::matrix_rows * tile + row % S::matrix_rows * 2;
    for (int64_t q = 0; q < Q; q += depth, to += 2 * tile) {
      bf16 pairs[depth] = {};
      const bf16* from = static_cast<const bf16*>(x) + q;
      if (q + depth > Q) from = static_cast<bf16*>(std::memcpy(pairs, from, (Q - q) * sizeof(bf16)));
      for (int64_t k = 0; k < depth; k += 2) std::memcpy(to + k * S::matrix_rows, from + k, 2 * sizeof(bf16));
    }
  }
}

template <class S, class T>
void linear(const LinearArgs& args, int64_t column, int64_t columns, int64_t row_begin, int64_t row_end) {
  LinearStrip<S, T>(args, column, columns).run(row_begin, row_end);
}

}  // namespace
}  // namespace peftfast::cpu
