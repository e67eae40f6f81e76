// The steps that linear layers are made of, each for a list of matrices, split over threads by the work in them: one
// matrix for a dense layer, one per group of rows for grouped ones.
#pragma once

#include <algorithm>
#include <cstring>
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
  std::vector<float*> lines;
  for (int64_t j = 0; j < rank; ++j) lines.push_back(out + j * N);
  const TransposeArgs args{B, rank, rank, lines.data()};
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

// The dtype that X and a packed 4-bit weight are multiplied in. fp32 is never less accurate, and costs nothing more
// where there is no instruction for 16 bits.
DType product_dtype(DType out, DType wanted) {
  if (wanted == out) return wanted;
  return out == DType::f32 && wanted == DType::bf16 && table().bf16_dot ? DType::bf16 : DType::f32;
}

// The form that a product wants its X in.
struct Form {
  DType dtype;
  bool for_few, in_tiles;  // arranged for few rows of a 4-bit weight; in matrix tiles, transposed
  int64_t row_bytes;       // 0: as it is
};

// Decides how the product of `args` runs.
Form form_of(LinearArgs& args, DType compute) {
  const bool fourbit = args.fourbit != nullptr;
  args.bf16_codes = compute == DType::bf16;
  Form form{.dtype = fourbit ? product_dtype(args.out, compute) : args.out};
  args.tiles = form.dtype == DType::bf16 ? table().matrix_tiles(args) : MatrixTiles::none;
  // A sum over few blocks of a 4-bit weight would show that their scales multiply sums: it is packed at no great cost.
  const bool short_sums = fourbit && args.Q <= longest_short_sum;
  args.along_rows = args.reduction_contiguous && args.tiles != MatrixTiles::in_place && !short_sums &&
                    args.M <= (fourbit ? table().few_rows_fourbit[static_cast<int>(compute)]
                                       : table().few_rows[static_cast<int>(args.out)]);
  if (args.along_rows) {  // bound by the reading of the weight
    args.tiles = MatrixTiles::none;
    if (fourbit) form.dtype = DType::f32;
  }
  const int64_t arranged = 4 * table().arranged_size(args.Q);
  form.for_few = fourbit && args.along_rows && arranged > 0;
  form.in_tiles = args.tiles == MatrixTiles::in_place;
  if (form.for_few)
    form.row_bytes = arranged;
  else if (form.in_tiles || form.dtype != args.out)
    form.row_bytes = (form.in_tiles ? round_up(args.Q, 32) : args.Q) * size_of(form.dtype);
  return form;
}

// Row m of `args`, from `source` to its place in the form that args.X has.
void bring_to_form(const Form& form, const LinearArgs& args, const void* source, int64_t m) {
  thread_local Scratch scratch;
  const auto convert = table().convert[static_cast<int>(args.out)];
  char* rows = static_cast<char*>(const_cast<void*>(args.X));
  if (form.in_tiles) {
    if (args.out != DType::bf16) {
      float* rounded = scratch.floats(args.Q);
      convert(source, args.Q, form.dtype, rounded);
      source = rounded;
    }
    const int64_t inside = m % rows_in_tiles;
    table().arrange_in_tiles(source, args.Q, inside, rows + (m - inside) * form.row_bytes);
  } else if (form.for_few) {
    float* widened = scratch.floats(args.Q);
    convert(source, args.Q, form.dtype, widened);
    table().arrange(widened, args.Q, args.bf16_codes, m, args.M, rows);
  } else {
    convert(source, args.Q, form.dtype, rows + m * form.row_bytes);
  }
}

// Y = X W + bias + dropout(U L) of each. X comes in the dtype of Y; `compute` is asked for with a 4-bit W.
void linear(std::vector<LinearArgs> list, DType compute, const Threads& threads) {
  std::vector<Form> forms;
  std::vector<Share> conversions;
  int64_t bytes = 0;
  const auto bytes_of = [&](size_t i) {
    return round_up(round_up(list[i].M, forms[i].in_tiles ? rows_in_tiles : 1) * forms[i].row_bytes, 64);
  };
  for (size_t i = 0; i < list.size(); ++i) {
    forms.push_back(form_of(list[i], compute));
    conversions.push_back({forms[i].row_bytes > 0 ? list[i].M : 0, list[i].Q});
    bytes += bytes_of(i);
  }
  if (bytes > 0) {
    thread_local Scratch scratch;
    char* to = reinterpret_cast<char*>(scratch.floats(bytes / 4));
    std::vector<const char*> sources;
    std::vector<int64_t> strides;
    for (size_t i = 0; i < list.size(); ++i) {
      sources.push_back(static_cast<const char*>(list[i].X)), strides.push_back(list[i].ldx * size_of(list[i].out));
      if (forms[i].row_bytes == 0) continue;
      list[i].X = to, list[i].ldx = forms[i].row_bytes / size_of(forms[i].dtype);
      to += bytes_of(i);
      // Rows beyond the last are columns that nobody reads, but what they hold must not slow down sums.
      const int64_t beyond = list[i].M % rows_in_tiles;
      if (forms[i].in_tiles && beyond > 0)
        std::memset(to - rows_in_tiles * forms[i].row_bytes, 0, rows_in_tiles * forms[i].row_bytes);
    }
    parallel_for_each(threads, conversions, [&](size_t i, int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) bring_to_form(forms[i], list[i], sources[i] + m * strides[i], m);
    });
  }

  // Rows are parted only to bound the memory of parked accumulators, or when there are too few panels to go round: each
  // part packs the panel again, which costs as much as some rows.
  constexpr int64_t packing = 16, most_sums = 256 * 1024;  // rows; a strip's parked accumulators, 1 MiB of them
  std::vector<int64_t> columns, parts, rows;
  const auto strips = [&](size_t i, int64_t wide) { return list[i].M > 0 ? (list[i].P + wide - 1) / wide : 0; };
  int64_t all_panels = 0, all_strips = 0;
  for (size_t i = 0; i < list.size(); ++i) all_panels += strips(i, panel_columns);
  const auto evenly = [&](int64_t wide) {
    const int64_t n = all_panels * panel_columns / wide, count = std::max(threads.count, 1);
    return n % count == 0 || n >= 8 * count;
  };
  for (size_t i = 0; i < list.size(); ++i) {
    int64_t wide = list[i].along_rows ? 4 * panel_columns : table().packed_columns[static_cast<int>(forms[i].dtype)];
    // Panels of one strip share a block of X and the pages of W: as many as L2 holds the sums of.
    const bool packed = !list[i].along_rows && !forms[i].in_tiles;
    const int64_t most = most_sums / std::clamp<int64_t>(list[i].M, 1, 2048);
    while (packed && 2 * wide <= std::min(most, list[i].P) && evenly(2 * wide)) wide *= 2;
    while (wide > panel_columns && all_panels * panel_columns < 2 * threads.count * wide) wide /= 2;
    columns.push_back(wide);
    all_strips += strips(i, wide);
  }
  std::vector<Share> shares;
  for (size_t i = 0; i < list.size(); ++i) {
    const int64_t M = list[i].M;
    int64_t n = (M + 2047) / 2048;
    while (n * all_strips < 2 * threads.count && M / (n + 1) >= 192) ++n;
    parts.push_back(n);
    rows.push_back(
        round_up((M + n - 1) / std::max<int64_t>(n, 1), list[i].tiles != MatrixTiles::none ? rows_in_tiles : 12));
    shares.push_back({strips(i, columns[i]) * n, (rows.back() + packing) * (list[i].Q + 1) * columns[i]});
  }
  parallel_for_each(threads, shares, [&](size_t i, int64_t begin, int64_t end) {
    const LinearArgs& args = list[i];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % parts[i] * rows[i];
      if (first < args.M)
        table().linear[static_cast<int>(forms[i].dtype)](args, item / parts[i] * columns[i], columns[i], first,
                                                         std::min(first + rows[i], args.M));
    }
  });
}

// D = V^T dropout(X) of each. Those with the same D follow one another, and all but the first accumulate. With D null,
// some columns at a time are made in the thread's own memory and given to done(first, D, ldd, column, columns), `first`
// being the place in the list where their D begins.
template <class Done>
void outer(const std::vector<OuterArgs>& list, DType dtype, const Threads& threads, Done done) {
  constexpr int64_t together = 4;  // panels: each row of X is on another page, and worth a visit for so many
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
    thread_local Scratch scratch;
    const OuterArgs& first = list[firsts[s]];
    const int64_t width = together * panel_columns, ldd = first.D ? first.P : width;
    float* own = first.D ? nullptr : scratch.floats(first.R * width);
    for (int64_t panel = begin; panel < end; panel += together) {
      const int64_t column = panel * panel_columns;
      const int64_t columns = std::min(std::min(end - panel, together) * panel_columns, first.P - column);
      float* D = first.D ? first.D + column : own;
      for (size_t i = firsts[s]; i < firsts[s + 1]; ++i)
        table().outer[static_cast<int>(dtype)](list[i], column, columns, D, ldd);
      if (!first.D) done(firsts[s], D, ldd, column, columns);
    }
  });
}

inline void outer(const std::vector<OuterArgs>& list, DType dtype, const Threads& threads) {
  outer(list, dtype, threads, [](size_t, const float*, int64_t, int64_t, int64_t) {});
}

template <class T>
void narrow(const float* D, int64_t ldd, int64_t rank, int64_t P, bool transposed, T* out, int64_t begin, int64_t end) {
  const int64_t strip = transposed ? 16 : end - begin;  // as many lines of `out` as stay in L1 while they fill
  for (int64_t first = begin; first < end; first += strip)
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t p = first; p < std::min(first + strip, end); ++p)
        out[transposed ? p * rank + j : j * P + p] = from_float<T>(D[j * ldd + p - begin]);
}

// Columns [begin, end) of the gradient of one adapter's factor [rank, P] or, transposed, [P, rank], from the first of
// them, D [rank, end - begin].
inline void write_columns(const float* D, int64_t ldd, int64_t rank, int64_t P, DType dtype, bool transposed, void* out,
                          int64_t begin, int64_t end) {
  if (dtype == DType::f32) narrow(D, ldd, rank, P, transposed, static_cast<float*>(out), begin, end);
  if (dtype == DType::bf16) narrow(D, ldd, rank, P, transposed, static_cast<bf16*>(out), begin, end);
  if (dtype == DType::f16) narrow(D, ldd, rank, P, transposed, static_cast<f16*>(out), begin, end);
}

// All of them, from D [rank, P].
inline void write_gradient(const float* D, int64_t rank, int64_t P, DType dtype, bool transposed, void* out,
                           const Threads& threads) {
  constexpr int64_t chunk = 1024;
  parallel_for(threads, (P + chunk - 1) / chunk, [&](int64_t begin, int64_t end) {
    begin *= chunk, end = std::min(end * chunk, P);
    write_columns(D + begin, P, rank, P, dtype, transposed, out, begin, end);
  });
}

}  // namespace
}  // namespace peftfast::cpu
