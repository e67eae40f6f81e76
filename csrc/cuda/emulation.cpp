// The fibers of emulation.h (x86-64 only).
#include "emulation.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

// Parks the registers that a call must keep on the stack of the one and takes them from the stack of the other.
extern "C" void peftfast_switch_stacks(void** from, void* to);
asm(R"(
.text
.globl peftfast_switch_stacks
.hidden peftfast_switch_stacks
.type peftfast_switch_stacks, @function
peftfast_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace peftfast::cuda::emulation {
namespace {

constexpr int lanes = 32;
constexpr size_t stack_bytes = 64 * 1024;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z, what);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct TileCopy {
  char* to;
  TileMap map;
  int64_t row, column;
  uint64_t* barrier;
};

// As a barrier in shared memory is laid out here.
struct BarrierState {
  uint16_t count, missing;        // arrivals of a phase
  int32_t phase : 1, bytes : 31;  // the current one; still to come
};
static_assert(sizeof(BarrierState) == sizeof(uint64_t));

struct Fiber {
  enum { ready, waiting, done } state;
  bool polls;  // a barrier in shared memory
  void* stack;
  std::vector<Copy> copies;
  int groups;  // of copies, committed
};

struct Warp {
  int arrived;
  const char* name;
  void* data[lanes];
};

struct Machine {
  std::unique_ptr<char[]> stacks;
  size_t stack_count = 0;
  std::vector<char> shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<TileCopy> tiles;
  std::vector<int> order;
  int place, at_barrier, alive;
  int slow;  // a warp that goes on when no other can
  void* scheduler;
  const std::function<void()>* thread;
  std::minstd_rand random;
};

Machine machine;

int next_ready(bool polling, bool slow) {  // the next fiber that can run, of those too where it says so; or -1
  Machine& m = machine;
  const int count = static_cast<int>(m.order.size());
  for (int i = 0, place = m.place; i < count; ++i) {
    if (++place == count) place = 0;
    const int fiber = m.order[place];
    if (m.fibers[fiber].state != Fiber::ready || (m.fibers[fiber].polls && !polling)) continue;
    if (fiber / lanes == m.slow && !slow) continue;
    m.place = place;
    return fiber;
  }
  return -1;
}

// From a fiber to the next, or to run() when none is left. A thread that ended never returns from here, so that nothing
// may be left on its stack that a sanitizer guards.
void resume_next() {
  Machine& m = machine;
  const int self = static_cast<int>(threadIdx.x);
  if (m.alive == 0) peftfast_switch_stacks(&m.fibers[self].stack, m.scheduler);
  int next = next_ready(false, false);
  if (next < 0) next = next_ready(false, true);
  if (next < 0) next = next_ready(true, true);
  if (next < 0) fail("every thread waits for another.");
  if (next == self) return;
  threadIdx.x = static_cast<unsigned>(next);
  peftfast_switch_stacks(&m.fibers[self].stack, m.fibers[next].stack);
  threadIdx.x = static_cast<unsigned>(self);
}

void release_barrier() {
  Machine& m = machine;
  m.at_barrier = 0;
  for (Fiber& fiber : m.fibers)
    if (fiber.state == Fiber::waiting) fiber.state = Fiber::ready;
}

void start() {
  (*machine.thread)();
  Machine& m = machine;
  Fiber& self = m.fibers[threadIdx.x];
  if (!self.copies.empty()) fail("a thread ended before its copies arrived.");
  self.state = Fiber::done;
  --m.alive;
  if (m.at_barrier > 0 && m.at_barrier == m.alive) release_barrier();
  resume_next();
  fail("a thread that ended went on.");
}

}  // namespace

void run(dim3 grid, int threads, int64_t shared_bytes, const std::function<void()>& thread) {
  Machine& m = machine;
  if (threads % lanes != 0) fail("a block must be whole warps.");
  if (m.stack_count < static_cast<size_t>(threads)) {
    m.stacks.reset(new char[threads * stack_bytes]);
    m.stack_count = threads;
  }
  m.thread = &thread;
  gridDim = grid, blockDim = {static_cast<unsigned>(threads), 1, 1};
  m.order.resize(threads);
  for (int i = 0; i < threads; ++i) m.order[i] = i;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        m.shared.assign(shared_bytes, static_cast<char>(0xff));  // NaN in every format
        m.shared.shrink_to_fit();
        m.fibers.assign(threads, {});
        m.warps.assign(threads / lanes, {});
        std::shuffle(m.order.begin(), m.order.end(), m.random);
        m.at_barrier = 0, m.alive = threads, m.place = 0;
        m.slow = static_cast<int>(m.random() % (threads / lanes));
        for (int i = 0; i < threads; ++i) {
          // As peftfast_switch_stacks leaves a stack: six registers, then the address to go on at, such that the stack
          // pointer is 8 past a multiple of 16 there, as after a call.
          auto top = reinterpret_cast<uintptr_t>(m.stacks.get() + (i + 1) * stack_bytes) & ~uintptr_t{15};
          void** stack = reinterpret_cast<void**>(top) - 8;
          stack[6] = reinterpret_cast<void*>(&start);
          m.fibers[i].stack = stack;
        }
        threadIdx.x = static_cast<unsigned>(m.order[0]);
        peftfast_switch_stacks(&m.scheduler, m.fibers[m.order[0]].stack);
        if (!m.tiles.empty()) fail("a block ended before its tiles arrived.");
      }
}

void with_warp(const char* name, void* data, void (*together)(void* const* lanes)) {
  Machine& m = machine;
  const int self = static_cast<int>(threadIdx.x);
  Warp& warp = m.warps[self / lanes];
  if (warp.arrived > 0 && std::strcmp(warp.name, name) != 0) fail("a warp's threads are at different instructions.");
  warp.name = name;
  warp.data[self % lanes] = data;
  if (++warp.arrived < lanes) {
    // Waiting for the warp is told from waiting for the block by not being counted at the barrier.
    m.fibers[self].state = Fiber::waiting;
    resume_next();
    return;
  }
  warp.arrived = 0;
  together(warp.data);
  for (int i = 0; i < lanes; ++i) m.fibers[self / lanes * lanes + i].state = Fiber::ready;
}

void wait_for_block() {
  Machine& m = machine;
  const int self = static_cast<int>(threadIdx.x);
  m.fibers[self].state = Fiber::waiting;
  if (++m.at_barrier == m.alive) {
    release_barrier();
    return;
  }
  resume_next();
}

char* shared() { return machine.shared.data(); }

void copy_later(void* to, const void* from, int bytes) {
  Fiber& self = machine.fibers[threadIdx.x];
  self.copies.push_back({to, from, bytes, self.groups});
}

void commit_copies() { ++machine.fibers[threadIdx.x].groups; }

void wait_for_copies(int groups_still_under_way) {
  Fiber& self = machine.fibers[threadIdx.x];
  size_t kept = 0;
  for (const Copy& copy : self.copies) {
    if (copy.group >= self.groups - groups_still_under_way) {
      self.copies[kept++] = copy;
      continue;
    }
    std::memset(copy.to, 0, 16);
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  self.copies.resize(kept);
}

namespace {

template <class F>
void change(uint64_t* barrier, F f) {
  BarrierState state;
  std::memcpy(&state, barrier, sizeof(state));
  f(state);
  if (state.missing == 0 && state.bytes == 0) state.phase = !state.phase, state.missing = state.count;
  std::memcpy(barrier, &state, sizeof(state));
}

void deliver(const TileCopy& copy) {
  const TileMap& map = copy.map;
  const auto base = reinterpret_cast<uintptr_t>(copy.to);
  if (base % 1024 != 0) fail("a tile must start at a multiple of 1024.");
  for (int64_t i = 0; i < map.box_rows; ++i)
    for (int64_t j = 0; j < 64; ++j) {
      const int64_t row = copy.row + i, column = copy.column + j;
      const bool inside = row < map.rows && column < map.columns;
      const uint16_t value = inside ? map.data[row * map.ld + column] : 0;
      std::memcpy(copy.to + i * 128 + ((j / 8) ^ (i % 8)) * 16 + j % 8 * 2, &value, sizeof(value));
    }
  change(copy.barrier, [&](BarrierState& state) { state.bytes -= map.box_rows * 128; });
}

}  // namespace

void init_barrier(uint64_t* barrier, int count) {
  const BarrierState state{static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0, 0};
  std::memcpy(barrier, &state, sizeof(state));
}

void arrive(uint64_t* barrier, int bytes_to_come) {
  change(barrier, [&](BarrierState& state) {
    if (state.missing == 0) fail("more threads arrived at a barrier than it waits for.");
    --state.missing, state.bytes += bytes_to_come;
  });
}

void copy_tile(void* to, const TileMap& map, int64_t row, int64_t column, uint64_t* barrier) {
  machine.tiles.push_back({static_cast<char*>(to), map, row, column, barrier});
}

void wait(uint64_t* barrier, uint32_t parity) {
  Machine& m = machine;
  for (int tries = 0;; ++tries) {
    for (size_t i = 0; i < m.tiles.size();) {
      if (m.tiles[i].barrier != barrier) {
        ++i;
        continue;
      }
      const TileCopy copy = m.tiles[i];
      m.tiles.erase(m.tiles.begin() + i);
      deliver(copy);
    }
    BarrierState state;
    std::memcpy(&state, barrier, sizeof(state));
    if ((static_cast<uint32_t>(state.phase) & 1) != parity) return;
    if (tries == 100000) fail("a barrier in shared memory is never completed.");
    Fiber& self = m.fibers[threadIdx.x];
    self.polls = true;
    resume_next();
    self.polls = false;
  }
}

}  // namespace peftfast::cuda::emulation
