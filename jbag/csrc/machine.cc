// What the kernels need of the machine: its instruction set, its threads, its
// pages.

#include <stdint.h>
#include <string.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1; older C libraries don't name it
#endif
#endif

namespace jbag {
namespace {

// Shared by the caller and by the pool's threads, which may come when all is
// done.
struct Work {
  int64_t count;
  void (*function)(void*, int64_t);
  void* context;  // the caller's: touched only while there is something left to
                  // do
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::mutex mutex;
  std::condition_variable finished;

  void Run() {
    int64_t ran = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; ++ran) {
      function(context, i);
    }
    if (ran == 0) return;
    if (done.fetch_add(ran, std::memory_order_acq_rel) + ran == count) {
      std::lock_guard<std::mutex> lock(mutex);
      finished.notify_all();
    }
  }

  void Wait() {
    // The others are at their last task: asleep, the caller would wake too
    // late.
    constexpr int kSpins = 1 << 14;
    for (int spin = 0; spin < kSpins; ++spin) {
      if (done.load(std::memory_order_acquire) == count) return;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [&] { return done.load(std::memory_order_acquire) == count; });
  }
};

}  // namespace

void ParallelFor(Pool& pool, int64_t count, void (*function)(void*, int64_t),
                 void* context) {
  const int64_t threads = pool.num_threads();
  if (count <= 1 || threads <= 1) {
    for (int64_t i = 0; i < count; ++i) function(context, i);
    return;
  }
  auto work = std::make_shared<Work>();
  work->count = count;
  work->function = function;
  work->context = context;
  for (int64_t helper = 1; helper < threads && helper < count; ++helper) {
    pool.Schedule(
        [](void* data) {
          auto* shared = static_cast<std::shared_ptr<Work>*>(data);
          (*shared)->Run();
          delete shared;
        },
        new std::shared_ptr<Work>(work));
  }
  work->Run();
  work->Wait();
}

const Kernels& BestKernels() {
  static const Kernels* best = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512) return Avx512Kernels();
    if (avx2) return Avx2Kernels();
#endif
    return BaselineKernels();
  }();
  return *best;
}

#if defined(__linux__)
namespace {

// Calls madvise on the whole huge pages of a range.
void AdviseHugePages(void* data, int64_t bytes, int advice) {
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (start + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (first >= last) return;
  // An error means that the system has none to give: the pages stay as they
  // are.
  (void)madvise(reinterpret_cast<void*>(first), last - first, advice);
}

}  // namespace

void PreferHugePages(void* data, int64_t bytes) {
  AdviseHugePages(data, bytes, MADV_HUGEPAGE);
}
#else
void PreferHugePages(void*, int64_t) {}
#endif

void CopyToHugePages(Pool& pool, const void* from, void* to, int64_t bytes) {
  constexpr int64_t kPart = int64_t{1} << 21;
  PreferHugePages(to, bytes);
  ParallelFor(pool, (bytes + kPart - 1) / kPart, [&](int64_t part) {
    const int64_t start = part * kPart;
    const int64_t size = bytes - start < kPart ? bytes - start : kPart;
    memcpy(static_cast<char*>(to) + start, static_cast<const char*>(from) + start,
           static_cast<size_t>(size));
  });
#if defined(__linux__)
  // What the allocator had used before was on small pages already.
  AdviseHugePages(to, bytes, MADV_COLLAPSE);
#endif
}

}  // namespace jbag
