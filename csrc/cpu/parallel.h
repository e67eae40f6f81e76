// Splitting a loop over the threads of the host.
#pragma once

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

}  // namespace
}  // namespace peftfast::cpu
