// Attention, a block of queries and a chunk of keys at a time: scores never leave the caches (Dao et al., 2022). They
// are computed transposed, so that queries lie along vectors and the softmax of a query runs down its lane:
//
//            64 queries                           64 queries
//          ┌────────────┐                       ┌────────────┐
//          │    Q^T     │ D                     │     P^T    │ 96 keys     both panels as gemm.h has them: Q^T is
//          packed ├────────────┤                       ├────────────┤             once a block, P^T is made as one
//   96     │            │                       │            │
//  keys K  │    S^T     │  P^T = exp(S^T - m)   │    O^T     │ D           K and V pass as the left operands
//          └────────────┘                       └────────────┘
//
// Backward makes S^T again and, alike, dP^T = V dO^T. What comes of them is the left operand of dV += P^T dO and of
// dK += dS^T Q, as rows, and the panel of dQ^T += K^T dS^T.
//
// V^T and K^T, as left operands, are read down their columns. In bf16 a product takes two elements of the reduction at
// once: for that, two rows are zipped to one of pairs.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../scratch.h"
#include "../table.h"
#include "adapter.h"
#include "gemm.h"
#include "moe.h"
#include "rowwise.h"

namespace peftfast::cpu {
namespace {

constexpr int64_t queries_at_once = panel_columns;
constexpr int64_t keys_at_once = 96;  // a multiple of every register tile's rows
constexpr int64_t short_chain = 16;   // of sums in fp32, which are seldom longer than ten of them

template <class S, class T>
struct AttentionMode {
  using type = std::conditional_t<S::has_bf16_dot && std::is_same_v<T, bf16>, PairDot<S>, Widened<S, T, float>>;
};

// Rows [2 i, 2 i + 1) of a matrix, side by side as pairs; the last of an odd number has zeros beside it.
inline void pair_rows(const bf16* rows, int64_t ld, int64_t count, int64_t D, bf16* out) {
  for (int64_t i = 0; i < count; i += 2, out += 2 * D) {
    const bf16* __restrict first = rows + i * ld, * __restrict second = first + (i + 1 < count ? ld : 0);
    uint32_t* __restrict pairs = reinterpret_cast<uint32_t*>(out);
    const uint32_t kept = i + 1 < count ? 0xffff0000u : 0u;
    for (int64_t d = 0; d < D; ++d) pairs[d] = first[d].bits | (static_cast<uint32_t>(second[d].bits) << 16 & kept);
  }
}

template <class S>
void pair_rows(const PairRowsArgs& args, int64_t begin, int64_t end) {
  pair_rows(static_cast<const bf16*>(args.X) + begin * args.ld, args.ld, end - begin, args.D,
            static_cast<bf16*>(args.pairs) + begin * args.D);
}

// What forward and backward have in common: one block of queries of one head, and the keys that it sees.
template <class S, class T>
class QueryBlock {
 public:
  using Mode = typename AttentionMode<S, T>::type;
  using Panel = typename Mode::Panel;
  static constexpr int64_t NR = tile_columns<S>, N = queries_at_once;
  static constexpr bool in_pairs = Mode::unit == 2;

  QueryBlock(const AttentionArgs& args, int64_t batch, int64_t head, int64_t block)
      : args_(args),
        first_(block * N),
        rows_(std::min(N, args.T - first_)),
        keys_(args.causal ? std::min(args.S, first_ + rows_) : args.S),
        mask_(args.mask ? args.mask + batch * args.mask_strides[0] + head * args.mask_strides[1] +
                              first_ * args.mask_strides[2]
                        : nullptr) {}

  int64_t first() const { return first_; }
  int64_t rows() const { return rows_; }
  int64_t keys() const { return keys_; }  // beyond them none is seen

  // Rows of the panel that a reduction over n elements takes, and the size of its sub-panels.
  static constexpr int64_t panel_rows(int64_t n) { return (n + Mode::unit - 1) / Mode::unit * Mode::panel_rows; }
  static constexpr int64_t subpanel(int64_t n) { return panel_rows(n) * NR; }

  // sums [rows, columns] (+)= X panel, over Q elements of the reduction.
  template <bool add>
  [[gnu::noinline]] static void multiply(const T* x, int64_t ldx, int64_t stride_x, int64_t rows, const Panel* panel,
                                         int64_t subpanel, int64_t Q, int64_t columns, float* sums, int64_t ld) {
    for (int64_t i = 0; i < rows; i += S::tile_rows)
      with_rows<S::tile_rows>(std::min<int64_t>(S::tile_rows, rows - i), [&](auto n) {
        for (int64_t p = 0; p < columns; p += NR) {
          Accumulators<S, n.value> c;
          float* sum = sums + i * ld + p;
          if constexpr (add)
            load_tile<S, n.value>(c, sum, ld);
          else
            clear<S, n.value>(c);
          const T* row = x + i * ldx;
          const Panel* from = panel + p / NR * subpanel;
          if constexpr (std::is_same_v<T, float>)
            multiply_add_in_chains<Mode, n.value>(c, row, ldx, stride_x, from, NR, Q, short_chain);
          else
            multiply_add<Mode, n.value>(c, row, ldx, stride_x, from, NR, Q);
          store_tile<S, n.value>(c, sum, ld);
        }
      });
  }

  // The same with X^T for X: `x` has rows of D along which its columns lie or, for bf16, pairs of rows.
  static void multiply_transposed(const T* x, int64_t ldx, int64_t D, const Panel* panel, int64_t n, float* sums) {
    if constexpr (in_pairs)
      multiply<true>(x, 2, D, D, panel, subpanel(keys_at_once), (n + 1) / 2 * 2, N, sums, N);
    else
      multiply<true>(x, 1, ldx, D, panel, subpanel(keys_at_once), n, N, sums, N);
  }

  // Of the keys [key, key + n), whether a query sees any, and then -inf into scores [n, 64] of those that it does not.
  bool sees(int64_t key, int64_t n) const {
    for (int64_t j = 0; mask_ != nullptr && j < rows_; ++j)
      if (seen(j, key, n) > 0) return true;
    return mask_ == nullptr;
  }
  void hide(int64_t key, int64_t n, float* scores) const {
    constexpr float nothing = -std::numeric_limits<float>::infinity();
    if (args_.causal && key + n - 1 > first_)
      for (int64_t k = 0; k < n; ++k)
        for (int64_t j = 0; j < N; ++j) scores[k * N + j] = key + k > first_ + j ? nothing : scores[k * N + j];
    for (int64_t j = 0; mask_ != nullptr && j < rows_; ++j) {
      if (seen(j, key, n) == n) continue;
      const uint8_t* row = mask_ + j * args_.mask_strides[2] + key;
      for (int64_t k = 0; k < n; ++k)
        if (row[k] == 0) scores[k * N + j] = nothing;
    }
  }

  // The chunk `values` [n, 64] as a panel of multiply_transposed().
  static void make_panel(const float* values, int64_t n, Panel* panel) {
    for (int64_t p = 0; p < N; p += NR)
      for (int64_t k = 0; k < n; k += Mode::unit)
        for (int64_t j = 0; j < NR; j += S::width) {
          const float* value = values + k * N + p + j;
          Panel* out = panel + p / NR * subpanel(keys_at_once) + k / Mode::unit * Mode::panel_rows * NR + j;
          const bool odd = in_pairs && k + 1 == n;  // then nothing stands beside it
          const typename S::F first = S::load(value), second = in_pairs && !odd ? S::load(value + N) : S::zero();
          if constexpr (std::is_same_v<Panel, uint32_t>) {
            S::store_pairs(out, S::round_pairs(first, second));
          } else {
            S::store(out, first);
            if constexpr (in_pairs) S::store(out + NR, second);
          }
        }
  }

  // Row j of out = factors[j] * column j of x [D, 64].
  void write_transposed(const float* x, const float* factors, T* out, int64_t ld) const {
    for (int64_t j = 0; j < rows_; j += S::width)
      for (int64_t d = 0; d < args_.D; d += S::width) {
        typename S::F block[S::width];
        for (int64_t i = 0; i < S::width; ++i)
          block[i] = d + i < args_.D ? S::mul(S::load(x + (d + i) * N + j), S::load(factors + j)) : S::zero();
        S::transpose(block);
        for (int64_t i = 0; i < std::min<int64_t>(S::width, rows_ - j); ++i)
          store_at<S>(out + (j + i) * ld, d, args_.D, block[i]);
      }
  }

 private:
  int64_t seen(int64_t j, int64_t key, int64_t n) const {
    const uint8_t* row = mask_ + j * args_.mask_strides[2] + key;
    int32_t count = 0;
    for (int64_t k = 0; k < n; ++k) count += row[k];
    return count;
  }

  const AttentionArgs& args_;
  int64_t first_, rows_, keys_;
  const uint8_t* mask_;
};

// exp(x) for x <= 0; that of -inf is 0.
PEFTFAST_INLINE float decayed(float x) { return x < -87.0f ? 0.0f : exponential(x); }

// Blocks [begin, end) of queries; those of a head follow one another. `pairs` are V's rows, zipped, for bf16.
template <class S, class T>
void attention(const AttentionArgs& args, const void* pairs, int64_t begin, int64_t end) {
  using Block = QueryBlock<S, T>;
  constexpr int64_t N = queries_at_once;
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  const int64_t D = args.D, blocks = (args.T + N - 1) / N, groups = args.heads / args.kv_heads;
  const int64_t subpanel = Block::subpanel(D);
  thread_local Scratch scratch;
  float* out = scratch.floats((Block::panel_rows(D) + D + keys_at_once + Block::panel_rows(keys_at_once)) * N);
  float* scores = out + D * N;                                                          // [keys, 64]
  auto* queries = reinterpret_cast<typename Block::Panel*>(scores + keys_at_once * N);  // [D, 64]
  auto* panel = queries + Block::panel_rows(D) * N;                                     // [keys, 64]
  alignas(64) float most[N], base[N], sum[N], factor[N];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t batch = item / blocks / args.heads, head = item / blocks % args.heads, kv_head = head / groups;
    const Block block(args, batch, head, item % blocks);
    const T *K = args.K.at<T>(batch, kv_head, 0), *V = args.V.at<T>(batch, kv_head, 0);
    const T* zipped = static_cast<const T*>(pairs) + (batch * args.kv_heads + kv_head) * ((args.S + 1) / 2 * 2) * D;
    pack_transposed<typename Block::Mode>(args.Q.at<T>(batch, head, block.first()), args.Q.row, block.rows(), D,
                                          queries, subpanel);
    if constexpr (Block::NR < N) {  // sub-panels of no query
      const int64_t packed = (block.rows() + Block::NR - 1) / Block::NR * subpanel;
      std::fill(queries + packed, queries + N / Block::NR * subpanel, typename Block::Panel{});
    }
    std::fill(out, out + D * N, 0.0f);
    std::fill(most, most + N, lowest), std::fill(sum, sum + N, 0.0f);
    for (int64_t key = 0; key < block.keys(); key += keys_at_once) {
      const int64_t n = std::min(keys_at_once, block.keys() - key);
      if (!block.sees(key, n)) continue;
      Block::template multiply<false>(K + key * args.K.row, args.K.row, 1, n, queries, subpanel, D, N, scores, N);
      block.hide(key, n, scores);
      std::copy(most, most + N, factor);
      for (int64_t k = 0; k < n; ++k)
        for (int64_t j = 0; j < N; ++j) most[j] = scores[k * N + j] > most[j] ? scores[k * N + j] : most[j];
      bool grown = false;
      for (int64_t j = 0; j < N; ++j) {
        base[j] = most[j] == lowest ? 0.0f : most[j];
        grown |= most[j] != factor[j];
        factor[j] = decayed(args.scale * (factor[j] - base[j]));
        sum[j] *= factor[j];
      }
      for (int64_t first = 0; first < n; first += short_chain) {
        alignas(64) float part[N] = {};
        for (int64_t k = first; k < std::min(first + short_chain, n); ++k) {
          float* __restrict row = scores + k * N;
          for (int64_t j = 0; j < N; ++j) {
            row[j] = decayed(args.scale * (row[j] - base[j]));
            part[j] += row[j];
          }
        }
        for (int64_t j = 0; j < N; ++j) sum[j] += part[j];
      }
      Block::make_panel(scores, n, panel);
      if (grown && key > 0)
        for (int64_t d = 0; d < D; ++d)
          for (int64_t j = 0; j < N; ++j) out[d * N + j] *= factor[j];
      if constexpr (Block::in_pairs)
        Block::multiply_transposed(zipped + key * D, 0, D, panel, n, out);
      else
        Block::multiply_transposed(V + key * args.V.row, args.V.row, D, panel, n, out);
    }
    float* lse = args.lse + (batch * args.heads + head) * args.T + block.first();
    for (int64_t j = 0; j < block.rows(); ++j) lse[j] = sum[j] == 0.0f ? 0.0f : args.scale * most[j] + std::log(sum[j]);
    for (int64_t j = 0; j < N; ++j) factor[j] = sum[j] == 0.0f ? 0.0f : 1.0f / sum[j];  // a query that sees nothing: 0
    const int64_t row = args.heads * D;
    block.write_transposed(out, factor, static_cast<T*>(args.Y) + (batch * args.T + block.first()) * row + head * D,
                           row);
  }
}

// Heads [begin, end) of keys, each with all the queries that meet it.
template <class S, class T>
void attention_backward(const AttentionBackwardArgs& backward, int64_t begin, int64_t end) {
  using Block = QueryBlock<S, T>;
  using Mode = typename Block::Mode;
  using Panel = typename Block::Panel;
  constexpr int64_t N = queries_at_once, NR = Block::NR;
  const AttentionArgs& args = backward.of;
  const int64_t D = args.D, keys = args.S, groups = args.heads / args.kv_heads, width = (D + NR - 1) / NR * NR;
  const int64_t along = Block::panel_rows(D), down = Block::panel_rows(N);
  const int64_t chunk = keys_at_once * N, zipped_floats = Block::in_pairs ? (keys + 1) / 2 * D : 0;
  thread_local Scratch scratch;
  float* dK = scratch.floats(2 * keys * width + 2 * along * N + 2 * down * width + D * N + 4 * chunk +
                             Block::panel_rows(keys_at_once) * N + (zipped_floats + 15) / 16 * 16);
  float *dV = dK + keys * width, *dQ = dV + keys * width;  // [keys, width]; [D, 64]
  float *scores = dQ + D * N, *slopes = scores + chunk;    // [keys, 64]
  T* P = reinterpret_cast<T*>(slopes + chunk);             // [keys, 64]
  T* dS = reinterpret_cast<T*>(slopes + 2 * chunk);        // [keys, 64]
  auto *Q_along = reinterpret_cast<Panel*>(slopes + 3 * chunk), *G_along = Q_along + along * N;  // [D, 64]
  auto *Q_down = G_along + along * N, *G_down = Q_down + down * width;                           // [64, width]
  Panel* panel = G_down + down * width;                                                          // [keys, 64]
  T* zipped = reinterpret_cast<T*>(panel + Block::panel_rows(keys_at_once) * N);
  alignas(64) float lse[N], delta[N], ones[N];
  std::fill(ones, ones + N, 1.0f);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t batch = item / args.kv_heads, kv_head = item % args.kv_heads;
    const T *K = args.K.at<T>(batch, kv_head, 0), *V = args.V.at<T>(batch, kv_head, 0);
    if constexpr (Block::in_pairs) pair_rows(K, args.K.row, keys, D, zipped);
    std::fill(dK, dK + 2 * keys * width, 0.0f);
    for (int64_t i = 0; i < groups * ((args.T + N - 1) / N); ++i) {
      const int64_t head = kv_head * groups + i % groups;
      const Block block(args, batch, head, i / groups);
      const T *Q = args.Q.at<T>(batch, head, block.first()), *G = backward.G.at<T>(batch, head, block.first());
      const int64_t rows = block.rows(), subpanel = along * NR, row = args.heads * D;
      const int64_t place = (batch * args.T + block.first()) * row + head * D;  // in Y and dQ
      const T* Y = static_cast<const T*>(args.Y) + place;
      if constexpr (NR < N) std::fill(Q_along, Q_along + 2 * along * N, Panel{});  // sub-panels of no query
      pack_transposed<Mode>(Q, args.Q.row, rows, D, Q_along, subpanel);
      pack_transposed<Mode>(G, backward.G.row, rows, D, G_along, subpanel);
      pack_straight<Mode>(Q, args.Q.row, D, rows, Q_down, down * NR);
      pack_straight<Mode>(G, backward.G.row, D, rows, G_down, down * NR);
      std::fill(dQ, dQ + D * N, 0.0f), std::fill(lse, lse + N, 0.0f), std::fill(delta, delta + N, 0.0f);
      std::copy_n(args.lse + (batch * args.heads + head) * args.T + block.first(), rows, lse);
      for (int64_t j = 0; j < rows; ++j)
        delta[j] = sum_over<S>(D, [&](int64_t d, typename S::F sum) {
          return S::fma(load_at<S>(G + j * backward.G.row, d, D), load_at<S>(Y + j * row, d, D), sum);
        });
      for (int64_t key = 0; key < block.keys(); key += keys_at_once) {
        const int64_t n = std::min(keys_at_once, block.keys() - key);
        if (!block.sees(key, n)) continue;
        Block::template multiply<false>(K + key * args.K.row, args.K.row, 1, n, Q_along, subpanel, D, N, scores, N);
        block.hide(key, n, scores);
        Block::template multiply<false>(V + key * args.V.row, args.V.row, 1, n, G_along, subpanel, D, N, slopes, N);
        for (int64_t k = 0; k < n; ++k) {
          float* __restrict p = scores + k * N, * __restrict s = slopes + k * N;
          for (int64_t j = 0; j < N; ++j) {
            p[j] = decayed(args.scale * p[j] - lse[j]);
            s[j] = args.scale * (p[j] * (s[j] - delta[j]));
          }
        }
        convert<S>(scores, n * N, P), convert<S>(slopes, n * N, dS);
        Block::make_panel(slopes, n, panel);
        Block::template multiply<true>(P, N, 1, n, G_down, down * NR, rows, width, dV + key * width, width);
        Block::template multiply<true>(dS, N, 1, n, Q_down, down * NR, rows, width, dK + key * width, width);
        if constexpr (Block::in_pairs)
          Block::multiply_transposed(zipped + key * D, 0, D, panel, n, dQ);
        else
          Block::multiply_transposed(K + key * args.K.row, args.K.row, D, panel, n, dQ);
      }
      block.write_transposed(dQ, ones, static_cast<T*>(backward.dQ) + place, row);
    }
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t place = ((batch * keys + key) * args.kv_heads + kv_head) * D;
      convert<S>(dK + key * width, D, static_cast<T*>(backward.dK) + place);
      convert<S>(dV + key * width, D, static_cast<T*>(backward.dV) + place);
    }
  }
}

}  // namespace
}  // namespace peftfast::cpu
