// The base product on GPUs of compute capability 9.0, for many rows: Y = X W^T + bias + drop'(U L), a dense W.
//
// A block computes 128 columns of 256 rows. Tiles of X and W, 64 wide along Q, come to four stages of shared memory;
// two warpgroups, each with 128 of the rows, multiply them there. One thread asks for the tiles of a stage as soon as
// all warps are done with what was in it, while the products of the next are under way. The accumulators start from the
// low-rank term, which is computed while the first tiles are on their way, and Y is written once.
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "epilogue.cuh"
#include "hopper.cuh"

namespace peftfast::cuda {
namespace {

constexpr int tile_rows = 256, columns = 128, depth = tile_width, stages = 4;
constexpr int threads = 256, warps = threads / lanes, warpgroups = 2, halves = 2;  // of 64 rows each has
constexpr int X_bytes = tile_rows * depth * 2, W_bytes = columns * depth * 2, stage_bytes = X_bytes + W_bytes;

// Beside the stages, so that they can be filled while it is used.
constexpr int64_t low_rank_bytes = LowRankTerm<tile_rows, columns, threads>::bytes;
constexpr int64_t shared_bytes =
    tile_alignment + stages * stage_bytes + low_rank_bytes + 2 * stages * static_cast<int64_t>(sizeof(Barrier));

template <class T, bool straight>
__global__ void __launch_bounds__(threads) linear_hopper_kernel(Linear args, const PEFTFAST_GRID_CONSTANT TileMap of_X,
                                                                const PEFTFAST_GRID_CONSTANT TileMap of_W) {
#if defined(PEFTFAST_EMULATE_CUDA) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Tile rows = tile_of(args.rows, blockIdx.x, tile_rows);
  const int64_t column = blockIdx.y * int64_t{columns};
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, g = lane / 4, t = lane % 4;
  char* shared = shared_memory<char>();
  shared += (tile_alignment - reinterpret_cast<uintptr_t>(shared) % tile_alignment) % tile_alignment;
  Barrier* full = reinterpret_cast<Barrier*>(shared + stages * stage_bytes + low_rank_bytes);
  Barrier* empty = full + stages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) full[i].init(1), empty[i].init(warps);
    publish_barriers();
  }
  __syncthreads();

  const int64_t steps = (args.Q + depth - 1) / depth;
  const auto fetch = [&](int64_t step) {
    Barrier& barrier = full[step % stages];
    char* to = shared + step % stages * stage_bytes;
    barrier.arrive_and_expect(stage_bytes);
    copy_tile(to, of_X, rows.first, step * depth, barrier);
    if constexpr (straight)
      copy_tile(to + X_bytes, of_W, column, step * depth, barrier);
    else
      for (int i = 0; i < columns / tile_width; ++i)
        copy_tile(to + X_bytes + i * depth * 128, of_W, step * depth, column + i * tile_width, barrier);
  };
  if (threadIdx.x == 0)
    for (int64_t step = 0; step < stages && step < steps; ++step) fetch(step);

  // Sixteen rows of either half are this warp's.
  const auto row_of = [&](int half) { return warp / 4 * (tile_rows / warpgroups) + half * 64 + warp % 4 * 16; };
  float sums[halves][16][4] = {};
  LowRankTerm<tile_rows, columns, threads> low_rank(args, rows, column, shared + stages * stage_bytes);
#pragma unroll 1
  for (int tile = 0; tile < low_rank.tiles(); ++tile) {
    low_rank.fetch(tile);
#pragma unroll
    for (int half = 0; half < halves; ++half) low_rank.add(tile, row_of(half), 0, sums[half]);
  }

  const auto multiply = [&](int64_t step) {
    const char* X = shared + step % stages * stage_bytes + warp / 4 * (X_bytes / warpgroups);
    const char* W = shared + step % stages * stage_bytes + X_bytes;
    full[step % stages].wait(step / stages);
    begin_products();
#pragma unroll
    for (int k = 0; k < depth; k += 16)
#pragma unroll
      for (int half = 0; half < halves; ++half)
        multiply_64x128x16<T, !straight>(sums[half], X + half * 64 * 128 + 2 * k, W + (straight ? 2 : 128) * k,
                                         depth * 128);
    commit_products();
  };
  multiply(0);
  wait_for_products<0>();  // nothing but products may change the sums while others are under way
  settle(sums[0]), settle(sums[1]);
  for (int64_t step = 1; step < steps; ++step) {
    multiply(step);
    wait_for_products<1>();  // those of the step before are done
    const int64_t before = step - 1, next = before + stages;
    if (lane == 0) empty[before % stages].arrive();
    if (next < steps && threadIdx.x == 0) {
      empty[before % stages].wait(before / stages);
      fetch(next);
    }
  }
  wait_for_products<0>();
  settle(sums[0]), settle(sums[1]);
#pragma unroll
  for (int half = 0; half < halves; ++half)
    store_fragments<T>(args, rows, rows.first + row_of(half) + g, column + 2 * t, sums[half]);
#endif
}

template <class T, bool straight>
void launch_hopper(const Linear& args, const Stream& stream) {
  const dim3 grid{static_cast<unsigned>(args.rows.most_tiles(tile_rows)),
                  static_cast<unsigned>(ceil_div(args.P, columns)), 1};
  launch("linear", linear_hopper_kernel<T, straight>, grid, threads, shared_bytes, stream, args,
         tile_map(args.X, args.rows.M, args.Q, args.ldx, tile_rows),
         straight ? tile_map(args.W.dense, args.P, args.Q, args.W.ld, columns)
                  : tile_map(args.W.dense, args.Q, args.P, args.W.ld, depth));
}

}  // namespace

bool hopper_in_use() {
  const char* wanted = std::getenv("PEFTFAST_CUDA_WGMMA");
  if (wanted == nullptr || std::strcmp(wanted, "1") != 0) return false;
#ifdef PEFTFAST_EMULATE_CUDA
  return true;
#else
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
#endif
}

void linear_hopper(const Linear& args, const Stream& stream) {
  if (args.compute == DType::bf16)
    args.reduction_contiguous ? launch_hopper<bf16, true>(args, stream) : launch_hopper<bf16, false>(args, stream);
  else
    args.reduction_contiguous ? launch_hopper<f16, true>(args, stream) : launch_hopper<f16, false>(args, stream);
}

}  // namespace peftfast::cuda
