// A list of work for a device: kernels, by their C++ names, and writes of memory.
//
// Kernels are compiled by NVRTC on first use of a device and kept. FFI's initialize
// stage compiles them, so that the execute stage, which a CUDA graph may capture, only
// launches.

#ifndef JBAG_CUDA_LAUNCHER_H_
#define JBAG_CUDA_LAUNCHER_H_

#include <stdint.h>
#include <string.h>

#include <string>
#include <type_traits>
#include <vector>

#include "cuda/driver.h"

namespace jbag {
namespace cuda {

// The device code as text: CMake joins the files in device/.
extern const char kDeviceSource[];

struct Device {
  int ordinal;
  CUstream stream;
  bool launches;  // false: kernels are compiled, nothing runs
};

class Launcher {
 public:
  void Zero(void* data, int64_t bytes) {
    if (bytes > 0) works_.push_back({{}, Address(data), 0, bytes, 0, 0, 0, {}});
  }
  void Copy(const void* from, void* to, int64_t bytes) {
    if (bytes == 0 || from == to) return;
    works_.push_back({{}, Address(to), Address(from), bytes, 0, 0, 0, {}});
  }

  // Launches `kernel` on blocks [x, y] of some threads. Nothing if there are no blocks.
  template <typename... Arguments>
  void Launch(std::string kernel, int64_t x, int64_t y, int threads,
              const Arguments&... arguments) {
    Work work{std::move(kernel), 0, 0, 0, x, y, threads, {}};
    work.arguments.reserve(sizeof...(arguments));
    (work.arguments.emplace_back(arguments), ...);
    works_.push_back(std::move(work));
  }

  // Compiles the kernels that the device lacks, and does the work unless the stage only
  // initializes; returns an empty string, or what went wrong.
  std::string Run(const Device& device) const;

 private:
  struct Argument {
    template <typename T>
    explicit Argument(const T& value) {
      static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(bytes));
      memcpy(bytes, &value, sizeof(T));
    }
    alignas(8) char bytes[80];
  };
  struct Work {
    std::string kernel;  // empty: memory
    CUdeviceptr to;
    CUdeviceptr from;  // 0: zeros
    int64_t bytes;
    int64_t x;
    int64_t y;
    int threads;
    std::vector<Argument> arguments;
  };

  static CUdeviceptr Address(const void* data) {
    return reinterpret_cast<CUdeviceptr>(data);
  }

  std::vector<Work> works_;
};

}  // namespace cuda
}  // namespace jbag

#endif  // JBAG_CUDA_LAUNCHER_H_
