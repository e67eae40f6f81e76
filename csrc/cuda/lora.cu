// Forward and backward of a linear layer with adapters, all rows alike or in groups, from the steps of steps.h:
//
//   forward    U = s drop(X) A^T,  Y = X W^T + bias + U B^T
//   backward   V = s G B,  dX = G W + drop'(V A),  grad_A = V^T drop(X),  grad_B = G^T U
//
// Offsets, experts and slots of groups are read on the device, so nothing waits for the host.
#include <algorithm>
#include <optional>

#include "steps.h"

namespace peftfast::cuda {
namespace {

// All adapters of a layer as one of rank R.
struct Adapters {
  Ranks ranks{};
  Factors A{}, B{}, grad_A{}, grad_B{};
  bool dropout = false, any_A = false, any_B = false;
  std::optional<Workspace> tiles;

  Adapters(const LoraLinearArgs& args, const Stream& stream) {
    for (const LoraAdapter *a = args.adapters, *end = a + args.adapter_count; a != end; ++a) {
      const RankTile own{.first = static_cast<int>(ranks.R),
                         .end = static_cast<int>(ranks.R + a->rank),
                         .scaling = a->scaling,
                         .keep_scale = 1.0f / (1.0f - a->dropout),
                         .adapter = static_cast<uint32_t>(a - args.adapters),
                         .threshold = philox::threshold_of(a->dropout)};
      const auto add = [&](Factors& to, const void* data, int64_t of_slot, int64_t of_rank, int64_t of_column) {
        to.list.push_back({const_cast<void*>(data), a->dtype, {of_slot, of_rank, of_column}, own, ranks.tile_count});
        to.slots = a->slots;
      };
      add(A, a->A, a->rank * args.K, args.K, 1);
      add(grad_A, a->grad_A, a->rank * args.K, args.K, 1);
      add(B, a->B, a->B_strides[0], a->B_strides[2], a->B_strides[1]);
      add(grad_B, a->grad_B, a->grad_B_strides[0], a->grad_B_strides[2], a->grad_B_strides[1]);
      ranks.R += a->rank, ranks.tile_count += static_cast<int>(ceil_div(a->rank, rank_tile));
      dropout |= a->dropout > 0, any_A |= a->grad_A != nullptr, any_B |= a->grad_B != nullptr;
    }
    A.P = grad_A.P = args.K, B.P = grad_B.P = args.N;
    for (Factors* factors : {&A, &B, &grad_A, &grad_B}) factors->R = ranks.R;
    tiles.emplace(stream, ranks.tile_count * static_cast<int64_t>(sizeof(RankTile)));
    ranks.tiles = tiles->as<RankTile>(), ranks.seed = args.seed;
  }
};

// Factors side by side in fp32: the caller's own memory where they already are, unless the ranks' table is written,
// too.
class Packed {
 public:
  Packed(const Factors& factors, RankTile* tiles, const Stream& stream)
      : own_(tiles == nullptr ? in_place(factors) : nullptr),
        packed_(stream, own_ ? 0 : factors.slots * factors.R * factors.P * 4) {
    if (own_ == nullptr) pack(factors, packed_.as<float>(), tiles, stream);
  }
  const float* data() const { return own_ ? own_ : packed_.as<float>(); }

 private:
  static const float* in_place(const Factors& factors) {
    return factors.list.size() == 1 && factors.list[0].dtype == DType::f32
               ? static_cast<const float*>(factors.list[0].data)
               : nullptr;
  }

  const float* own_;
  const Workspace packed_;
};

}  // namespace

void lora_linear(const LoraLinearArgs& args, const Stream& stream) {
  if (args.M == 0) return;
  const Adapters adapters(args, stream);
  const Packed B(adapters.B, adapters.tiles->as<RankTile>(), stream), A(adapters.A, nullptr, stream);
  const Rows rows{args.M, args.groups};
  down({{rows, args.dtype, args.X, args.ldx, args.K, adapters.ranks, adapters.dropout}, A.data(), args.U}, stream);
  linear({.rows = rows,
          .P = args.N,
          .Q = args.K,
          .dtype = args.dtype,
          .compute = args.W.compute,
          .X = args.X,
          .ldx = args.ldx,
          .W = args.W,
          .reduction_contiguous = !args.W.transposed,
          .bias = args.bias,
          .U = args.U,
          .L = B.data(),
          .ranks = adapters.ranks,
          .dropout = false,
          .Y = args.Y},
         stream);
}

void lora_linear_backward(const LoraLinearBackwardArgs& backward, const Stream& stream) {
  const LoraLinearArgs& args = backward.of;
  const Adapters adapters(args, stream);
  const Packed B(adapters.B, adapters.tiles->as<RankTile>(), stream);
  const Rows rows{args.M, args.groups};
  const Input X{rows, args.dtype, args.X, args.ldx, args.K, adapters.ranks, adapters.dropout};
  const Input G{rows, args.dtype, backward.G, backward.ldg, args.N, adapters.ranks, false};
  const bool wants_V = adapters.any_A || backward.dX;
  const Workspace V(stream, wants_V ? args.M * adapters.ranks.R * 4 : 0);
  const Down down_G{G, B.data(), V.as<float>()};
  if (wants_V && adapters.any_B)
    down_and_outer(down_G, args.U, adapters.grad_B, stream);
  else if (wants_V)
    down(down_G, stream);
  else if (adapters.any_B)
    outer(G, args.U, adapters.grad_B, stream);
  if (backward.dX) {
    const Packed A(adapters.A, nullptr, stream);
    linear({.rows = rows,
            .P = args.K,
            .Q = args.N,
            .dtype = args.dtype,
            .compute = args.W.compute,
            .X = backward.G,
            .ldx = backward.ldg,
            .W = args.W,
            .reduction_contiguous = args.W.transposed,
            .U = V.as<float>(),
            .L = A.data(),
            .ranks = adapters.ranks,
            .dropout = adapters.dropout,
            .Y = backward.dX},
           stream);
  }
  if (adapters.any_A) outer(X, V.as<float>(), adapters.grad_A, stream);
}

}  // namespace peftfast::cuda
