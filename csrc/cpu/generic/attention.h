// Attention, a block of queries and a chunk of keys at a time: scores never leave the caches (Dao et al., 2022). They
// are computed transposed, so that queries lie along vectors and the softmax of a query runs down its lane:
//
//            64 queries                           64 queries
//          ┌────────────┐                       ┌────────────┐
//          │    Q^T     │ D                     │    P^T     │ 96 keys
//          ├────────────┤                       ├────────────┤
//   96     │            │                       │            │
//  keys K  │    S^T     │  P^T = exp(S^T - m)   │    O^T     │ D
//          └────────────┘                       └────────────┘
//
// Q^T and P^T are panels as gemm.h has them: one is packed once a block, the other is made as one. K and V^T are the
// left operands, read where they lie.
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
constexpr int64_t short_chain = 16;  // of sums in fp32, which are seldom longer than ten of them

template <class S, class T>
struct AttentionMode {
  using type = std::conditional_t<S::has_bf16_dot && std::is_same_v<T, bf16>, PairDot<S>, Widened<S, T, float>>;
};

// Rows 2 i and 2 i + 1 of a matrix, side by side as pairs; the last of an odd number has zeros beside it.
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
      const T* left = Block::in_pairs ? zipped + key * D : V + key * args.V.row;
      Block::multiply_transposed(left, args.V.row, D, panel, n, out);
    }
    float* lse = args.lse + (batch * args.heads + head) * args.T + block.first();
    for (int64_t j = 0; j < block.rows(); ++j) lse[j] = sum[j] == 0.0f ? 0.0f : args.scale * most[j] + std::log(sum[j]);
    for (int64_t j = 0; j < N; ++j) factor[j] = sum[j] == 0.0f ? 0.0f : 1.0f / sum[j];  // a query that sees nothing: 0
    const int64_t row = args.heads * D;
    block.write_transposed(out, factor, static_cast<T*>(args.Y) + (batch * args.T + block.first()) * row + head * D,
                           row);
  }
}

// A part of the backward of one head of keys, with the queries that meet it.
template <class S, class T>
class AttentionBackward {
 public:
  AttentionBackward(const AttentionBackwardArgs& backward, const AttentionPart& part)
      : backward_(backward),
        args_(backward.of),
        part_(part),
        width_((args_.D + NR - 1) / NR * NR),
        K_(args_.K.at<T>(part.batch, part.kv_head, 0)),
        V_(args_.V.at<T>(part.batch, part.kv_head, 0)) {
    const int64_t D = args_.D, along = Block::panel_rows(D), down = Block::panel_rows(N), chunk = keys_at_once * N;
    const int64_t keys = part.of_keys ? part.key_end - part.key_begin : 0;
    const int64_t zipped = Block::in_pairs && part.of_queries ? ((args_.S + 1) / 2 * D + 15) / 16 * 16 : 0;
    thread_local Scratch scratch;
    dK_ = scratch.floats(2 * keys * width_ + D * N + 4 * chunk + Block::panel_rows(keys_at_once) * N + 2 * along * N +
                         2 * down * width_ + zipped);
    dV_ = dK_ + keys * width_, dQ_ = dV_ + keys * width_;
    scores_ = dQ_ + D * N, slopes_ = scores_ + chunk;
    P_ = reinterpret_cast<T*>(slopes_ + chunk), dS_ = reinterpret_cast<T*>(slopes_ + 2 * chunk);
    panel_ = reinterpret_cast<Panel*>(slopes_ + 3 * chunk);
    Q_along_ = panel_ + Block::panel_rows(keys_at_once) * N, G_along_ = Q_along_ + along * N;
    Q_down_ = G_along_ + along * N, G_down_ = Q_down_ + down * width_;
    zipped_ = reinterpret_cast<T*>(G_down_ + down * width_);
    std::fill(dK_, dK_ + 2 * keys * width_, 0.0f);
    if constexpr (Block::in_pairs)
      if (part.of_queries) pair_rows(K_, args_.K.row, args_.S, D, zipped_);
  }

  void run() {
    const int64_t groups = args_.heads / args_.kv_heads;
    for (int64_t block = part_.block_begin; block < part_.block_end; ++block)
      for (int64_t i = 0; i < groups; ++i) queries(part_.kv_head * groups + i, block);
    for (int64_t key = part_.key_begin; part_.of_keys && key < part_.key_end; ++key) {
      const int64_t place = ((part_.batch * args_.S + key) * args_.kv_heads + part_.kv_head) * args_.D;
      const int64_t row = (key - part_.key_begin) * width_;
      convert<S>(dK_ + row, args_.D, static_cast<T*>(backward_.dK) + place);
      convert<S>(dV_ + row, args_.D, static_cast<T*>(backward_.dV) + place);
    }
  }

 private:
  using Block = QueryBlock<S, T>;
  using Mode = typename Block::Mode;
  using Panel = typename Block::Panel;
  static constexpr int64_t N = queries_at_once, NR = Block::NR;

  // One block of the queries of one head.
  void queries(int64_t head, int64_t i) {
    const Block block(args_, part_.batch, head, i);
    const int64_t D = args_.D, rows = block.rows(), end = std::min(part_.key_end, block.keys());
    if (!part_.of_queries && end <= part_.key_begin) return;
    const Vectors& of_G = backward_.G;
    const T *Q = args_.Q.at<T>(part_.batch, head, block.first()), *G = of_G.at<T>(part_.batch, head, block.first());
    const int64_t along = Block::panel_rows(D), down = Block::panel_rows(N), row = args_.heads * D;
    const int64_t place = (part_.batch * args_.T + block.first()) * row + head * D;  // in Y and dQ
    const T* Y = static_cast<const T*>(args_.Y) + place;
    if constexpr (NR < N) std::fill(Q_along_, Q_along_ + 2 * along * N, Panel{});  // sub-panels of no query
    pack_transposed<Mode>(Q, args_.Q.row, rows, D, Q_along_, along * NR);
    pack_transposed<Mode>(G, of_G.row, rows, D, G_along_, along * NR);
    if (part_.of_keys) {
      pack_straight<Mode>(Q, args_.Q.row, D, rows, Q_down_, down * NR);
      pack_straight<Mode>(G, of_G.row, D, rows, G_down_, down * NR);
    }
    std::fill(dQ_, dQ_ + D * N, 0.0f), std::fill(lse_, lse_ + N, 0.0f), std::fill(delta_, delta_ + N, 0.0f);
    std::copy_n(args_.lse + (part_.batch * args_.heads + head) * args_.T + block.first(), rows, lse_);
    for (int64_t j = 0; j < rows; ++j)
      delta_[j] = sum_over<S>(D, [&](int64_t d, typename S::F sum) {
        return S::fma(load_at<S>(G + j * of_G.row, d, D), load_at<S>(Y + j * row, d, D), sum);
      });
    for (int64_t key = part_.key_begin; key < end; key += keys_at_once) {
      const int64_t n = std::min(keys_at_once, end - key);
      if (block.sees(key, n)) keys(block, key, n);
    }
    alignas(64) float ones[N];
    std::fill(ones, ones + N, 1.0f);
    if (part_.of_queries) block.write_transposed(dQ_, ones, static_cast<T*>(backward_.dQ) + place, row);
  }

  // What the keys [key, key + n) and the block have to do with each other.
  void keys(const Block& block, int64_t key, int64_t n) {
    const int64_t D = args_.D, along = Block::panel_rows(D) * NR, down = Block::panel_rows(N) * NR;
    const int64_t rows = block.rows(), sum = (key - part_.key_begin) * width_;
    const Vectors &K = args_.K, &V = args_.V;
    Block::template multiply<false>(K_ + key * K.row, K.row, 1, n, Q_along_, along, D, N, scores_, N);
    Block::template multiply<false>(V_ + key * V.row, V.row, 1, n, G_along_, along, D, N, slopes_, N);
    block.hide(key, n, scores_);
    for (int64_t k = 0; k < n; ++k) {
      float* __restrict p = scores_ + k * N, * __restrict s = slopes_ + k * N;
      for (int64_t j = 0; j < N; ++j) {
        p[j] = decayed(args_.scale * p[j] - lse_[j]);
        s[j] = args_.scale * (p[j] * (s[j] - delta_[j]));
      }
    }
    if (part_.of_keys) {
      convert<S>(scores_, n * N, P_), convert<S>(slopes_, n * N, dS_);
      Block::template multiply<true>(P_, N, 1, n, G_down_, down, rows, width_, dV_ + sum, width_);
      Block::template multiply<true>(dS_, N, 1, n, Q_down_, down, rows, width_, dK_ + sum, width_);
    }
    if (part_.of_queries) {
      Block::make_panel(slopes_, n, panel_);
      const T* left = Block::in_pairs ? zipped_ + key * D : K_ + key * K.row;
      Block::multiply_transposed(left, K.row, D, panel_, n, dQ_);
    }
  }

  const AttentionBackwardArgs& backward_;
  const AttentionArgs& args_;
  const AttentionPart& part_;
  const int64_t width_;  // D, rounded up to whole sub-panels
  const T *K_, *V_;
  float *dK_, *dV_, *dQ_;                          // [keys, width], [keys, width], [D, 64]
  float *scores_, *slopes_;                        // [keys, 64]
  T *P_, *dS_;                                     // [keys, 64]
  Panel* panel_;                                   // [keys, 64]
  Panel *Q_along_, *G_along_, *Q_down_, *G_down_;  // [D, 64], [D, 64], [64, width], [64, width]
  T* zipped_;                                      // K, in pairs of rows
  alignas(64) float lse_[N], delta_[N];
};

template <class S, class T>
void attention_backward(const AttentionBackwardArgs& backward, const AttentionPart& part) {
  AttentionBackward<S, T>(backward, part).run();
}

}  // namespace
}  // namespace peftfast::cpu
