// Splitting a loop over the threads of the host.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "../hosts.h"
#include "../kernels.h"

namespace peftfast::cpu {
namespace {

// Calls body(begin, end) on parts of [0, count).
template <class Body>
void parallel_for(const Threads& threads, int64_t count, Body body) {
  if (count <= 1 || threads.count <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  threads.run(
      0, count, [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

// `count` items of equal cost.
struct Share {
  int64_t count, cost;
};

// Calls body(share, begin, end) for parts of the items [0, count) of every share. Parts are of about equal cost,
// several to a thread, and taken as threads get to them: costs are guesses, and so is that all threads are equally
// fast. An item belongs to the part in which its cost begins.
template <class Body>
void parallel_for_each(const Threads& threads, const std::vector<Share>& shares, Body body) {
  constexpr int64_t parts_of_thread = 32;
  int64_t total = 0;
  for (const Share& share : shares) total += share.count * share.cost;
  const int64_t parts = threads.count > 1 ? parts_of_thread * threads.count : 1;
  const auto run = [&](int64_t part) {
    const int64_t from = total * part / parts, to = total * (part + 1) / parts;
    int64_t before = 0;  // the cost of the shares gone by
    for (size_t i = 0; i < shares.size() && before < to; ++i) {
      const auto [count, cost] = shares[i];
      const auto item_at = [&, count = count, cost = cost](int64_t x) {
        return std::clamp<int64_t>((x - before + cost - 1) / cost, 0, count);
      };
      if (count > 0 && cost > 0) {
        const int64_t begin = from > before ? item_at(from) : 0, end = item_at(to);
        if (begin < end) body(i, begin, end);
        before += count * cost;
      }
    }
  };
  std::atomic<int64_t> next{0};
  parallel_for(threads, std::max(threads.count, 1), [&](int64_t, int64_t) {
    for (int64_t part; (part = next++) < parts;) run(part);
  });
}

}  // namespace
}  // namespace peftfast::cpu
