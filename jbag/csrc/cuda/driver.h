// The CUDA driver and NVRTC, opened at run time: nothing of CUDA is needed to build.
//
// The types and functions are those of cuda.h and nvrtc.h, of which the few that are
// called are declared here.

#ifndef JBAG_CUDA_DRIVER_H_
#define JBAG_CUDA_DRIVER_H_

#include <stddef.h>
#include <stdint.h>

namespace jbag {
namespace cuda {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using nvrtcResult = int;
using nvrtcProgram = struct _nvrtcProgram*;

constexpr int kComputeCapabilityMajor = 75;  // CUdevice_attribute
constexpr int kComputeCapabilityMinor = 76;

// Each line: the result, the function's symbol in the library, its parameters.
#define JBAG_CUDA_FUNCTIONS(F)                                                         \
  F(CUresult, cuInit, (unsigned))                                                      \
  F(CUresult, cuGetErrorString, (CUresult, const char**))                              \
  F(CUresult, cuDeviceGet, (CUdevice*, int))                                           \
  F(CUresult, cuDeviceGetAttribute, (int*, int, CUdevice))                             \
  F(CUresult, cuDevicePrimaryCtxRetain, (CUcontext*, CUdevice))                        \
  F(CUresult, cuCtxPushCurrent_v2, (CUcontext))                                        \
  F(CUresult, cuCtxPopCurrent_v2, (CUcontext*))                                        \
  F(CUresult, cuModuleLoadData, (CUmodule*, const void*))                              \
  F(CUresult, cuModuleGetFunction, (CUfunction*, CUmodule, const char*))               \
  F(CUresult, cuMemsetD8Async, (CUdeviceptr, unsigned char, size_t, CUstream))         \
  F(CUresult, cuMemcpyDtoDAsync_v2, (CUdeviceptr, CUdeviceptr, size_t, CUstream))      \
  F(CUresult, cuLaunchKernel,                                                          \
    (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, \
     CUstream, void**, void**))

#define JBAG_NVRTC_FUNCTIONS(F)                                                  \
  F(const char*, nvrtcGetErrorString, (nvrtcResult))                             \
  F(nvrtcResult, nvrtcGetNumSupportedArchs, (int*))                              \
  F(nvrtcResult, nvrtcGetSupportedArchs, (int*))                                 \
  F(nvrtcResult, nvrtcCreateProgram,                                             \
    (nvrtcProgram*, const char*, const char*, int, const char* const*,           \
     const char* const*))                                                        \
  F(nvrtcResult, nvrtcDestroyProgram, (nvrtcProgram*))                           \
  F(nvrtcResult, nvrtcAddNameExpression, (nvrtcProgram, const char*))            \
  F(nvrtcResult, nvrtcCompileProgram, (nvrtcProgram, int, const char* const*))   \
  F(nvrtcResult, nvrtcGetProgramLogSize, (nvrtcProgram, size_t*))                \
  F(nvrtcResult, nvrtcGetProgramLog, (nvrtcProgram, char*))                      \
  F(nvrtcResult, nvrtcGetLoweredName, (nvrtcProgram, const char*, const char**)) \
  F(nvrtcResult, nvrtcGetCUBINSize, (nvrtcProgram, size_t*))                     \
  F(nvrtcResult, nvrtcGetCUBIN, (nvrtcProgram, char*))                           \
  F(nvrtcResult, nvrtcGetPTXSize, (nvrtcProgram, size_t*))                       \
  F(nvrtcResult, nvrtcGetPTX, (nvrtcProgram, char*))

struct Driver {
#define JBAG_DECLARE(result, name, parameters) result(*name) parameters = nullptr;
  JBAG_CUDA_FUNCTIONS(JBAG_DECLARE)
  JBAG_NVRTC_FUNCTIONS(JBAG_DECLARE)
#undef JBAG_DECLARE
};

// The functions of the libraries that were opened last; null before.
const Driver* OpenedDriver();

}  // namespace cuda
}  // namespace jbag

#endif  // JBAG_CUDA_DRIVER_H_
