// The base product: which kernel it runs on, and the plain one, which takes any dtype, shape and alignment.
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "weight.cuh"

namespace peftfast::cuda {
namespace {

constexpr int threads = 256, tile = 64, step = rank_tile;

__device__ __forceinline__ float rounded_to(DType dtype, float x) {
  if (dtype == DType::bf16) return to_float(from_float<bf16>(x));
  if (dtype == DType::f16) return to_float(from_float<f16>(x));
  return x;
}

__device__ inline float code_value(const FourBitMatrix& W, int64_t element) {
  const uint8_t byte = W.packed[element / 2];
  const int code = element % 2 ? byte & 15 : byte >> 4;
  const float value = W.type == FourBitType::nf4 ? fourbit::codebooks[0][code] : fourbit::codebooks[1][code];
  return value * absmax_of(W, element);
}

// A block computes 64 x 64 values, a thread 4 x 4 of them.
__device__ __forceinline__ void multiply_tile(const Linear& args, const Tile& rows, int64_t column) {
  float (*x)[tile + 1] = shared_memory<float[tile + 1]>();
  float (*w)[tile + 1] = x + step;
  const int down = threadIdx.x / 16 * 4, across = threadIdx.x % 16 * 4;
  const bool four_bit = args.W.fourbit.blocksize != 0;
  float sums[4][4] = {}, errors[4][4] = {};
  const auto add_products = [&](auto after) {
    float terms[4][4] = {};
    for (int k = 0; k < step; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) terms[i][j] = fmaf(x[k][down + i], w[k][across + j], terms[i][j]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) add(after(terms[i][j], i, j), sums[i][j], errors[i][j]);
  };
  for (int tile_of_ranks = 0; rows.slot >= 0 && tile_of_ranks < args.ranks.tile_count; ++tile_of_ranks) {
    const RankTile ranks = args.ranks.tiles[tile_of_ranks];
    for (int i = threadIdx.x; i < tile * step; i += threads) {
      const int64_t row = rows.first + i / step, rank = ranks.first + i % step;
      x[i % step][i / step] = row < rows.end && rank < ranks.end ? args.U[row * args.ranks.R + rank] : 0.0f;
      const int64_t p = column + i % tile, other = ranks.first + i / tile;
      w[i / tile][i % tile] =
          p < args.P && other < ranks.end ? args.L[(rows.slot * args.ranks.R + other) * args.P + p] : 0.0f;
    }
    __syncthreads();
    Mask mask(ranks, args.dropout, args.ranks.seed);
    add_products([&](float term, int i, int j) {
      if (!mask.drops()) return term;
      return mask.keeps((rows.first + down + i) * args.P + column + across + j) ? term * ranks.keep_scale : 0.0f;
    });
    __syncthreads();
  }

  for (int64_t q = 0; q < args.Q; q += step) {
    for (int i = threadIdx.x; i < tile * step; i += threads) {
      const int64_t row = rows.first + i / step, k = q + i % step;
      x[i % step][i / step] = row < rows.end && k < args.Q
                                  ? rounded_to(args.dtype == DType::f32 ? args.compute : DType::f32,
                                               load_as_float(args.X, row * args.ldx + k, args.dtype))
                                  : 0.0f;
      // Neighbours read neighbours, whichever way W is stored.
      const int64_t p = column + (args.reduction_contiguous ? i / step : i % tile);
      const int64_t other = q + (args.reduction_contiguous ? i % step : i / tile);
      float value = 0;
      if (p < args.P && other < args.Q) {
        const int64_t line = args.reduction_contiguous ? rows.expert * args.P + p : rows.expert * args.Q + other;
        const int64_t along = args.reduction_contiguous ? other : p;
        value = four_bit ? rounded_to(args.compute, code_value(args.W.fourbit, line * args.W.ld + along))
                         : load_as_float(args.W.dense, line * args.W.ld + along, args.dtype);
      }
      w[other - q][p - column] = value;
    }
    __syncthreads();
    add_products([](float term, int, int) { return term; });
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = rows.first + down + i, p = column + across + j;
      if (row >= rows.end || p >= args.P) continue;
      const float bias = args.bias ? args.bias[rows.expert * args.P + p] : 0.0f;
      store_float(args.Y, row * args.P + p, args.dtype, sums[i][j] + bias);
    }
}

__global__ void __launch_bounds__(threads) linear_plain_kernel(Linear args) {
  for (uint32_t index = blockIdx.x;; index += gridDim.x) {
    const Place place = place_of(args.rows, index, tile, args.P, tile);
    if (place.rows.first >= place.rows.end) return;
    multiply_tile(args, place.rows, place.strip * tile);
  }
}

// Zeros the rows of no group.
__global__ void __launch_bounds__(threads) clear_rest_kernel(Rows rows, int64_t row_bytes, char* Y) {
  const Groups& groups = rows.groups;
  const int64_t first = groups.count > 0 ? groups.offsets[0] : 0;
  const int64_t last = groups.count > 0 ? groups.offsets[groups.count] : 0;
  for (int64_t row = blockIdx.x; row < rows.M; row += gridDim.x)
    if (row < first || row >= last)
      for (int64_t i = threadIdx.x; i < row_bytes / 2; i += threads)
        reinterpret_cast<uint16_t*>(Y + row * row_bytes)[i] = 0;
}

__global__ void __launch_bounds__(threads)
    narrow_kernel(const float* X, int64_t ldx, int64_t M, int64_t Q, DType dtype, void* out, int64_t ld_out) {
  for (int64_t i = blockIdx.x * int64_t{threads} + threadIdx.x; i < M * Q; i += gridDim.x * int64_t{threads})
    store_float(out, i / Q * ld_out + i % Q, dtype, X[i / Q * ldx + i % Q]);
}

// The parts of a reduction, in their order.
__global__ void __launch_bounds__(threads)
    add_parts_kernel(const float* parts, int64_t splits, int64_t count, DType dtype, void* Y) {
  for (int64_t i = blockIdx.x * int64_t{threads} + threadIdx.x; i < count; i += gridDim.x * int64_t{threads}) {
    float sum = 0;
    for (int64_t split = 0; split < splits; ++split) sum += parts[split * count + i];
    store_float(Y, i, dtype, sum);
  }
}

unsigned blocks_for(int64_t count) { return static_cast<unsigned>(std::min<int64_t>(ceil_div(count, threads), 4096)); }

// A workspace for a decoded W stays below this.
constexpr int64_t most_decoded_bytes = int64_t{256} << 20;

}  // namespace

Decoding decoding_in_use() {
  const char* wanted = std::getenv("PEFTFAST_CUDA_DECODE");
  if (wanted == nullptr) return Decoding::by_rows;
  if (std::strcmp(wanted, "first") == 0) return Decoding::first;
  if (std::strcmp(wanted, "within") == 0) return Decoding::within;
  throw std::runtime_error(std::string("PEFTFAST_CUDA_DECODE must be first or within, got ") + wanted + ".");
}

Choice pick(const Linear& args, bool hopper, Decoding decoding) {
  constexpr Choice plain{Choice::plain, 0, false};
  const bool four_bit = args.W.fourbit.blocksize != 0;
  if (args.compute == DType::f32 || (args.dtype != DType::f32 && args.dtype != args.compute)) return plain;
  const bool grouped = args.rows.groups.offsets != nullptr;
  const int64_t groups = grouped ? std::max<int64_t>(1, args.rows.groups.count) : 1;
  const int64_t rows = ceil_div(args.rows.M, groups);  // of a group, if they are alike
  const int64_t line = args.reduction_contiguous ? args.Q : args.P;
  // Sixteen codes of one block and one row must lie in eight aligned bytes to be decoded within a product; a lane of
  // the kernel for few rows takes twice as many.
  const bool decodable = line % 32 == 0 && reinterpret_cast<uintptr_t>(args.W.fourbit.packed) % 16 == 0;
  const bool fits = !grouped && args.P * args.Q * 2 <= most_decoded_bytes;
  if (four_bit && !decodable && !fits) return plain;
  const bool first = decoding == Decoding::by_rows ? rows >= 512 : decoding == Decoding::first;
  const bool decode_first = four_bit && fits && (!decodable || first);
  if (args.reduction_contiguous && !args.dropout && !decode_first && args.Q > 0) {
    if (rows <= 16) return {Choice::few, 16, false};
    if (rows <= 64 && four_bit) return {Choice::few, 64, false};
  }
  const bool dense = decode_first || !four_bit, narrows = args.dtype == DType::f32;
  const bool pieces_of_16_bytes = (narrows || in_16_bytes(args.X, args.ldx)) &&
                                  (decode_first ? line % 8 == 0 : in_16_bytes(args.W.dense, args.W.ld));
  if (hopper && dense && !grouped && rows >= 256 && args.Q > 0 && pieces_of_16_bytes)
    return {Choice::hopper, 256, decode_first};
  return {Choice::tiled, rows <= 48 ? 32 : 128, decode_first};
}

void linear(const Linear& given, const Stream& stream) {
  if (given.rows.M == 0 || given.P == 0) return;
  Linear args = given;
  const bool four_bit = args.W.fourbit.blocksize != 0;
  if (!four_bit)
    args.compute = args.dtype;
  else
    args.W.ld = args.reduction_contiguous ? args.Q : args.P;
  if (args.rows.groups.offsets) {
    launch("clear", clear_rest_kernel, {static_cast<unsigned>(std::min<int64_t>(args.rows.M, 512)), 1, 1}, threads, 0,
           stream, args.rows, args.P * size_of(args.dtype), static_cast<char*>(args.Y));
  }
  if (!four_bit && args.W.dense == nullptr) args.Q = 0;  // adapters alone
  const Choice choice = pick(args, hopper_in_use(), decoding_in_use());
  if (choice.kernel == Choice::plain) {
    launch_tiles("linear", linear_plain_kernel, tile, tile, 1, threads, 2 * step * (tile + 1) * 4, stream, args);
    return;
  }
  const bool narrows = args.dtype == DType::f32;
  const int64_t ld = ceil_div(args.Q, 8) * 8;
  const Workspace narrowed(stream, narrows ? args.rows.M * ld * 2 : 0);
  if (narrows && args.Q > 0) {
    launch("narrow", narrow_kernel, {blocks_for(args.rows.M * args.Q), 1, 1}, threads, 0, stream,
           static_cast<const float*>(args.X), args.ldx, args.rows.M, args.Q, args.compute, narrowed.as<void>(), ld);
    args.X = narrowed.as<void>(), args.ldx = ld;
  }
  const Workspace decoded(stream, choice.decode_first ? args.P * args.Q * 2 : 0);
  if (choice.decode_first) {
    decode(args.W.fourbit, args.P * args.Q, args.compute, decoded.as<void>(), stream);
    args.W.dense = decoded.as<void>();
    args.W.fourbit = {};
  }
  const int64_t splits = splits_of(args, choice, stream.multiprocessors), count = args.rows.M * args.P;
  const Workspace parts(stream, splits > 1 ? splits * count * 4 : 0);
  if (splits > 1) args.Y = parts.as<void>(), args.dtype = DType::f32;
  if (choice.kernel == Choice::few)
    linear_few(args, choice.tile_rows, splits, stream);
  else if (choice.kernel == Choice::hopper)
    linear_hopper(args, stream);
  else
    linear_tiled(args, choice.tile_rows, splits, stream);
  if (splits > 1)
    launch("add_parts", add_parts_kernel, {blocks_for(count), 1, 1}, threads, 0, stream,
           static_cast<const float*>(parts.as<float>()), splits, count, given.dtype, given.Y);
}

}  // namespace peftfast::cuda
