// Memory that a thread keeps between calls, so that its pages are touched once and not at every call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace peftfast::cpu {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // Uninitialized, aligned to 64 bytes, valid until the next call. What is larger than `most_kept` bytes is given back
  // then, whatever the next call wants.
  float* floats(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 64) / 64 * 64;
    if (bytes > size_ || size_ > most_kept) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<float*>(data_);
  }

 private:
  static constexpr size_t most_kept = size_t{16} << 20;
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace peftfast::cpu
