// Splitting a loop over the threads of the host.
#pragma once

#include <algorithm>
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

// Calls body(share, begin, end) for parts of the items [0, count) of every share: as many parts of about equal cost as
// there are threads. An item belongs to the part in which its cost begins.
template <class Body>
void parallel_for_each(const Threads& threads, const std::vector<Share>& shares, Body body) {
  int64_t total = 0;
  for (const Share& share : shares) total += share.count * share.cost;
  const int64_t parts = std::max(threads.count, 1);
  parallel_for(threads, parts, [&](int64_t first_part, int64_t last_part) {
    const int64_t from = total * first_part / parts, to = total * last_part / parts;
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
  });
}

}  // namespace
}  // namespace peftfast::cpu
