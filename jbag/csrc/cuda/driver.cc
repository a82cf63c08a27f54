#include "cuda/driver.h"

#include <dlfcn.h>

namespace jbag {
namespace cuda {
namespace {

Driver functions;
const Driver* opened = nullptr;

// Finds a function; returns whether the library has it.
template <typename F>
bool Find(void* library, const char* name, F* function) {
  *function = reinterpret_cast<F>(dlsym(library, name));
  return *function != nullptr;
}

}  // namespace

const Driver* OpenedDriver() { return __atomic_load_n(&opened, __ATOMIC_ACQUIRE); }

}  // namespace cuda
}  // namespace jbag

// Opens the CUDA driver and NVRTC by their paths or names; returns null, or the reason
// why they can't be used. No device is touched.
extern "C" __attribute__((visibility("default"))) const char* jbag_cuda_open(
    const char* driver_path, const char* nvrtc_path) {
  using namespace jbag::cuda;
  void* driver = dlopen(driver_path, RTLD_NOW | RTLD_LOCAL);
  if (driver == nullptr) return dlerror();
  void* nvrtc = dlopen(nvrtc_path, RTLD_NOW | RTLD_LOCAL);
  if (nvrtc == nullptr) return dlerror();
#define JBAG_FIND_IN_DRIVER(result, name, parameters) \
  if (!Find(driver, #name, &functions.name)) return "the CUDA driver lacks " #name;
#define JBAG_FIND_IN_NVRTC(result, name, parameters) \
  if (!Find(nvrtc, #name, &functions.name)) return "NVRTC lacks " #name;
  JBAG_CUDA_FUNCTIONS(JBAG_FIND_IN_DRIVER)
  JBAG_NVRTC_FUNCTIONS(JBAG_FIND_IN_NVRTC)
#undef JBAG_FIND_IN_DRIVER
#undef JBAG_FIND_IN_NVRTC
  __atomic_store_n(&opened, &functions, __ATOMIC_RELEASE);
  return nullptr;
}
