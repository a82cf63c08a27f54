#include "cuda/launcher.h"

#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace jbag {
namespace cuda {

namespace {

struct Loaded {
  CUcontext context = nullptr;
  std::string architecture;
  std::map<std::string, CUfunction> functions;
};

// Machine code, and the symbol of each kernel in it.
struct Image {
  std::string code;
  std::map<std::string, std::string> symbols;
};

std::string Failed(const Driver& driver, const char* what, CUresult result) {
  const char* text = nullptr;
  driver.cuGetErrorString(result, &text);
  return std::string(what) + ": " + (text != nullptr ? text : "unknown error");
}

#define JBAG_RETURN_IF_CUDA_FAILED(call)                            \
  if (const CUresult result = driver.call; result != 0) {           \
    return Failed(driver, "jbag: the CUDA driver: " #call, result); \
  }

#define JBAG_RETURN_IF_NVRTC_FAILED(call)                    \
  if (const nvrtcResult result = driver.call; result != 0) { \
    return std::string("jbag: NVRTC: " #call ": ") +         \
           driver.nvrtcGetErrorString(result);               \
  }

// Machine code for a compute capability that NVRTC knows; PTX, which the driver
// compiles, for the newest that it knows where the device is newer.
std::string Architecture(const Driver& driver, int capability, std::string* out) {
  int count = 0;
  JBAG_RETURN_IF_NVRTC_FAILED(nvrtcGetNumSupportedArchs(&count));
  std::vector<int> known(static_cast<size_t>(count));
  JBAG_RETURN_IF_NVRTC_FAILED(nvrtcGetSupportedArchs(known.data()));
  int best = 0;
  for (const int one : known) {
    if (one <= capability && one > best) best = one;
  }
  if (best == 0) {
    return "jbag: NVRTC doesn't compile for compute capability " +
           std::to_string(capability);
  }
  *out = (best == capability ? "sm_" : "compute_") + std::to_string(best);
  return "";
}

std::string CompileProgram(const Driver& driver, nvrtcProgram program,
                           const std::string& architecture,
                           const std::vector<std::string>& kernels, Image* image) {
  for (const std::string& kernel : kernels) {
    JBAG_RETURN_IF_NVRTC_FAILED(nvrtcAddNameExpression(program, kernel.c_str()));
  }
  const std::string option = "--gpu-architecture=" + architecture;
  const char* options[] = {option.c_str(), "--std=c++17"};
  if (const nvrtcResult result = driver.nvrtcCompileProgram(program, 2, options);
      result != 0) {
    size_t size = 0;
    JBAG_RETURN_IF_NVRTC_FAILED(nvrtcGetProgramLogSize(program, &size));
    std::string log(size, '\0');
    JBAG_RETURN_IF_NVRTC_FAILED(nvrtcGetProgramLog(program, log.data()));
    return std::string("jbag: NVRTC: ") + driver.nvrtcGetErrorString(result) + ": " +
           log.c_str();
  }
  for (const std::string& kernel : kernels) {
    const char* symbol = nullptr;
    JBAG_RETURN_IF_NVRTC_FAILED(nvrtcGetLoweredName(program, kernel.c_str(), &symbol));
    image->symbols[kernel] = symbol;
  }
  const bool is_ptx = architecture.compare(0, 3, "sm_") != 0;
  size_t size = 0;
  if (is_ptx) {
    JBAG_RETURN_IF_NVRTC_FAILED(nvrtcGetPTXSize(program, &size));
    image->code.resize(size);
    JBAG_RETURN_IF_NVRTC_FAILED(nvrtcGetPTX(program, image->code.data()));
  } else {
    JBAG_RETURN_IF_NVRTC_FAILED(nvrtcGetCUBINSize(program, &size));
    image->code.resize(size);
    JBAG_RETURN_IF_NVRTC_FAILED(nvrtcGetCUBIN(program, image->code.data()));
  }
  return "";
}

std::string Compile(const Driver& driver, const std::string& architecture,
                    const std::vector<std::string>& kernels, Image* image) {
  nvrtcProgram program = nullptr;
  JBAG_RETURN_IF_NVRTC_FAILED(
      nvrtcCreateProgram(&program, kDeviceSource, "jbag.cu", 0, nullptr, nullptr));
  std::string error = CompileProgram(driver, program, architecture, kernels, image);
  driver.nvrtcDestroyProgram(&program);
  return error;
}

// What the process has loaded, under one lock. Devices of the same compute capability
// share the compilation.
struct Cache {
  std::mutex mutex;
  std::map<int, Loaded> devices;
  std::map<std::pair<std::string, std::vector<std::string>>, Image> images;
};

Cache& TheCache() {
  // Never destroyed: the driver may be gone when static variables are.
  static Cache* const cache = new Cache;
  return *cache;
}

// The primary context, which is XLA's, and the architecture of a device.
std::string Open(const Driver& driver, int ordinal, Loaded* loaded) {
  if (loaded->context != nullptr) return "";
  CUdevice device = 0;
  int major = 0;
  int minor = 0;
  JBAG_RETURN_IF_CUDA_FAILED(cuInit(0));
  JBAG_RETURN_IF_CUDA_FAILED(cuDeviceGet(&device, ordinal));
  JBAG_RETURN_IF_CUDA_FAILED(
      cuDeviceGetAttribute(&major, kComputeCapabilityMajor, device));
  JBAG_RETURN_IF_CUDA_FAILED(
      cuDeviceGetAttribute(&minor, kComputeCapabilityMinor, device));
  std::string error = Architecture(driver, 10 * major + minor, &loaded->architecture);
  if (!error.empty()) return error;
  JBAG_RETURN_IF_CUDA_FAILED(cuDevicePrimaryCtxRetain(&loaded->context, device));
  return "";
}

// Loads kernels that the device lacks, into its context, which is the current one.
std::string Load(const Driver& driver, const std::vector<std::string>& kernels,
                 Cache* cache, Loaded* loaded) {
  Image& image = cache->images[{loaded->architecture, kernels}];
  if (image.code.empty()) {
    Image compiled;
    std::string error = Compile(driver, loaded->architecture, kernels, &compiled);
    if (!error.empty()) return error;
    image = std::move(compiled);
  }
  CUmodule module = nullptr;
  JBAG_RETURN_IF_CUDA_FAILED(cuModuleLoadData(&module, image.code.data()));
  for (const auto& [kernel, symbol] : image.symbols) {
    CUfunction function = nullptr;
    JBAG_RETURN_IF_CUDA_FAILED(cuModuleGetFunction(&function, module, symbol.c_str()));
    loaded->functions[kernel] = function;
  }
  return "";
}

}  // namespace

std::string Launcher::Run(const Device& device) const {
  const Driver* opened = OpenedDriver();
  if (opened == nullptr) return "jbag: the CUDA driver is not opened";
  const Driver& driver = *opened;
  std::vector<CUfunction> functions;
  CUcontext context = nullptr;
  {
    Cache& cache = TheCache();
    const std::lock_guard<std::mutex> lock(cache.mutex);
    Loaded& loaded = cache.devices[device.ordinal];
    std::string error = Open(driver, device.ordinal, &loaded);
    if (!error.empty()) return error;
    context = loaded.context;
    std::set<std::string> missing;
    for (const Work& work : works_) {
      if (!work.kernel.empty() && loaded.functions.count(work.kernel) == 0) {
        missing.insert(work.kernel);
      }
    }
    if (!missing.empty()) {
      JBAG_RETURN_IF_CUDA_FAILED(cuCtxPushCurrent_v2(context));
      error = Load(driver, {missing.begin(), missing.end()}, &cache, &loaded);
      driver.cuCtxPopCurrent_v2(&context);
      if (!error.empty()) return error;
    }
    for (const Work& work : works_) {
      functions.push_back(work.kernel.empty() ? nullptr
                                              : loaded.functions[work.kernel]);
    }
  }
  if (!device.launches) return "";

  JBAG_RETURN_IF_CUDA_FAILED(cuCtxPushCurrent_v2(context));
  CUresult result = 0;
  for (size_t i = 0; i < works_.size() && result == 0; ++i) {
    const Work& work = works_[i];
    if (functions[i] != nullptr) {
      if (work.x == 0 || work.y == 0) continue;
      if (work.x > INT32_MAX || work.y > UINT16_MAX) {
        result = 1;  // CUDA_ERROR_INVALID_VALUE
        continue;
      }
      std::vector<void*> arguments;
      for (const Argument& argument : work.arguments) {
        arguments.push_back(const_cast<char*>(argument.bytes));
      }
      result = driver.cuLaunchKernel(functions[i], static_cast<unsigned>(work.x),
                                     static_cast<unsigned>(work.y), 1,
                                     static_cast<unsigned>(work.threads), 1, 1, 0,
                                     device.stream, arguments.data(), nullptr);
    } else if (work.from != 0) {
      result = driver.cuMemcpyDtoDAsync_v2(
          work.to, work.from, static_cast<size_t>(work.bytes), device.stream);
    } else {
      result = driver.cuMemsetD8Async(work.to, 0, static_cast<size_t>(work.bytes),
                                      device.stream);
    }
  }
  driver.cuCtxPopCurrent_v2(&context);
  return result == 0 ? "" : Failed(driver, "jbag: a launch failed", result);
}

}  // namespace cuda
}  // namespace jbag

// What NVRTC compiles, for those who compile it without a device.
extern "C" __attribute__((visibility("default"))) const char* jbag_cuda_source() {
  return jbag::cuda::kDeviceSource;
}
