// Forward and backward of linear layers over groups of rows, each with its own weight and adapter, and the gathering
// and combining around them. All groups go through the steps of linear.h together, so that a thread takes its share of
// the work, not of the groups. Only the weights and adapters of groups that have rows are touched.
#include <cstring>

#include "../kernels.h"
#include "../philox.h"
#include "linear.h"

namespace peftfast::cpu {
namespace {

struct Group {
  int64_t first, M, expert, slot;  // slot: -1 for none
};

std::vector<Group> groups_with_rows(const Groups& groups) {
  std::vector<Group> list;
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t first = groups.offsets[g], M = groups.offsets[g + 1] - first;
    if (M > 0) list.push_back({first, M, groups.experts[g], std::max<int64_t>(groups.slots[g], -1)});
  }
  return list;
}

// The adapters in use, in fp32.
class Stack {
 public:
  Stack(const LoraStack& lora, const std::vector<Group>& groups, const int64_t* seed, int64_t K, int64_t N)
      : lora_(lora), K_(K), N_(N), place_(lora.slots, -1) {
    for (const Group& g : groups)
      if (g.slot >= 0 && place_[g.slot] < 0) {
        place_[g.slot] = static_cast<int64_t>(slots_.size());
        slots_.push_back(g.slot);
      }
    const float keep_scale = 1.0f / (1.0f - lora.dropout);
    scale_.assign(lora.rank, lora.scaling);
    dropped_scale_.assign(lora.rank, lora.scaling * keep_scale);
    segment_ = {0, lora.rank, philox::threshold_of(lora.dropout), 0, keep_scale};
    whole_ = {0, lora.rank, 0, 0, 1.0f};
    const philox::Key key = philox::key_of(lora.dropout > 0 && !slots_.empty() ? *seed : 0);
    dropout_ = {&segment_, 1, key.low, key.high};
  }

  const std::vector<int64_t>& slots() const { return slots_; }
  const float* scale() const { return scale_.data(); }
  const float* dropped_scale() const { return dropped_scale_.data(); }
  Dropout dropout() const { return dropout_; }
  Dropout no_dropout() const { return {&whole_, 1, 0, 0}; }
  int64_t rank_of(const Group& g) const { return g.slot >= 0 ? lora_.rank : 0; }

  // A of a group [rank, K], after prepare_A().
  const float* A(const Group& g) const { return A_ ? A_ + index(g, in_place()) * lora_.rank * K_ : nullptr; }
  // B^T of a group [rank, N], after prepare_B().
  const float* B_transposed(const Group& g) const { return B_ ? B_ + index(g, false) * lora_.rank * N_ : nullptr; }

  void prepare_A(const Threads& threads) {
    if (slots_.empty()) return;
    if (in_place()) {
      A_ = static_cast<const float*>(lora_.A);
      return;
    }
    thread_local Scratch scratch;
    const int64_t size = lora_.rank * K_;
    float* out = scratch.floats(static_cast<int64_t>(slots_.size()) * size);
    for (size_t i = 0; i < slots_.size(); ++i)
      widen(static_cast<const char*>(lora_.A) + slots_[i] * size * size_of(lora_.dtype), size, lora_.dtype,
            out + static_cast<int64_t>(i) * size, threads);
    A_ = out;
  }

  void prepare_B(const Threads& threads) {
    if (slots_.empty()) return;
    thread_local Scratch scratch;
    float* out = scratch.floats(static_cast<int64_t>(slots_.size()) * lora_.rank * N_);
    parallel_for(threads, (N_ + transpose_rows - 1) / transpose_rows, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin * transpose_rows; n < std::min(end * transpose_rows, N_); n += transpose_rows) {
        if (lora_.dtype == DType::f32) transpose(static_cast<const float*>(lora_.B), n, out);
        if (lora_.dtype == DType::bf16) transpose(static_cast<const bf16*>(lora_.B), n, out);
        if (lora_.dtype == DType::f16) transpose(static_cast<const f16*>(lora_.B), n, out);
      }
    });
    B_ = out;
  }

 private:
  bool in_place() const { return lora_.dtype == DType::f32; }
  int64_t index(const Group& g, bool all) const { return g.slot < 0 ? 0 : all ? g.slot : place_[g.slot]; }

  // So many rows of every B at a time: reads and writes then share cache lines in any order of storage.
  static constexpr int64_t transpose_rows = 16;

  template <class T>
  void transpose(const T* B, int64_t first, float* out) const {
    const auto [of_slot, of_n, of_rank] = lora_.B_strides;
    const int64_t last = std::min(first + transpose_rows, N_), slots = static_cast<int64_t>(slots_.size());
    const auto move = [&](int64_t i, int64_t n, int64_t j) {
      out[(i * lora_.rank + j) * N_ + n] = to_float(B[slots_[i] * of_slot + n * of_n + j * of_rank]);
    };
    if (of_slot < of_rank) {  // as PEFT stores that of experts
      for (int64_t j = 0; j < lora_.rank; ++j)
        for (int64_t n = first; n < last; ++n)
          for (int64_t i = 0; i < slots; ++i) move(i, n, j);
    } else {
      for (int64_t i = 0; i < slots; ++i)
        for (int64_t j = 0; j < lora_.rank; ++j)
          for (int64_t n = first; n < last; ++n) move(i, n, j);
    }
  }

  const LoraStack& lora_;
  const int64_t K_, N_;
  std::vector<int64_t> slots_, place_;  // in use, and where a slot is among them
  std::vector<float> scale_, dropped_scale_;
  Segment segment_{}, whole_{};
  Dropout dropout_{};
  const float *A_ = nullptr, *B_ = nullptr;
};

const char* row_of(const void* X, int64_t row, int64_t ld, DType dtype) {
  if (X == nullptr) return nullptr;  // of no elements
  return static_cast<const char*>(X) + row * ld * size_of(dtype);
}

// Zeros the rows of no group.
void clear_the_rest(const Groups& groups, int64_t M, int64_t row_bytes, void* rows) {
  const int64_t first = groups.count > 0 ? groups.offsets[0] : 0,
                last = groups.count > 0 ? groups.offsets[groups.count] : 0;
  if (rows == nullptr) return;  // of no elements
  std::memset(rows, 0, first * row_bytes);
  std::memset(static_cast<char*>(rows) + last * row_bytes, 0, (M - last) * row_bytes);
}

// The product of one group: Y = X W with the matrices of its expert, P columns from a reduction over Q. Without weights
// there is nothing to reduce, and the low-rank term is all.
LinearArgs product(const Group& g, const BaseWeight& W, int64_t P, int64_t Q, bool reduction_contiguous, const void* X,
                   int64_t ldx, void* Y, DType dtype) {
  const int64_t rows = reduction_contiguous ? P : Q;  // of W, as it is stored
  return {.M = g.M,
          .P = P,
          .Q = W.dense || W.fourbit.blocksize ? Q : 0,
          .X = row_of(X, g.first, ldx, dtype),
          .ldx = ldx,
          .W = W.dense ? row_of(W.dense, g.expert * rows, W.ld, dtype) : nullptr,
          .ldw = W.ld,
          .reduction_contiguous = reduction_contiguous,
          .fourbit = W.fourbit.blocksize ? &W.fourbit : nullptr,
          .fourbit_row = g.expert * rows,
          .Y = static_cast<char*>(Y) + g.first * P * size_of(dtype),
          .out = dtype,
          .first_row = g.first};
}

}  // namespace

void grouped_linear(const GroupedLinearArgs& args, const Threads& threads) {
  const std::vector<Group> groups = groups_with_rows(args.groups);
  Stack stack(args.lora, groups, args.seed, args.K, args.N);
  const int64_t r = args.lora.rank;
  stack.prepare_A(threads);
  stack.prepare_B(threads);
  std::fill(args.U, args.U + args.M * r, 0.0f);
  std::vector<Down> downs;
  std::vector<LinearArgs> products;
  for (const Group& g : groups) {
    if (g.slot >= 0)
      downs.push_back({.args = {.X = row_of(args.X, g.first, args.ldx, args.dtype),
                                .ldx = args.ldx,
                                .Q = args.K,
                                .A = stack.A(g),
                                .scale = stack.dropped_scale(),
                                .R = r,
                                .dropout = stack.dropout(),
                                .U = args.U + g.first * r,
                                .first_row = g.first},
                       .M = g.M});
    LinearArgs p = product(g, args.W, args.N, args.K, !args.W.transposed, args.X, args.ldx, args.Y, args.dtype);
    p.bias = args.bias ? args.bias + g.expert * args.N : nullptr;
    p.U = args.U + g.first * r;
    p.L = stack.B_transposed(g);
    p.R = stack.rank_of(g);
    p.dropout = stack.no_dropout();
    if (p.R == 0) p.dropout.segment_count = 0;
    products.push_back(p);
  }
  down(downs, args.dtype, threads);
  linear(products, args.W.compute, threads);
  clear_the_rest(args.groups, args.M, args.N * size_of(args.dtype), args.Y);
}

void grouped_linear_backward(const GroupedLinearBackwardArgs& backward, const Threads& threads) {
  const GroupedLinearArgs& args = backward.of;
  const std::vector<Group> groups = groups_with_rows(args.groups);
  Stack stack(args.lora, groups, args.seed, args.K, args.N);
  const int64_t r = args.lora.rank, K = args.K, N = args.N;
  thread_local Scratch scratch_V, scratch_D;
  float* V = scratch_V.floats(args.M * r);
  if (args.lora.grad_A || backward.dX) {
    stack.prepare_B(threads);
    std::vector<Down> downs;
    for (const Group& g : groups)
      if (g.slot >= 0)
        downs.push_back({.args = {.X = row_of(backward.G, g.first, backward.ldg, args.dtype),
                                  .ldx = backward.ldg,
                                  .Q = N,
                                  .A = stack.B_transposed(g),
                                  .scale = stack.scale(),
                                  .R = r,
                                  .dropout = stack.no_dropout(),
                                  .U = V + g.first * r},
                         .M = g.M});
    down(downs, args.dtype, threads);
  }
  if (backward.dX) {
    stack.prepare_A(threads);
    std::vector<LinearArgs> products;
    for (const Group& g : groups) {
      LinearArgs p = product(g, args.W, K, N, args.W.transposed, backward.G, backward.ldg, backward.dX, args.dtype);
      p.U = V + g.first * r;
      p.L = stack.A(g);
      p.R = stack.rank_of(g);
      p.dropout = stack.dropout();
      if (p.R == 0) p.dropout.segment_count = 0;
      products.push_back(p);
    }
    linear(products, args.W.compute, threads);
    clear_the_rest(args.groups, args.M, K * size_of(args.dtype), backward.dX);
  }

  // grad_A = V^T dropout(X) and grad_B = G^T U of each slot, over the rows of all groups that use it.
  const auto gradient = [&](void* out, const float* factor, const void* rows, int64_t ld, int64_t P, bool of_A) {
    if (out == nullptr) return;
    const int64_t size = r * P, bytes = size * size_of(args.lora.dtype);
    float* D = scratch_D.floats(static_cast<int64_t>(stack.slots().size()) * size);
    std::vector<OuterArgs> outers;
    for (size_t i = 0; i < stack.slots().size(); ++i) {
      bool accumulate = false;
      for (const Group& g : groups) {
        if (g.slot != stack.slots()[i]) continue;
        outers.push_back({.V = factor + g.first * r,
                          .R = r,
                          .X = row_of(rows, g.first, ld, args.dtype),
                          .ldx = ld,
                          .M = g.M,
                          .P = P,
                          .dropout = of_A ? stack.dropout() : stack.no_dropout(),
                          .D = D + static_cast<int64_t>(i) * size,
                          .first_row = g.first,
                          .accumulate = accumulate});
        accumulate = true;
      }
    }
    outer(outers, args.dtype, threads);
    std::vector<bool> used(args.lora.slots, false);
    for (size_t i = 0; i < stack.slots().size(); ++i) {
      used[stack.slots()[i]] = true;
      write_gradient(D + static_cast<int64_t>(i) * size, r, P, args.lora.dtype, !of_A,
                     static_cast<char*>(out) + stack.slots()[i] * bytes, threads);
    }
    for (int64_t slot = 0; slot < args.lora.slots; ++slot)
      if (!used[slot] && bytes > 0) std::memset(static_cast<char*>(out) + slot * bytes, 0, bytes);
  };
  gradient(args.lora.grad_A, V, args.X, args.ldx, K, true);
  gradient(args.lora.grad_B, args.U, backward.G, backward.ldg, N, false);
}

void combine(const CombineArgs& args, const Threads& threads) {
  parallel_for(threads, args.tokens,
               [&](int64_t begin, int64_t end) { table().combine[static_cast<int>(args.dtype)](args, begin, end); });
}

void combine_backward(const CombineBackwardArgs& args, const Threads& threads) {
  parallel_for(threads, args.of.tokens, [&](int64_t begin, int64_t end) {
    table().combine_backward[static_cast<int>(args.of.dtype)](args, begin, end);
  });
}

}  // namespace peftfast::cpu
