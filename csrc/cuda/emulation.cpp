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

struct Fiber {
  enum { ready, waiting, done } state;
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
  std::vector<int> order;
  int place, at_barrier, alive;
  void* scheduler;
  const std::function<void()>* thread;
  std::minstd_rand random;
};

thread_local Machine machine;

void resume_next() {  // from a fiber to the next that can run, or to run() when none is left
  Machine& m = machine;
  const int count = static_cast<int>(m.order.size()), self = static_cast<int>(threadIdx.x);
  Fiber& from = m.fibers[self];
  if (m.alive == 0) peftfast_switch_stacks(&from.stack, m.scheduler);
  for (int i = 0; i < count; ++i) {
    m.place = m.place + 1 == count ? 0 : m.place + 1;
    const int next = m.order[m.place];
    if (m.fibers[next].state != Fiber::ready) continue;
    if (next == self) return;
    threadIdx.x = static_cast<unsigned>(next);
    peftfast_switch_stacks(&from.stack, m.fibers[next].stack);
    threadIdx.x = static_cast<unsigned>(self);
    return;
  }
  fail("every thread waits for another.");
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

}  // namespace peftfast::cuda::emulation
