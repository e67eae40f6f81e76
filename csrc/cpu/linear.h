// The steps that linear layers are made of, each for a list of matrices, split over threads by the work in them: one
// matrix for a dense layer, one per group of rows for grouped ones.
#pragma once

#include <algorithm>
#include <vector>

#include "../kernels.h"
#include "generic/convert.h"
#include "parallel.h"
#include "scratch.h"
#include "table.h"

namespace peftfast::cpu {
namespace {

constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// `count` values in fp32.
inline void widen(const void* source, int64_t count, DType dtype, float* out, const Threads& threads) {
  constexpr int64_t chunk = 16384;  // of work that is worth a thread
  parallel_for(threads, (count + chunk - 1) / chunk, [&](int64_t begin, int64_t end) {
    begin *= chunk, end = std::min(end * chunk, count);
    table().convert[static_cast<int>(dtype)](static_cast<const char*>(source) + begin * size_of(dtype), end - begin,
                                             DType::f32, out + begin);
  });
}

// B^T in fp32 [rank, N], of B [N, rank].
inline void transpose(const void* B, int64_t N, int64_t rank, DType dtype, float* out, const Threads& threads) {
  constexpr int64_t rows = 512;  // of work that is worth a thread
  const TransposeArgs args{B, rank, out, N};
  parallel_for(threads, (N + rows - 1) / rows, [&](int64_t begin, int64_t end) {
    table().transpose[static_cast<int>(dtype)](args, begin * rows, std::min(end * rows, N));
  });
}

// U = scale * dropout(X) A^T of the M rows of each.
struct Down {
  DownArgs args;
  int64_t M;
};

void down(const std::vector<Down>& list, DType dtype, const Threads& threads) {
  constexpr int64_t rows = 12;  // a multiple of every register tile
  std::vector<Share> shares;
  for (const Down& d : list) shares.push_back({d.args.R > 0 ? (d.M + rows - 1) / rows : 0, 1});
  parallel_for_each(threads, shares, [&](size_t i, int64_t begin, int64_t end) {
    table().down[static_cast<int>(dtype)](list[i].args, begin * rows, std::min(end * rows, list[i].M));
  });
}

// The dtype that X and a 4-bit weight are multiplied in. fp32 is never less accurate, and costs nothing more where
// there is no instruction for 16 bits; few rows are bound by the reading of the weight.
DType product_dtype(const LinearArgs& args, DType wanted) {
  if (args.M <= few_rows && args.reduction_contiguous) return DType::f32;
  if (wanted == args.out) return wanted;
  return args.out == DType::f32 && wanted == DType::bf16 && table().bf16_dot ? DType::bf16 : DType::f32;
}

// Y = X W + bias + dropout(U L) of each. X comes in the dtype of Y; `compute` is asked for with a 4-bit W.
void linear(std::vector<LinearArgs> list, DType compute, const Threads& threads) {
  // X in the form that its product wants: another dtype, or arranged for few rows of a 4-bit weight.
  std::vector<DType> dtypes;
  std::vector<int64_t> row_sizes;  // of X in that form, in bytes; 0: as it is
  std::vector<Share> conversions;
  int64_t bytes = 0;
  for (LinearArgs& args : list) {
    args.bf16_codes = compute == DType::bf16;
    dtypes.push_back(args.fourbit ? product_dtype(args, compute) : args.out);
    const bool few = args.fourbit && args.M <= few_rows && args.reduction_contiguous;
    const int64_t arranged = few ? 4 * table().arranged_size(args.Q) : 0;
    row_sizes.push_back(arranged > 0 ? arranged : dtypes.back() != args.out ? args.Q * size_of(dtypes.back()) : 0);
    conversions.push_back({row_sizes.back() > 0 ? args.M : 0, args.Q});
    bytes += round_up(args.M * row_sizes.back(), 64);
  }
  if (bytes > 0) {
    thread_local Scratch scratch;
    char* to = reinterpret_cast<char*>(scratch.floats(bytes / 4));
    std::vector<const void*> sources;
    std::vector<int64_t> strides;
    for (size_t i = 0; i < list.size(); ++i) {
      sources.push_back(list[i].X), strides.push_back(list[i].ldx * size_of(list[i].out));
      if (row_sizes[i] == 0) continue;
      list[i].X = to, list[i].ldx = row_sizes[i] / size_of(dtypes[i]);
      to += round_up(list[i].M * row_sizes[i], 64);
    }
    parallel_for_each(threads, conversions, [&](size_t i, int64_t begin, int64_t end) {
      const LinearArgs& args = list[i];
      const auto convert = table().convert[static_cast<int>(args.out)];
      thread_local Scratch row;
      const bool few = args.M <= few_rows && args.reduction_contiguous && table().arranged_size(args.Q) > 0;
      float* widened = few ? row.floats(args.Q) : nullptr;
      for (int64_t m = begin; m < end; ++m) {
        const void* source = static_cast<const char*>(sources[i]) + m * strides[i];
        char* out = static_cast<char*>(const_cast<void*>(args.X)) + m * row_sizes[i];
        convert(source, args.Q, dtypes[i], few ? static_cast<void*>(widened) : out);
        if (few) table().arrange(widened, args.Q, args.bf16_codes, reinterpret_cast<float*>(out));
      }
    });
  }

  // Rows are parted only to bound the memory of parked accumulators, or when there are too few panels to go round: each
  // part packs the panel again, which costs as much as some rows.
  constexpr int64_t packing = 16;
  int64_t all_panels = 0;
  for (const LinearArgs& args : list) all_panels += args.M > 0 ? (args.P + panel_columns - 1) / panel_columns : 0;
  std::vector<int64_t> parts, rows;
  std::vector<Share> shares;
  for (const LinearArgs& args : list) {
    int64_t n = (args.M + 2047) / 2048;
    while (n * all_panels < 2 * threads.count && args.M / (n + 1) >= 192) ++n;
    parts.push_back(n);
    rows.push_back(round_up((args.M + n - 1) / std::max<int64_t>(n, 1), 12));
    const int64_t panels = (args.P + panel_columns - 1) / panel_columns;
    shares.push_back({panels * n, (rows.back() + packing) * (args.Q + 1)});
  }
  parallel_for_each(threads, shares, [&](size_t i, int64_t begin, int64_t end) {
    const LinearArgs& args = list[i];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % parts[i] * rows[i];
      if (first < args.M)
        table().linear[static_cast<int>(dtypes[i])](args, item / parts[i] * panel_columns, first,
                                                    std::min(first + rows[i], args.M));
    }
  });
}

// D = V^T dropout(X) of each. Those with the same D follow one another, and all but the first accumulate.
void outer(const std::vector<OuterArgs>& list, DType dtype, const Threads& threads) {
  std::vector<size_t> firsts;
  std::vector<Share> shares;
  for (size_t i = 0; i < list.size(); ++i) {
    if (!list[i].accumulate) {
      firsts.push_back(i);
      shares.push_back({list[i].R > 0 ? (list[i].P + panel_columns - 1) / panel_columns : 0, 0});
    }
    shares.back().cost += list[i].M + 1;
  }
  firsts.push_back(list.size());
  parallel_for_each(threads, shares, [&](size_t s, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (size_t i = firsts[s]; i < firsts[s + 1]; ++i)
        table().outer[static_cast<int>(dtype)](list[i], panel * panel_columns);
  });
}

template <class T>
void narrow(const float* D, int64_t rank, int64_t P, bool transposed, T* out, int64_t begin, int64_t end) {
  const int64_t strip = transposed ? 16 : end - begin;  // as many lines of `out` as stay in L1 while they fill
  for (int64_t first = begin; first < end; first += strip)
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t p = first; p < std::min(first + strip, end); ++p)
        out[transposed ? p * rank + j : j * P + p] = from_float<T>(D[j * P + p]);
}

// The gradient of one adapter's factor from its rows of D [R, P]: as they are for A, transposed for B.
void write_gradient(const float* D, int64_t rank, int64_t P, DType dtype, bool transposed, void* out,
                    const Threads& threads) {
  constexpr int64_t chunk = 1024;
  parallel_for(threads, (P + chunk - 1) / chunk, [&](int64_t begin, int64_t end) {
    begin *= chunk, end = std::min(end * chunk, P);
    if (dtype == DType::f32) narrow(D, rank, P, transposed, static_cast<float*>(out), begin, end);
    if (dtype == DType::bf16) narrow(D, rank, P, transposed, static_cast<bf16*>(out), begin, end);
    if (dtype == DType::f16) narrow(D, rank, P, transposed, static_cast<f16*>(out), begin, end);
  });
}

}  // namespace
}  // namespace peftfast::cpu
