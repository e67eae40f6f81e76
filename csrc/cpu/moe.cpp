// Putting together what the experts of a token say, split over threads. Products with experts are those of lora.cpp.
#include "../kernels.h"
#include "parallel.h"
#include "table.h"

namespace peftfast::cpu {

void combine(const CombineArgs& args, const Threads& threads) {
  parallel_for(threads, args.tokens,
               [&](int64_t begin, int64_t end) { table().combine[static_cast<int>(args.dtype)](args, begin, end); });
}

void combine_backward(const CombineBackwardArgs& args, const Threads& threads) {
  parallel_for(threads, args.of.tokens, [&](int64_t begin, int64_t end) {
    table().combine_backward[static_cast<int>(args.of.dtype)](args, begin, end);
  });
}

}  // namespace peftfast::cpu
