// Forward and backward of a linear layer with adapters, all rows alike or in groups, each with its own weight and slot
// of the adapters, from the micro-kernels of generic/lora.h:
//
//   forward    U = s drop(X) A^T                       split over rows: dot products along K
//              Y = X W^T + bias + U B^T                split over strips of columns (and blocks of rows)
//   backward   V = s G B                               split over rows
//              dX = G W + drop'(V A)                   split over strips, as Y
//              grad_A = V^T drop(X), grad_B = G^T U    split over panels; a thread sums all rows of its columns
//
// All groups go through a step together, so that a thread takes its share of the work, not of the groups; only the
// weights and slots of groups that have rows are touched. Every element is computed by one thread in an order that the
// split does not change: the same bits for any number of threads. The low-rank part is fp32 throughout; the adapters
// are brought to fp32 [R, K] and [R, N] once per call.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <span>
#include <vector>

#include "../kernels.h"
#include "../philox.h"
#include "generic/convert.h"
#include "isa.h"
#include "linear.h"
#include "scratch.h"
#include "table.h"

namespace peftfast::cpu {
namespace {

struct Group {
  int64_t first, M, expert, slot;  // slot: -1 for none
};

std::vector<Group> groups_with_rows(const LoraLinearArgs& args) {
  const Groups& groups = args.groups;
  if (groups.offsets == nullptr)
    return args.M > 0 ? std::vector<Group>{{0, args.M, 0, args.adapter_count > 0 ? 0 : -1}} : std::vector<Group>{};
  std::vector<Group> list;
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t first = groups.offsets[g], M = groups.offsets[g + 1] - first;
    if (M > 0) list.push_back({first, M, groups.experts[g], std::max<int64_t>(groups.slots[g], -1)});
  }
  return list;
}

// All adapters of a layer as one of rank R, of the slots in use.
class Adapters {
 public:
  Adapters(const LoraLinearArgs& args, const std::vector<Group>& groups)
      : list_(args.adapters, static_cast<size_t>(args.adapter_count)),
        K_(args.K),
        N_(args.N),
        place_(list_.empty() ? 0 : list_[0].slots, -1) {
    for (const Group& g : groups)
      if (g.slot >= 0 && place_[g.slot] < 0) {
        place_[g.slot] = static_cast<int64_t>(slots_.size());
        slots_.push_back(g.slot);
      }
    const bool any_dropout = std::any_of(list_.begin(), list_.end(), [](auto& a) { return a.dropout > 0; });
    for (size_t i = 0; i < list_.size(); ++i) {
      const LoraAdapter& a = list_[i];
      const Segment segment{rank_, rank_ + a.rank, philox::threshold_of(a.dropout), static_cast<uint32_t>(i),
                            1.0f / (1.0f - a.dropout)};
      if (a.rank > 0 && (segments_.empty() || any_dropout))
        segments_.push_back(segment);
      else if (a.rank > 0)
        segments_.back().end = segment.end;  // nothing drops: one run of ranks
      rank_ += a.rank;
      scale_.insert(scale_.end(), a.rank, a.scaling);
      dropped_scale_.insert(dropped_scale_.end(), a.rank, a.scaling * segment.keep_scale);
    }
    const philox::Key key = philox::key_of(any_dropout && !slots_.empty() ? *args.seed : 0);
    dropout_ = {segments_.data(), static_cast<int>(segments_.size()), key.low, key.high};
    whole_ = {0, rank_, 0, 0, 1.0f};
  }

  int64_t rank() const { return rank_; }
  const std::vector<int64_t>& slots() const { return slots_; }  // in use
  bool uses(int64_t slot) const { return place_[slot] >= 0; }
  const float* scale() const { return scale_.data(); }                  // scaling of each rank
  const float* dropped_scale() const { return dropped_scale_.data(); }  // scaling / (1 - dropout)
  Dropout dropout() const { return dropout_; }
  Dropout no_dropout() const { return {&whole_, rank_ > 0 ? 1 : 0, 0, 0}; }

  // A of a group that has a slot, in fp32 [R, K], after prepare_A().
  const float* A(const Group& g) const { return A_ + (in_place() ? g.slot : place_[g.slot]) * rank_ * K_; }
  // B^T of a group that has a slot, in fp32 [R, N], after prepare_B().
  const float* B_transposed(const Group& g) const { return B_ + place_[g.slot] * rank_ * N_; }

  void prepare_A(const Threads& threads) {
    if (in_place()) {
      A_ = static_cast<const float*>(list_[0].A);
      return;
    }
    thread_local Scratch scratch;
    float* out = scratch.floats(static_cast<int64_t>(slots_.size()) * rank_ * K_);
    A_ = out;
    for (const int64_t slot : slots_)
      for (const LoraAdapter& a : list_) {
        const int64_t size = a.rank * K_;
        widen(static_cast<const char*>(a.A) + slot * size * size_of(a.dtype), size, a.dtype, out, threads);
        out += size;
      }
  }

  void prepare_B(const Threads& threads) {
    thread_local Scratch scratch;
    const int64_t slots = static_cast<int64_t>(slots_.size());
    float* out = scratch.floats(slots * rank_ * N_);
    B_ = out;
    for (const LoraAdapter& a : list_) {
      // Of a row of B, elements that lie beside each other: the ranks of a slot or, as PEFT stores experts, the slots
      // of a rank.
      const auto [of_slot, of_n, of_rank] = a.B_strides;
      const bool all_slots = of_slot == 1 && of_rank != 1;
      const int64_t columns = all_slots ? a.slots : of_rank == 1 ? a.rank : 1, size = size_of(a.dtype);
      std::vector<float*> lines;
      std::vector<TransposeArgs> runs;
      const auto add = [&](int64_t slot, int64_t rank) {
        runs.push_back({static_cast<const char*>(a.B) + (slot * of_slot + rank * of_rank) * size, of_n, columns});
      };
      const auto line = [&](int64_t slot, int64_t rank) {
        lines.push_back(uses(slot) ? out + (place_[slot] * rank_ + rank) * N_ : nullptr);
      };
      if (all_slots) {
        for (int64_t rank = 0; rank < a.rank; add(0, rank), ++rank)
          for (int64_t slot = 0; slot < a.slots; ++slot) line(slot, rank);
      } else {
        for (const int64_t slot : slots_)
          for (int64_t rank = 0; rank < a.rank; ++rank) {
            if (rank % columns == 0) add(slot, rank);
            line(slot, rank);
          }
      }
      for (size_t i = 0; i < runs.size(); ++i) runs[i].lines = lines.data() + i * columns;
      // Of work that is worth a thread; and so many rows of a strided B that reads and writes share cache lines.
      const int64_t rows = runs.size() > 1 ? 16 : 512;
      parallel_for(threads, (N_ + rows - 1) / rows, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin * rows; n < std::min(end * rows, N_); n += rows)
          for (const TransposeArgs& run : runs)
            table().transpose[static_cast<int>(a.dtype)](run, n, std::min(n + rows, N_));
      });
      out += a.rank * N_;
    }
  }

 private:
  bool in_place() const { return list_.size() == 1 && list_[0].dtype == DType::f32; }

  const std::span<const LoraAdapter> list_;
  const int64_t K_, N_;
  std::vector<int64_t> slots_, place_;  // in use; where a slot is among them, or -1
  int64_t rank_ = 0;
  std::vector<float> scale_, dropped_scale_;
  std::vector<Segment> segments_;
  Segment whole_{};
  Dropout dropout_{};
  const float *A_ = nullptr, *B_ = nullptr;
};

const char* row_of(const void* X, int64_t row, int64_t ld, DType dtype) {
  if (X == nullptr) return nullptr;  // of no elements
  return static_cast<const char*>(X) + row * ld * size_of(dtype);
}

// Zeros the rows of no group.
void clear_the_rest(const Groups& groups, int64_t M, int64_t row_bytes, void* rows) {
  if (rows == nullptr || groups.offsets == nullptr) return;  // of no elements
  const int64_t first = groups.count > 0 ? groups.offsets[0] : 0,
                last = groups.count > 0 ? groups.offsets[groups.count] : 0;
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
          .W = row_of(W.dense, g.expert * rows, W.ld, dtype),
          .ldw = W.ld,
          .reduction_contiguous = reduction_contiguous,
          .fourbit = W.fourbit.blocksize ? &W.fourbit : nullptr,
          .fourbit_row = g.expert * rows,
          .Y = static_cast<char*>(Y) + g.first * P * size_of(dtype),
          .out = dtype,
          .first_row = g.first};
}

bool slots_lie_beside_each_other(const LoraLinearArgs& args) {
  const LoraAdapter* last = args.adapters + args.adapter_count;
  return args.adapter_count > 0 &&
         std::all_of(args.adapters, last, [](auto& a) { return a.slots > 1 && a.grad_B_strides[0] == 1; });
}

// grad_B of all slots, [N, rank, slots] in memory, from D [slots, R, N] with so many values to a slot.
void write_slots_beside_each_other(std::span<const LoraAdapter> adapters, const float* D, int64_t slot_size, int64_t N,
                                   const Threads& threads) {
  constexpr int64_t at_once = 16;
  parallel_for(threads, (N + at_once - 1) / at_once, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    float* buffer = scratch.floats(at_once * adapters[0].slots);
    for (int64_t n = begin * at_once; n < std::min(end * at_once, N); n += at_once) {
      const int64_t count = std::min(at_once, N - n);
      const float* source = D + n;
      for (const LoraAdapter& a : adapters)
        for (int64_t rank = 0; rank < a.rank; ++rank, source += N) {
          if (a.grad_B == nullptr) continue;
          const auto [of_slot, of_n, of_rank] = a.grad_B_strides;
          char* out = static_cast<char*>(a.grad_B) + (n * of_n + rank * of_rank) * size_of(a.dtype);
          float* lines[at_once];
          for (int64_t i = 0; i < count; ++i)
            lines[i] = a.dtype == DType::f32 ? reinterpret_cast<float*>(out) + i * of_n : buffer + i * a.slots;
          table().transpose[static_cast<int>(DType::f32)]({source, slot_size, count, lines}, 0, a.slots);
          for (int64_t i = 0; i < count && a.dtype != DType::f32; ++i)
            write_columns(lines[i], a.slots, 1, a.slots, a.dtype, false, out + i * of_n * size_of(a.dtype), 0, a.slots);
        }
    }
  });
}

}  // namespace

void lora_linear(const LoraLinearArgs& args, const Threads& threads) {
  const std::vector<Group> groups = groups_with_rows(args);
  Adapters adapters(args, groups);
  const int64_t R = adapters.rank();
  adapters.prepare_A(threads);
  adapters.prepare_B(threads);
  if (args.groups.offsets) std::fill(args.U, args.U + args.M * R, 0.0f);  // of rows without a slot
  std::vector<Down> downs;
  std::vector<LinearArgs> products;
  for (const Group& g : groups) {
    LinearArgs p = product(g, args.W, args.N, args.K, !args.W.transposed, args.X, args.ldx, args.Y, args.dtype);
    p.bias = args.bias ? args.bias + g.expert * args.N : nullptr;
    if (g.slot >= 0) {
      float* U = args.U + g.first * R;
      downs.push_back({.args = {.X = p.X,
                                .ldx = args.ldx,
                                .Q = args.K,
                                .A = adapters.A(g),
                                .scale = adapters.dropped_scale(),
                                .R = R,
                                .dropout = adapters.dropout(),
                                .U = U,
                                .first_row = g.first},
                       .M = g.M});
      p.U = U, p.L = adapters.B_transposed(g), p.R = R, p.dropout = adapters.no_dropout();
    }
    products.push_back(p);
  }
  down(downs, args.dtype, threads);
  linear(products, args.W.compute, threads);
  clear_the_rest(args.groups, args.M, args.N * size_of(args.dtype), args.Y);
}

void lora_linear_backward(const LoraLinearBackwardArgs& backward, const Threads& threads) {
  const LoraLinearArgs& args = backward.of;
  const std::vector<Group> groups = groups_with_rows(args);
  Adapters adapters(args, groups);
  const int64_t R = adapters.rank(), K = args.K, N = args.N;
  const LoraAdapter *first = args.adapters, *last = first + args.adapter_count;
  const bool any_A = std::any_of(first, last, [](auto& a) { return a.grad_A != nullptr; });
  const bool any_B = std::any_of(first, last, [](auto& a) { return a.grad_B != nullptr; });
  thread_local Scratch scratch_V;
  float* V = nullptr;
  if (any_A || backward.dX) {
    V = scratch_V.floats(args.M * R);
    adapters.prepare_B(threads);
    std::vector<Down> downs;
    for (const Group& g : groups)
      if (g.slot >= 0)
        downs.push_back({.args = {.X = row_of(backward.G, g.first, backward.ldg, args.dtype),
                                  .ldx = backward.ldg,
                                  .Q = N,
                                  .A = adapters.B_transposed(g),
                                  .scale = adapters.scale(),
                                  .R = R,
                                  .dropout = adapters.no_dropout(),
                                  .U = V + g.first * R},
                         .M = g.M});
    down(downs, args.dtype, threads);
  }
  if (backward.dX) {
    adapters.prepare_A(threads);
    std::vector<LinearArgs> products;
    for (const Group& g : groups) {
      products.push_back(
          product(g, args.W, K, N, args.W.transposed, backward.G, backward.ldg, backward.dX, args.dtype));
      LinearArgs& p = products.back();
      if (g.slot >= 0) p.U = V + g.first * R, p.L = adapters.A(g), p.R = R, p.dropout = adapters.dropout();
    }
    linear(products, args.W.compute, threads);
    clear_the_rest(args.groups, args.M, K * size_of(args.dtype), backward.dX);
  }

  // grad_A = V^T dropout(X) and grad_B = G^T U of each slot, over the rows of all groups that use it.
  const bool beside = slots_lie_beside_each_other(args);
  const auto gradients = [&](const float* factor, const void* rows, int64_t ld, int64_t P, bool of_A) {
    thread_local Scratch scratch_D;
    const int64_t slot_size = R * P + 16;  // lines of slots a power of two apart would share a set of the caches
    float* D = !of_A && beside ? scratch_D.floats(first->slots * slot_size) : nullptr;
    std::vector<OuterArgs> outers;
    std::vector<int64_t> slots;  // of each of them
    for (const int64_t slot : adapters.slots()) {
      bool accumulate = false;
      for (const Group& g : groups) {
        if (g.slot != slot) continue;
        outers.push_back({.V = factor + g.first * R,
                          .R = R,
                          .X = row_of(rows, g.first, ld, args.dtype),
                          .ldx = ld,
                          .M = g.M,
                          .P = P,
                          .dropout = of_A ? adapters.dropout() : adapters.no_dropout(),
                          .D = D ? D + slot * slot_size : nullptr,
                          .first_row = g.first,
                          .accumulate = accumulate});
        slots.push_back(slot);
        accumulate = true;
      }
    }
    if (D != nullptr) {
      for (int64_t slot = 0; slot < first->slots; ++slot)
        if (!adapters.uses(slot)) std::fill_n(D + slot * slot_size, R * P, 0.0f);
      outer(outers, args.dtype, threads);
      write_slots_beside_each_other({first, last}, D, slot_size, P, threads);
      return;
    }
    const auto gradient_of = [&](const LoraAdapter& a, int64_t slot) {
      char* out = static_cast<char*>(of_A ? a.grad_A : a.grad_B);
      return out ? out + slot * a.rank * P * size_of(a.dtype) : nullptr;
    };
    outer(outers, args.dtype, threads, [&](size_t i, const float* D, int64_t ldd, int64_t column, int64_t columns) {
      for (const LoraAdapter* a = first; a != last; D += a->rank * ldd, ++a)
        if (char* out = gradient_of(*a, slots[i]))
          write_columns(D, ldd, a->rank, P, a->dtype, !of_A, out, column, column + columns);
    });
    for (const LoraAdapter* a = first; a != last; ++a)
      for (int64_t slot = 0; slot < a->slots; ++slot) {
        char* out = gradient_of(*a, slot);
        if (out && !adapters.uses(slot)) std::memset(out, 0, a->rank * P * size_of(a->dtype));
      }
  };
  if (any_A) gradients(V, args.X, args.ldx, K, true);
  if (any_B) gradients(args.U, backward.G, backward.ldg, N, false);
}

double machine_peak(DType dtype, const Threads& threads) {
  constexpr int64_t iterations = 4'000'000;
  double best = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    std::atomic<double> flops{0};
    const auto start = std::chrono::steady_clock::now();
    parallel_for(threads, threads.count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double done = table().flops_of_loop[static_cast<int>(dtype)](iterations);
        for (double sum = flops; !flops.compare_exchange_weak(sum, sum + done);) {
        }
      }
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, flops / seconds.count());
  }
  return best;
}

}  // namespace peftfast::cpu
