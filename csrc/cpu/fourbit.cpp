// Quantization to 4 bits and back, split over threads. Products with a 4-bit weight are those of lora.cpp.
#include <algorithm>
#include <cmath>

#include "../kernels.h"
#include "generic/convert.h"
#include "parallel.h"
#include "table.h"

namespace peftfast::cpu {

void fourbit_quantize(const FourBitQuantizeArgs& args, const Threads& threads) {
  const int64_t blocks = (args.count + args.blocksize - 1) / args.blocksize;
  parallel_for(threads, blocks, [&](int64_t begin, int64_t end) {
    table().fourbit_quantize[static_cast<int>(args.dtype)](args, begin, end);
  });
}

void fourbit_dequantize(const FourBitDequantizeArgs& args, const Threads& threads) {
  constexpr int64_t chunk = 4096;  // the largest block
  parallel_for(threads, (args.count + chunk - 1) / chunk, [&](int64_t begin, int64_t end) {
    table().fourbit_dequantize[static_cast<int>(args.dtype)](args, begin * chunk, std::min(end * chunk, args.count));
  });
}

namespace {

// The code whose value is nearest to x in [-1, 1]. As bitsandbytes does, x is first placed on a grid of 65536 points,
// in one rounding.
class NearestCode {
 public:
  explicit NearestCode(const float* code) {
    int nearest = 0;
    for (int i = 0; i < size; ++i) {
      const float x = -1.0f + 2.0f * static_cast<float>(i) / (size - 1);
      while (nearest < 255 && 0.5f * (code[nearest] + code[nearest + 1]) < x) ++nearest;
      table_[i] = static_cast<uint8_t>(nearest);
    }
  }

  uint8_t operator()(float x) const {
    const float unit = ((x > -1 ? std::min(x, 1.0f) : -1.0f) + 1.0f) * 0.5f;  // NaN becomes -1
    return table_[static_cast<int>(static_cast<float>(static_cast<double>(unit) * (size - 1) + 0.5))];
  }

 private:
  static constexpr int size = 65536;
  uint8_t table_[size];
};

}  // namespace

void fourbit_quantize_absmax(const AbsmaxQuantizeArgs& args, const Threads& threads) {
  const NearestCode nearest(args.code);
  parallel_for(threads, (args.blocks + args.blocksize - 1) / args.blocksize, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * args.blocksize, last = std::min(first + args.blocksize, args.blocks);
      float absmax = 0;
      for (int64_t i = first; i < last; ++i) absmax = std::max(absmax, std::fabs(args.absmax[i] - *args.offset));
      args.nested_absmax[block] = absmax;
      const float inverse = 1.0f / absmax;
      for (int64_t i = first; i < last; ++i)
        args.codes[i] = absmax == 0 ? 0 : nearest((args.absmax[i] - *args.offset) * inverse);
    }
  });
}

}  // namespace peftfast::cpu
