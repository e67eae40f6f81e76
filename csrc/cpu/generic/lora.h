// The micro-kernels of the lora family; csrc/cpu/lora.cpp says how they make up forward and backward.
#pragma once

#include <algorithm>

#include "../scratch.h"
#include "../table.h"
#include "adapter.h"
#include "attention.h"
#include "dropout.h"
#include "fourbit.h"
#include "gemm.h"
#include "linear.h"
#include "moe.h"
#include "rowwise.h"

namespace peftfast::cpu {
namespace {

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
    for (int64_t j = 0; j < args.columns; j += S::width) {
      const int64_t columns = std::min<int64_t>(S::width, args.columns - j);
      float* const* lines = args.lines + j;
      if (std::none_of(lines, lines + columns, [](const float* line) { return line != nullptr; })) continue;
      typename S::F block[S::width];
      for (int i = 0; i < S::width; ++i) {
        const T* source = B + (n + i) * args.ld + j;
        block[i] = i >= rows ? S::zero() : columns == S::width ? S::load(source) : load_first<S>(source, columns);
      }
      S::transpose(block);
      for (int64_t i = 0; i < columns; ++i) {
        if (lines[i] == nullptr) continue;
        if (rows == S::width)
          S::store(lines[i] + n, block[i]);
        else
          store_first<S>(lines[i] + n, block[i], rows);
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

// D = V^T dropout(norm(X)), some panels of columns over all rows. X is the panel here, packed, widened, normalized and
// dropped a block of rows at a time; the ranks are the rows of the tile.
template <class S, class T>
void outer(const OuterArgs& args, int64_t column, int64_t columns, float* D, int64_t ldd) {
  using Mode = Widened<S, float, float>;
  constexpr int64_t block = 256, NR = tile_columns<S>;
  constexpr int64_t rows_in_chain = 32;  // MKL's sums on AVX2 are as exact as that
  const int64_t width = (columns + NR - 1) / NR * NR;
  thread_local Scratch scratch;
  float* panel = scratch.floats((block + args.R) * width + width + random_slack<S>);
  float* sums = panel + block * width;  // [R, width]
  uint32_t* buffer = reinterpret_cast<uint32_t*>(sums + args.R * width);
  std::fill(sums, sums + args.R * width, 0.0f);
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
            const uint32_t* words =
                random_words<S>(args.dropout, segment, (args.first_row + m + i) * args.P + column, width, buffer);
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
            float* sum = sums + j * width + p;
            load_tile<S, n.value>(c, sum, width);
            multiply_add_in_chains<Mode, n.value>(c, args.V + m * args.R + j, 1, args.R, panel + p / NR * (block * NR),
                                                  NR, rows, rows_in_chain);
            store_tile<S, n.value>(c, sum, width);
          });
    }
  }
  for (int s = 0; s < args.dropout.segment_count; ++s) {
    const Segment& segment = args.dropout.segments[s];
    for (int64_t j = segment.begin; j < segment.end; ++j)
      for (int64_t p = 0; p < columns; ++p) {
        float& d = D[j * ldd + p];
        d = (args.accumulate ? d : 0.0f) + sums[j * width + p] * segment.keep_scale;
      }
  }
}

// Back-to-back products of matrix tiles, into as many as the kernels have.
template <class S>
double flops_of_tiles(int64_t iterations) {
  const bf16 ones[S::matrix_rows * S::matrix_depth] = {};
  typename S::Tiles tiles;
  tiles.template clear<0>(), tiles.template clear<1>(), tiles.template clear<2>(), tiles.template clear<3>();
  tiles.template load<4>(ones, 64), tiles.template load<6>(ones, 64);
  for (int64_t k = 0; k < iterations; ++k) {
    tiles.template dot<0, 4, 6>(), tiles.template dot<1, 4, 6>();
    tiles.template dot<2, 4, 6>(), tiles.template dot<3, 4, 6>();
  }
  return iterations * 4 * 2.0 * S::matrix_rows * S::matrix_columns * S::matrix_depth;
}

// Back-to-back multiply-adds on independent registers, as many as the kernels' tile holds.
template <class S, class T>
double flops_of_loop(int64_t iterations) {
  if constexpr (in_matrix_tiles<S, T>) return flops_of_tiles<S>(iterations / 8);
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
      {few_rows<S, float>, few_rows<S, bf16>, few_rows<S, f16>},
      {few_rows_fourbit<S, float>, few_rows_fourbit<S, bf16>, few_rows_fourbit<S, f16>},
      {packed_columns<S, float>, packed_columns<S, bf16>, packed_columns<S, f16>},
      {linear<S, float>, linear<S, bf16>, linear<S, f16>},
      {outer<S, float>, outer<S, bf16>, outer<S, f16>},
      {convert<S, float>, convert<S, bf16>, convert<S, f16>},
      {combine<S, float>, combine<S, bf16>, combine<S, f16>},
      {combine_backward<S, float>, combine_backward<S, bf16>, combine_backward<S, f16>},
      {swiglu<S, float>, swiglu<S, bf16>, swiglu<S, f16>},
      {swiglu_backward<S, float>, swiglu_backward<S, bf16>, swiglu_backward<S, f16>},
      {rms_norm<S, float>, rms_norm<S, bf16>, rms_norm<S, f16>},
      {rms_norm_backward<S, float>, rms_norm_backward<S, bf16>, rms_norm_backward<S, f16>},
      {cross_entropy<S, float>, cross_entropy<S, bf16>, cross_entropy<S, f16>},
      {moments<S, float>, moments<S, bf16>, moments<S, f16>},
      bottleneck<S>,
      bottleneck_backward<S>,
      pair_rows<S>,
      {attention<S, float>, attention<S, bf16>, attention<S, f16>},
      {attention_backward<S, float>, attention_backward<S, bf16>, attention_backward<S, f16>},
      arranged_size<S>,
      arrange<S>,
      matrix_tiles<S>,
      arrange_in_tiles<S>,
      {fourbit_quantize<S, float>, fourbit_quantize<S, bf16>, fourbit_quantize<S, f16>},
      {fourbit_dequantize<S, float>, fourbit_dequantize<S, bf16>, fourbit_dequantize<S, f16>},
      {flops_of_loop<S, float>, flops_of_loop<S, bf16>, flops_of_loop<S, f16>},
  };
}

}  // namespace
}  // namespace peftfast::cpu
