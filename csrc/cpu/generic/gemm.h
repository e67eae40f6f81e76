// Matrix products C[rows, columns] += X[rows, Q] * panel[Q, columns], in registers.
//
//                    columns
//              ┌───────────────┐
//              │     panel     │ Q    packed: the reduction runs down, one row of `tile_vectors` vectors a step,
//              └───────────────┘      read from L2 and used for every row of X
//        Q     ┌───────────────┐
//   rows ─────►│ accumulators  │      tile_rows x tile_vectors vectors, never in memory while Q lasts
//              └───────────────┘
//
// An element of X is broadcast from memory, so X is read in place whatever its row stride. A "mode" says what one
// step does: Widened multiplies and adds in fp32, PairDot takes two bf16 of X and of the panel in one instruction.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "convert.h"

namespace peftfast::cpu {
namespace {

template <class T>
constexpr DType dtype_of = std::is_same_v<T, float>  ? DType::f32
                           : std::is_same_v<T, bf16> ? DType::bf16
                                                     : DType::f16;

template <class S>
constexpr int64_t tile_columns = S::tile_vectors * S::width;

// The same pointer, but the compiler cannot know it.
template <class T>
PEFTFAST_INLINE const T* hidden(const T* p) {
  asm volatile("" : "+r"(p));
  return p;
}

// The first n of `width` values, the rest zero.
template <class S, class T>
PEFTFAST_INLINE typename S::F load_first(const T* p, int64_t n) {
  T values[S::width] = {};
  std::memcpy(values, p, n * sizeof(T));
  return S::load(values);
}

template <class S, class T>
PEFTFAST_INLINE void store_first(T* p, typename S::F x, int64_t n) {
  T values[S::width];
  S::store(values, x);
  std::memcpy(p, values, n * sizeof(T));
}

template <class S, class From, class To>
void convert(const From* x, int64_t count, To* out) {
  int64_t i = 0;
  for (; i + S::width <= count; i += S::width) S::store(out + i, S::load(x + i));
  for (; i < count; ++i) out[i] = from_float<To>(to_float(x[i]));
}

template <class S, int rows>
using Accumulators = typename S::F[rows][S::tile_vectors];

template <class S, int rows>
PEFTFAST_INLINE void clear(Accumulators<S, rows>& c) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < S::tile_vectors; ++j) c[i][j] = S::zero();
}

template <class S, int rows>
PEFTFAST_INLINE void copy_tile(const Accumulators<S, rows>& from, Accumulators<S, rows>& to) {
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < S::tile_vectors; ++j) to[i][j] = from[i][j];
}

template <class S, int rows>
PEFTFAST_INLINE void load_tile(Accumulators<S, rows>& c, const float* p, int64_t ld) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < S::tile_vectors; ++j) c[i][j] = S::load(p + i * ld + j * S::width);
}

template <class S, int rows>
PEFTFAST_INLINE void store_tile(const Accumulators<S, rows>& c, float* p, int64_t ld) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < S::tile_vectors; ++j) S::store(p + i * ld + j * S::width, c[i][j]);
}

// fp32 multiply-add of X in XT with a panel in BT, both widened as they are loaded. A step takes one element of
// each row of X; two when XT is bf16, because a pair is broadcast by one load and parted by one operation each.
template <class Simd, class XT, class BT>
struct Widened {
  using S = Simd;
  using X = XT;
  using Panel = BT;
  static constexpr int unit = std::is_same_v<XT, bf16> ? 2 : 1;  // reduction elements a step
  static constexpr int panel_rows = unit;                        // rows of the panel a step
  static constexpr int64_t columns = tile_columns<S>;            // of a sub-panel

  template <int rows>
  PEFTFAST_INLINE static void step(Accumulators<S, rows>& c, const XT* x, int64_t ldx, const BT* panel, int64_t ldp) {
    if constexpr (unit == 2) {
      half<rows>(c, panel, [&](int i) { return S::set1_first(x + i * ldx); });
      const XT* again = hidden(x);  // each pair is loaded again: kept for both halves they would fill the registers
      half<rows>(c, panel + ldp, [&](int i) { return S::set1_second(again + i * ldx); });
    } else if constexpr (std::is_same_v<XT, float>) {
      half<rows>(c, panel, [&](int i) { return S::set1(x[i * ldx]); });
    } else {
      half<rows>(c, panel, [&](int i) { return S::set1(x + i * ldx); });
    }
  }

 private:
  template <int rows, class Broadcast>
  PEFTFAST_INLINE static void half(Accumulators<S, rows>& c, const BT* panel, Broadcast broadcast) {
    typename S::F b[S::tile_vectors];
    for (int j = 0; j < S::tile_vectors; ++j) b[j] = S::load(panel + j * S::width);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const typename S::F x = broadcast(i);
      for (int j = 0; j < S::tile_vectors; ++j) {
        c[i][j] = unit == 2 ? S::fma_now(x, b[j], c[i][j]) : S::fma(x, b[j], c[i][j]);
      }
    }
  }
};

// Two bf16 of X times two of the panel a step; a lane of the panel holds both.
template <class Simd, int64_t columns_of_subpanel = tile_columns<Simd>>
struct PairDot {
  using S = Simd;
  using X = bf16;
  using Panel = uint32_t;
  static constexpr int unit = 2, panel_rows = 1;
  static constexpr int64_t columns = columns_of_subpanel;

  template <int rows>
  PEFTFAST_INLINE static void step(Accumulators<S, rows>& c, const bf16* x, int64_t ldx, const uint32_t* panel,
                                   int64_t) {
    typename S::Pairs b[S::tile_vectors];
    for (int j = 0; j < S::tile_vectors; ++j) b[j] = S::load_pairs(panel + j * S::width);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const typename S::Pairs pair = S::set1_pairs(x + i * ldx);
      for (int j = 0; j < S::tile_vectors; ++j) c[i][j] = S::dot(pair, b[j], c[i][j]);
    }
  }
};

template <class S, class T, bool = S::has_bf16_dot && std::is_same_v<T, bf16>>
struct BaseMode {
  using type = Widened<S, T, float>;
};
template <class S, class T>
struct BaseMode<S, T, true> {
  using type = std::conditional_t<S::has_matrix_tiles, PairDot<S, 32>, PairDot<S>>;  // two matrix tiles, side by side
};

// c += X * panel over Q elements of each row. `ldx` parts the rows of X and `stride_x` the elements of a row;
// `ldp` parts the rows of the panel. An odd Q in a mode of pairs ends on a zero, in X here and in the panel by packing.
// between(s) is called in step s.
template <class Mode, int rows, class Between>
PEFTFAST_INLINE void multiply_add(Accumulators<typename Mode::S, rows>& sums, const typename Mode::X* x, int64_t ldx,
                                  int64_t stride_x, const typename Mode::Panel* panel, int64_t ldp, int64_t Q,
                                  Between between) {
  // Widening two elements a step takes every register of AVX2 there is. Of sums that the caller goes over by index, the
  // compiler would store each in every step; not of a copy that nobody else sees.
  constexpr bool copies = Mode::panel_rows == 2;
  Accumulators<typename Mode::S, rows> copy;
  auto& c = copies ? copy : sums;
  if constexpr (copies) copy_tile<typename Mode::S, rows>(sums, copy);
  const int64_t steps = Q / Mode::unit;
  for (int64_t s = 0; s < steps; ++s) {
    Mode::template step<rows>(c, x + s * Mode::unit * stride_x, ldx, panel + s * Mode::panel_rows * ldp, ldp);
    between(s);
  }
  if constexpr (Mode::unit == 2) {
    if (Q % 2) {
      bf16 last[rows][2];
      for (int i = 0; i < rows; ++i) last[i][0] = x[i * ldx + Q - 1], last[i][1] = bf16{0};
      Mode::template step<rows>(c, last[0], 2, panel + steps * Mode::panel_rows * ldp, ldp);
    }
  }
  if constexpr (copies) copy_tile<typename Mode::S, rows>(copy, sums);
}

template <class Mode, int rows>
PEFTFAST_INLINE void multiply_add(Accumulators<typename Mode::S, rows>& c, const typename Mode::X* x, int64_t ldx,
                                  int64_t stride_x, const typename Mode::Panel* panel, int64_t ldp, int64_t Q) {
  multiply_add<Mode, rows>(c, x, ldx, stride_x, panel, ldp, Q, [](int64_t) {});
}

// An fp32 sum in one chain of Q terms loses accuracy with the square root of Q. Where the result stays fp32, chains are
// this long and their sums are added up, which keeps the error at that of the best blocked BLAS. In a dot product the
// lanes of a vector are chains of their own.
constexpr int64_t chain = 128;

// Products of few rows, which are bound by packing, can afford the best: as many chains as each is long.
PEFTFAST_INLINE int64_t chain_for(int64_t rows, int64_t Q) {
  int64_t length = chain;
  while (rows <= 64 && length > 8 && length * length > Q) length /= 2;
  return length;
}

// multiply_add, but each accumulator adds up chains.
template <class Mode, int rows>
PEFTFAST_INLINE void multiply_add_in_chains(Accumulators<typename Mode::S, rows>& c, const typename Mode::X* x,
                                            int64_t ldx, int64_t stride_x, const typename Mode::Panel* panel,
                                            int64_t ldp, int64_t Q, int64_t chain) {
  using S = typename Mode::S;
  static_assert(Mode::unit == 1);
  alignas(64) float sums[2][rows * tile_columns<S>];  // of every other chain
  store_tile<S, rows>(c, sums[0], tile_columns<S>);
  clear<S, rows>(c);
  store_tile<S, rows>(c, sums[1], tile_columns<S>);
  const auto add = [&](float* sum) __attribute__((always_inline)) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < S::tile_vectors; ++j)
        c[i][j] = S::add(c[i][j], S::load(sum + i * tile_columns<S> + j * S::width));
  };
  int turn = 0;
  for (int64_t q = 0; q < Q; q += chain, turn ^= 1) {
    clear<S, rows>(c);
    multiply_add<Mode, rows>(c, x + q * stride_x, ldx, stride_x, panel + q * ldp, ldp, std::min(chain, Q - q));
    add(sums[turn]);
    store_tile<S, rows>(c, sums[turn], tile_columns<S>);
  }
  load_tile<S, rows>(c, sums[0], tile_columns<S>);
  add(sums[1]);
}

// Calls f(std::integral_constant<int, rows>) for a row count known only at run time.
template <int most, class F>
PEFTFAST_INLINE void with_rows(int64_t rows, F f) {
  if constexpr (most == 1) {
    f(std::integral_constant<int, 1>{});
  } else {
    if (rows == most)
      f(std::integral_constant<int, most>{});
    else
      with_rows<most - 1>(rows, f);
  }
}

// ---- packing ---------------------------------------------------------------------------------------------------
// A panel of `columns` <= panel width columns, cut into sub-panels of a mode's columns; each is [rows of the
// reduction, columns], zero beyond the matrix and, for an odd Q in a mode of pairs, in the last half step.

// From W whose reduction is contiguous, element (q, p) at w[p * ldw + q]: blocks are transposed in registers. Pairs
// of bf16 are moved as if they were floats.
template <class Mode, class T>
void pack_transposed(const T* w, int64_t ldw, int64_t columns, int64_t Q, typename Mode::Panel* panel,
                     int64_t subpanel_size) {
  using S = typename Mode::S;
  constexpr bool pairs = std::is_same_v<typename Mode::Panel, uint32_t>;
  constexpr int64_t per_row = pairs ? 2 : 1;  // elements of W in one row of the panel
  constexpr int64_t NR = Mode::columns;
  const int64_t panel_rows = (Q + Mode::unit - 1) / Mode::unit * Mode::panel_rows;
  float* out = reinterpret_cast<float*>(panel);
  for (int64_t p = 0; p < (columns + NR - 1) / NR * NR; p += S::width) {
    float* column = out + p / NR * subpanel_size + p % NR;
    for (int64_t row = 0; row < panel_rows; row += S::width) {
      const int64_t q = row * per_row, elements = std::min<int64_t>(S::width * per_row, Q - q);
      typename S::F block[S::width];
      for (int i = 0; i < S::width; ++i) {
        const T* source = w + (p + i) * ldw + q;
        if (p + i >= columns || elements <= 0) {
          block[i] = S::zero();
        } else if constexpr (pairs) {
          if (elements == S::width * per_row) {
            block[i] = S::load(reinterpret_cast<const float*>(source));
          } else {
            float values[S::width] = {};
            std::memcpy(values, source, elements * sizeof(T));
            block[i] = S::load(values);
          }
        } else {
          block[i] = elements == S::width ? S::load(source) : load_first<S>(source, elements);
        }
      }
      S::transpose(block);
      const int64_t rows = std::min<int64_t>(S::width, panel_rows - row);
      for (int64_t i = 0; i < rows; ++i) S::store(column + (row + i) * NR, block[i]);
    }
  }
}

// Rows of a panel lie pages apart in W, where no hardware prefetcher follows: they are asked for this many ahead.
constexpr int64_t rows_ahead = 16;

template <class T>
PEFTFAST_INLINE void prefetch_row(const T* row, int64_t columns) {
  for (int64_t p = 0; p < columns; p += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + p);
}

// From W whose columns are contiguous, element (q, p) at w[q * ldw + p]. Sub-panels often lie a multiple of a cache's
// way apart, and so do rows of W: both crowd into few of its sets. Some rows, fewer than L1 has ways, are written to
// one sub-panel before the next.
template <class Mode, class T>
void pack_straight(const T* w, int64_t ldw, int64_t columns, int64_t Q, typename Mode::Panel* panel,
                   int64_t subpanel_size) {
  using S = typename Mode::S;
  constexpr bool pairs = std::is_same_v<typename Mode::Panel, uint32_t>;
  constexpr int64_t NR = Mode::columns, per_row = pairs ? 2 : 1;  // rows of W in one row of the panel
  constexpr int64_t together = 4;
  const int64_t padded = (Q + Mode::unit - 1) / Mode::unit * Mode::unit;
  for (int64_t begin = 0; begin < padded; begin += together) {
    const int64_t end = std::min(begin + together, padded);
    for (int64_t q = begin; q < end; ++q) prefetch_row(w + std::min(q + rows_ahead, Q - 1) * ldw, columns);
    for (int64_t p = 0; p < columns; p += NR)
      for (int64_t q = begin; q < end; q += per_row)
        for (int64_t v = 0; v < NR; v += S::width) {
          auto* out = panel + p / NR * subpanel_size + q / per_row * NR + v;
          T values[per_row][S::width];
          const T* row[per_row];
          for (int64_t i = 0; i < per_row; ++i) {
            const int64_t n = q + i < Q ? std::clamp<int64_t>(columns - p - v, 0, S::width) : 0;
            row[i] = w + (q + i) * ldw + p + v;
            if (n == S::width) continue;
            std::memset(values[i], 0, sizeof(values[i]));
            std::memcpy(values[i], row[i], n * sizeof(T));
            row[i] = values[i];
          }
          if constexpr (pairs)
            S::store_pairs(out, S::zip(row[0], row[1]));
          else
            S::store(out, S::load(row[0]));
        }
  }
}

// ---- dot products ----------------------------------------------------------------------------------------------
// Where few rows meet a matrix whose reduction is contiguous, nothing is packed: both are read along the reduction
// and each product is summed across its lanes at the end.

template <class S, class T, bool = S::has_bf16_dot && std::is_same_v<T, bf16>>
struct DotMode {  // widened as they are loaded
  using Vector = typename S::F;
  static constexpr int width = S::width;
  PEFTFAST_INLINE static Vector load(const T* p) { return S::load(p); }
  PEFTFAST_INLINE static typename S::F dot(Vector a, Vector b, typename S::F c) { return S::fma(a, b, c); }
};
template <class S, class T>
struct DotMode<S, T, true> {
  using Vector = typename S::Pairs;
  static constexpr int width = 2 * S::width;
  PEFTFAST_INLINE static Vector load(const bf16* p) { return S::load_pairs(p); }
  PEFTFAST_INLINE static typename S::F dot(Vector a, Vector b, typename S::F c) { return S::dot(a, b, c); }
};

// Rows of W at a time. One row of X leaves the kernel waiting for memory, which is fastest read as one stream, unless
// an fp32 row of X takes so much of L1 that it is better used for several. More rows keep as many products in the
// register tile as it holds, or half as many where that leaves each two accumulators, of half the chain.
template <class S, class T, int rows>
constexpr int dot_columns() {
  int columns = rows > 1 ? 8 : sizeof(T) == 4 ? 4 : 1;
  const int accumulators = rows > 1 && rows <= 4 ? 2 : 1;
  while (columns * rows * accumulators > S::tile_rows * S::tile_vectors) columns /= 2;
  return columns;
}

// Accumulators for each product: what the products leave of the register tile.
template <class S, int products>
constexpr int dot_unroll() {
  constexpr int room = S::tile_rows * S::tile_vectors / products;
  return room >= 8 ? 8 : room >= 4 ? 4 : room >= 2 ? 2 : 1;
}

// out[i, j] += x[i] . w[j] for `rows` rows of X and `columns` rows of W, over Q elements. A lane of a
// product's `unroll` accumulators adds up chains. x(i, q) is where the vector from q on of row i of X is; prefetch(q)
// is called before each step.
template <class S, class T, int rows, int columns, int unroll = dot_unroll<S, rows * columns>(), class X,
          class Prefetch>
PEFTFAST_INLINE void dot_tile(X x, const T* w, int64_t ldw, int64_t Q, Prefetch prefetch, float* out, int64_t ldo) {
  using Mode = DotMode<S, T>;
  for (int64_t q = 0; q < Q;) {
    typename S::F c[rows][columns][unroll];
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j)
        for (int u = 0; u < unroll; ++u) c[i][j][u] = S::zero();
    const int64_t whole = Q / Mode::width * Mode::width, end = std::min(q + chain * unroll * Mode::width, whole);
    for (; q + unroll * Mode::width <= end; q += unroll * Mode::width) {
      prefetch(q);
#pragma GCC unroll 8
      for (int u = 0; u < unroll; ++u) {
        typename Mode::Vector b[columns];
        for (int j = 0; j < columns; ++j) b[j] = Mode::load(w + j * ldw + q + u * Mode::width);
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
          const auto a = Mode::load(x(i, q + u * Mode::width));
          for (int j = 0; j < columns; ++j) c[i][j][u] = Mode::dot(a, b[j], c[i][j][u]);
        }
      }
    }
    if (end == whole) {  // what is left: whole vectors, then a part of one
      for (; q < Q; q += Mode::width) {
        T last_x[rows][Mode::width] = {};
        T last_w[columns][Mode::width] = {};
        const int64_t n = std::min<int64_t>(Mode::width, Q - q);
        for (int i = 0; i < rows; ++i) std::memcpy(last_x[i], x(i, q), n * sizeof(T));
        for (int j = 0; j < columns; ++j) std::memcpy(last_w[j], w + j * ldw + q, n * sizeof(T));
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < columns; ++j)
            c[i][j][0] = Mode::dot(Mode::load(last_x[i]), Mode::load(last_w[j]), c[i][j][0]);
      }
    }
    // Sums over the lanes, four products at a time.
    const auto product = [&](int k) __attribute__((always_inline)) {
      if (k >= rows * columns) return S::zero();
      typename S::F(&parts)[unroll] = c[k / columns][k % columns];
      for (int u = 1; u < unroll; ++u) parts[0] = S::add(parts[0], parts[u]);
      return parts[0];
    };
#pragma GCC unroll 8
    for (int k = 0; k < rows * columns; k += 4) {
      float sums[4];
      S::sum(product(k), product(k + 1), product(k + 2), product(k + 3), sums);
      for (int n = k; n < std::min(k + 4, rows * columns); ++n) out[n / columns * ldo + n % columns] += sums[n - k];
    }
  }
}

// out[i, j] += x[i] . w[j] for rows i < rows <= tile_rows and j < columns.
template <class S, class T>
void dot_rows(const T* x, int64_t ldx, int64_t rows, const T* w, int64_t ldw, int64_t columns, int64_t Q, float* out,
              int64_t ldo) {
  with_rows<S::tile_rows>(rows, [&](auto n) {
    constexpr int at_once = dot_columns<S, T, n.value>();
    const auto at = [=](int i, int64_t q) __attribute__((always_inline)) { return x + i * ldx + q; };
    int64_t j = 0;
    const auto ahead = [&](int64_t q) __attribute__((always_inline)) {
      if constexpr (at_once > 1 && n.value <= 4)  // several streams, of rows too few to hide the wait for them
        for (int k = 0; k < at_once; ++k)
          prefetch_row(w + (j + k) * ldw + q + 1024 / sizeof(T),
                       dot_unroll<S, n.value * at_once>() * DotMode<S, T>::width);
    };
    for (; j + at_once <= columns; j += at_once)
      dot_tile<S, T, n.value, at_once>(at, w + j * ldw, ldw, Q, ahead, out + j, ldo);
    for (; j < columns; ++j) dot_tile<S, T, n.value, 1>(at, w + j * ldw, ldw, Q, [](int64_t) {}, out + j, ldo);
  });
}

// The same for more rows, of a W in memory. A block of the reduction of X is copied to L1, the same vector of each row
// and then the next, and stays there while the rows of W go by. A tile is near to square: some CPUs load no more than
// one vector for each two that they multiply. What comes after the next tile is asked for meanwhile.
constexpr int columns_near = 3;
template <class S>
constexpr int rows_near = S::tile_rows * S::tile_vectors / columns_near;

template <class S, class T>
void dot_rows_from_memory(const T* x, int64_t ldx, int64_t rows, const T* w, int64_t ldw, int64_t columns, int64_t Q,
                          float* out, int64_t ldo) {
  constexpr int64_t width = DotMode<S, T>::width, room = 24 * 1024 / sizeof(T);  // of the 32 KiB that L1 has at least
  alignas(64) T near[room];
  const int64_t block = room / rows / width * width;
  const int64_t groups = (rows + rows_near<S> - 1) / rows_near<S>, group = (rows + groups - 1) / groups;
  const int64_t tiles = (columns + columns_near - 1) / columns_near;
  for (int64_t q = 0; q < Q; q += block) {
    const int64_t n = std::min(block, Q - q), padded = (n + width - 1) / width * width;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t first = i / group * group, in_group = std::min(group, rows - first);
      T* to = near + first * padded + (i - first) * width;
      const T* from = x + i * ldx + q;
      int64_t k = 0;
      for (; k + width <= n; k += width) std::memcpy(to + k * in_group, from + k, width * sizeof(T));
      if (k < n) std::memcpy(to + k * in_group, from + k, (n - k) * sizeof(T));
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t j = tile * columns_near, count = std::min<int64_t>(columns_near, columns - j);
      const bool beyond = tile + 2 >= tiles;  // in the next block
      const T* next = w + (tile + 2 - (beyond ? tiles : 0)) * columns_near * ldw + q + (beyond ? block : 0);
      if (beyond && (q + block >= Q || tile + 2 - tiles >= tiles)) next = nullptr;
      for (int64_t m = 0, asked = 0; m < rows; m += group) {
        const int64_t until = next ? count * (m / group + 1) / groups : 0;  // each group asks for some of the columns
        const auto prefetch = [=](int64_t k) __attribute__((always_inline)) {
          for (int64_t c = asked; c < until; ++c) __builtin_prefetch(next + c * ldw + k);
        };
        asked = until;
        with_rows<rows_near<S>>(std::min(group, rows - m), [&](auto r) {
          constexpr int of_group = r.value;
          const auto at = [from = static_cast<const T*>(near + m * padded)](int i, int64_t k)
                              __attribute__((always_inline)) { return from + k * of_group + i * width; };
          float* to = out + m * ldo + j;
          // One accumulator each, so that a column's sum does not depend on the columns beside it.
          if (count == columns_near)
            return dot_tile<S, T, of_group, columns_near, 1>(at, w + j * ldw + q, ldw, n, prefetch, to, ldo);
          for (int64_t c = 0; c < count; ++c)
            dot_tile<S, T, of_group, 1, 1>(at, w + (j + c) * ldw + q, ldw, n, prefetch, to + c, ldo);
        });
      }
    }
  }
}

}  // namespace
}  // namespace peftfast::cpu
