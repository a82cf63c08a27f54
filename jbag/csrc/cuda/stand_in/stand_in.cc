// A library in place of libcuda.so.1 and NVRTC, for tests on a machine without a GPU.
//
// NVRTC's part compiles the device code by the C++ compiler that built this library,
// with execution_model.h before it, and keeps what it compiled in a directory. Device
// memory is the process's memory; streams do their work at once.

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/driver.h"

extern char** environ;

namespace {

using jbag::cuda::CUcontext;
using jbag::cuda::CUdevice;
using jbag::cuda::CUdeviceptr;
using jbag::cuda::CUfunction;
using jbag::cuda::CUmodule;
using jbag::cuda::CUresult;
using jbag::cuda::CUstream;
using jbag::cuda::nvrtcProgram;
using jbag::cuda::nvrtcResult;

constexpr CUresult kFailed = 999;        // CUDA_ERROR_UNKNOWN
constexpr nvrtcResult kCompilation = 6;  // NVRTC_ERROR_COMPILATION
constexpr int kCapability = 90;

struct Program {
  std::string source;
  std::vector<std::string> kernels;
  std::map<std::string, std::string> symbols;
  std::string library;  // its path is the machine code
  std::string log;
};

Program* Of(nvrtcProgram program) { return reinterpret_cast<Program*>(program); }

std::string Read(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// Runs the compiler; its messages go to a file.
bool Execute(const std::vector<std::string>& command, const std::string& messages) {
  std::vector<char*> arguments;
  for (const std::string& one : command) {
    arguments.push_back(const_cast<char*>(one.c_str()));
  }
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 2, messages.c_str(),
                                   O_WRONLY | O_CREAT | O_TRUNC, 0600);
  // A sanitizer's runtime that is loaded before Python is none for the compiler.
  std::vector<char*> environment;
  for (char** one = environ; *one != nullptr; ++one) {
    if (strncmp(*one, "LD_PRELOAD=", 11) != 0) environment.push_back(*one);
  }
  environment.push_back(nullptr);
  pid_t child = 0;
  const int error = posix_spawnp(&child, arguments[0], &actions, nullptr,
                                 arguments.data(), environment.data());
  posix_spawn_file_actions_destroy(&actions);
  int status = 1;
  return error == 0 && waitpid(child, &status, 0) == child && status == 0;
}

nvrtcResult Compile(Program* program) {
  std::string text = "#include \"" JBAG_EXECUTION_MODEL "\"\n" + program->source;
  for (size_t i = 0; i < program->kernels.size(); ++i) {
    const std::string symbol = "kernel_" + std::to_string(i);
    program->symbols[program->kernels[i]] = symbol;
    text += "extern \"C\" void " + symbol +
            "(void** arguments, dim3 grid, dim3 threads) {\n  stand_in::Launch(&" +
            program->kernels[i] + ", arguments, grid, threads);\n}\n";
  }
  const char* temporary = getenv("TMPDIR");
  const std::string directory = std::string(temporary != nullptr ? temporary : "/tmp") +
                                "/jbag_cuda_stand_in." + std::to_string(getuid());
  mkdir(directory.c_str(), 0700);
  const size_t hash = std::hash<std::string>{}(text + Read(JBAG_EXECUTION_MODEL) +
                                               JBAG_COMPILER JBAG_COMPILER_FLAGS);
  const std::string name = directory + "/" + std::to_string(hash);
  program->library = name + ".so";
  struct stat status;
  if (stat(program->library.c_str(), &status) == 0) return 0;

  const std::string own = name + "." + std::to_string(getpid());
  std::ofstream(own + ".cc") << text;
  std::vector<std::string> command = {JBAG_COMPILER};
  std::stringstream flags(JBAG_COMPILER_FLAGS);
  for (std::string flag; flags >> flag;) command.push_back(flag);
  for (const std::string& one : {own + ".cc", std::string("-o"), own + ".so"}) {
    command.push_back(one);
  }
  const bool compiled = Execute(command, own + ".log");
  program->log = Read(own + ".log");
  unlink((own + ".log").c_str());
  unlink((own + ".cc").c_str());
  if (!compiled) return kCompilation;
  return rename((own + ".so").c_str(), program->library.c_str()) == 0 ? 0
                                                                      : kCompilation;
}

int num_modules = 0;

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// The modules that were loaded.
int jbag_cuda_stand_in_modules() {
  return __atomic_load_n(&num_modules, __ATOMIC_RELAXED);
}

CUresult cuInit(unsigned) { return 0; }
CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "the stand-in failed";
  return 0;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return 0;
}
CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice) {
  *value = attribute == jbag::cuda::kComputeCapabilityMajor ? kCapability / 10
                                                            : kCapability % 10;
  return 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = reinterpret_cast<CUcontext>(static_cast<intptr_t>(device) + 1);
  return 0;
}
CUresult cuCtxPushCurrent_v2(CUcontext) { return 0; }
CUresult cuCtxPopCurrent_v2(CUcontext*) { return 0; }
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  void* library = dlopen(static_cast<const char*>(image), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) fprintf(stderr, "CUDA stand-in: %s\n", dlerror());
  *module = static_cast<CUmodule>(library);
  __atomic_add_fetch(&num_modules, 1, __ATOMIC_RELAXED);
  return library == nullptr ? kFailed : 0;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = static_cast<CUfunction>(dlsym(module, name));
  return *function == nullptr ? kFailed : 0;
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, CUstream) {
  memset(reinterpret_cast<void*>(to), value, size);
  return 0;
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream) {
  memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), size);
  return 0;
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z,
                        unsigned threads, unsigned, unsigned, unsigned, CUstream,
                        void** arguments, void**) {
  struct Size {
    unsigned x, y, z;
  };
  const Size grid{x, y, z};
  const Size block{threads, 1, 1};
  reinterpret_cast<void (*)(void**, Size, Size)>(function)(arguments, grid, block);
  return 0;
}

const char* nvrtcGetErrorString(nvrtcResult) { return "the C++ compiler failed"; }
nvrtcResult nvrtcGetNumSupportedArchs(int* count) {
  *count = 1;
  return 0;
}
nvrtcResult nvrtcGetSupportedArchs(int* architectures) {
  *architectures = kCapability;
  return 0;
}
nvrtcResult nvrtcCreateProgram(nvrtcProgram* program, const char* source, const char*,
                               int, const char* const*, const char* const*) {
  *program = reinterpret_cast<nvrtcProgram>(new Program{source, {}, {}, {}, {}});
  return 0;
}
nvrtcResult nvrtcDestroyProgram(nvrtcProgram* program) {
  delete Of(*program);
  return 0;
}
nvrtcResult nvrtcAddNameExpression(nvrtcProgram program, const char* name) {
  Of(program)->kernels.push_back(name);
  return 0;
}
nvrtcResult nvrtcCompileProgram(nvrtcProgram program, int, const char* const*) {
  return Compile(Of(program));
}
nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram program, size_t* size) {
  *size = Of(program)->log.size() + 1;
  return 0;
}
nvrtcResult nvrtcGetProgramLog(nvrtcProgram program, char* log) {
  memcpy(log, Of(program)->log.c_str(), Of(program)->log.size() + 1);
  return 0;
}
nvrtcResult nvrtcGetLoweredName(nvrtcProgram program, const char* name,
                                const char** symbol) {
  *symbol = Of(program)->symbols[name].c_str();
  return 0;
}
nvrtcResult nvrtcGetCUBINSize(nvrtcProgram program, size_t* size) {
  *size = Of(program)->library.size() + 1;
  return 0;
}
nvrtcResult nvrtcGetCUBIN(nvrtcProgram program, char* code) {
  memcpy(code, Of(program)->library.c_str(), Of(program)->library.size() + 1);
  return 0;
}
nvrtcResult nvrtcGetPTXSize(nvrtcProgram, size_t*) { return kFailed; }
nvrtcResult nvrtcGetPTX(nvrtcProgram, char*) { return kFailed; }

}  // extern "C"
#pragma GCC visibility pop
