// Where the operators of this build run. The files of this folder are compiled once for each: for the CPU; for GPUs
// (PEFTFAST_CUDA), into a second shared object; and for tests with the GPU's kernels on the CPU
// (PEFTFAST_EMULATE_CUDA).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef PEFTFAST_CUDA
#include <cuda_runtime_api.h>
#endif

#include <cstdlib>

#include "../hosts.h"
#include "../kernels.h"

namespace peftfast {

using torch::stable::Tensor;

inline Threads torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t begin, int64_t end, void (*body)(int64_t, int64_t, void*), void* context) {
            torch::stable::parallel_for(begin, end, 1,
                                        [&](int64_t first, int64_t last) { body(first, last, context); });
          }};
}

#ifdef PEFTFAST_CUDA

namespace kernels = cuda;
#define PEFTFAST_DISPATCH_KEY CUDA
constexpr const char* the_device = "on the device of the first argument";
constexpr const char* out_of_memory = "CUDA out of memory.";  // in torch's words, by which others know it
constexpr bool host_reads_tensors = false;
inline int32_t device_type() { return aoti_torch_device_type_cuda(); }
inline int32_t device_index() { return torch::stable::accelerator::getCurrentDeviceIndex(); }
inline bool on_device(const Tensor& t) { return t.is_cuda() && t.get_device_index() == device_index(); }

// Makes the device of `first` the current one for the rest of a call, and is the stream that torch has there.
class Host {
 public:
  explicit Host(const Tensor& first) : guard_(index_of(first)) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device_index(), &stream_.handle));
    const cudaError_t error =
        cudaDeviceGetAttribute(&stream_.multiprocessors, cudaDevAttrMultiProcessorCount, first.get_device_index());
    STD_TORCH_CHECK(error == cudaSuccess, "peftfast cannot use the GPU: ", cudaGetErrorString(error), ".");
    stream_.allocate = [](uint64_t bytes) {
      void* data = nullptr;
      STD_TORCH_CHECK(aoti_torch_cuda_caching_allocator_raw_alloc(bytes, &data) == AOTI_TORCH_SUCCESS, out_of_memory,
                      " peftfast tried to allocate ", bytes, " bytes.");
      return data;
    };
    stream_.release = [](void* data) { aoti_torch_cuda_caching_allocator_raw_delete(data); };
  }
  operator const Stream&() const { return stream_; }

 private:
  static int32_t index_of(const Tensor& first) {
    STD_TORCH_CHECK(first.is_cuda(), "the first argument must be on a GPU here.");
    return first.get_device_index();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_{};
};

#else

#define PEFTFAST_DISPATCH_KEY CPU
constexpr const char* the_device = "on the CPU";
constexpr const char* out_of_memory = "Out of memory.";
constexpr bool host_reads_tensors = true;
inline int32_t device_type() { return aoti_torch_device_type_cpu(); }
inline int32_t device_index() { return 0; }
inline bool on_device(const Tensor& t) { return t.is_cpu(); }

#ifdef PEFTFAST_EMULATE_CUDA
namespace kernels = cuda;
struct Host {
  explicit Host(const Tensor&) {}
  operator const Stream&() const {
    static const Stream stream{nullptr, 4, [](uint64_t bytes) { return std::malloc(bytes); }, std::free};
    return stream;
  }
};
#else
namespace kernels = cpu;
struct Host {
  explicit Host(const Tensor&) : threads_(torch_threads()) {}
  operator const Threads&() const { return threads_; }

 private:
  Threads threads_;
};
#endif

#endif

}  // namespace peftfast
