// What a kernel may ask of whoever calls it: threads on a CPU; a stream and memory on a GPU.
#pragma once

#include <cstdint>

namespace peftfast {

// How a kernel reaches the threads of its host: run(begin, end, body, context) splits [begin, end) over at
// most `count` threads and calls body(first, last, context) on each part.
struct Threads {
  int count;
  void (*run)(int64_t begin, int64_t end, void (*body)(int64_t, int64_t, void*), void* context);
};

// How a kernel reaches its GPU: the stream it runs on, and memory that serves what is launched before it is released.
struct Stream {
  void* handle;
  int multiprocessors;
  void* (*allocate)(uint64_t bytes);
  void (*release)(void* data);
};

}  // namespace peftfast
