// What the kernels need of the machine: its instruction set, its threads, its pages.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "kernels/kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1; older C libraries don't name it
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif
#endif

namespace jbag {
namespace {

// Shared by the caller and by the pool's threads, which may come when all is done.
struct Work {
  int64_t count;
  void (*function)(void*, int64_t);
  void* context;  // the caller's: touched only while something is left to do
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
    // The others are at their last task: asleep, the caller would wake too late.
    constexpr int kSpins = 1 << 14;
    for (int spin = 0; spin < kSpins; ++spin) {
      if (done.load(std::memory_order_acquire) == count) return;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
    const auto all = [&] { return done.load(std::memory_order_acquire) == count; };
    std::unique_lock<std::mutex> lock(mutex);
    // GCC 12 takes wait() from a libstdc++ that RHEL 9, with glibc 2.34, doesn't have.
    while (!finished.wait_for(lock, std::chrono::hours(1), all)) {
    }
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

namespace {

// Memory starts with a line that tells its size class: 2^class bytes, or 0 for any.
constexpr int64_t kHeader = 64;
constexpr int kSmallest = 16;
constexpr int kLargest = 24;
constexpr int kEach = 3;
std::atomic<char*> kept[kLargest + 1][kEach];

int SizeClass([[maybe_unused]] int64_t bytes) {
#if !defined(__SANITIZE_ADDRESS__)  // which sees no access beside what is rounded up
  for (int size = kSmallest; size <= kLargest; ++size) {
    if (bytes > (int64_t{1} << size) / 2 && bytes <= int64_t{1} << size) return size;
  }
#endif
  return 0;
}

}  // namespace

void* Borrow(int64_t bytes) {
  bytes += kHeader;
  const int size = SizeClass(bytes);
  char* memory = nullptr;
  for (int i = 0; size > 0 && memory == nullptr && i < kEach; ++i) {
    memory = kept[size][i].exchange(nullptr, std::memory_order_acquire);
  }
  if (memory == nullptr) {
    if (size > 0) bytes = int64_t{1} << size;
    bytes = (bytes + kHeader - 1) / kHeader * kHeader;
    memory = static_cast<char*>(aligned_alloc(kHeader, static_cast<size_t>(bytes)));
    if (memory == nullptr) return nullptr;
    memcpy(memory, &size, sizeof(size));
  }
  return memory + kHeader;
}

void GiveBack(void* data) {
  if (data == nullptr) return;
  char* memory = static_cast<char*>(data) - kHeader;
  int size;
  memcpy(&size, memory, sizeof(size));
  for (int i = 0; size > 0 && memory != nullptr && i < kEach; ++i) {
    memory = kept[size][i].exchange(memory, std::memory_order_acq_rel);
  }
  free(memory);
}

const Loops& BestLoops() {
  static const Loops* best = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512) return Avx512Loops();
    if (avx2) return Avx2Loops();
#endif
    return BaselineLoops();
  }();
  return *best;
}

namespace {

constexpr uintptr_t kHugePage = uintptr_t{1} << 21;

// The whole huge pages of a range of memory.
struct HugePages {
  HugePages(void* data, int64_t bytes) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(data);
    const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
    first = (start + kHugePage - 1) & ~(kHugePage - 1);
    count = first < end ? static_cast<int64_t>((end - first) / kHugePage) : 0;
  }

  char* page(int64_t i) const {
    return reinterpret_cast<char*>(first + static_cast<uintptr_t>(i) * kHugePage);
  }

  // An error means that the system has none to give: the pages stay as they are.
  void Advise([[maybe_unused]] int advice) const {
#if defined(__linux__)
    if (count > 0)
      (void)madvise(page(0), static_cast<size_t>(count) * kHugePage, advice);
#endif
  }

  uintptr_t first;
  int64_t count;
};

#if defined(__linux__)
// Whether the system has put memory behind any of the pages, or doesn't tell.
bool AnyBacked(const HugePages& pages) {
  constexpr int64_t kAtOnce = 16;
  const size_t page_size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (page_size < 4096 || page_size > kHugePage) return true;
  unsigned char backed[kAtOnce * kHugePage / 4096];
  for (int64_t i = 0; i < pages.count; i += kAtOnce) {
    const int64_t some = pages.count - i < kAtOnce ? pages.count - i : kAtOnce;
    const size_t bytes = static_cast<size_t>(some) * kHugePage;
    if (mincore(pages.page(i), bytes, backed) != 0) return true;
    for (size_t page = 0; page < bytes / page_size; ++page) {
      if (backed[page] & 1) return true;
    }
  }
  return false;
}
#endif

}  // namespace

#if defined(__linux__)
Zeros PreferHugePages(void* data, int64_t bytes) {
  const HugePages pages(data, bytes);
  if (pages.count == 0) return {nullptr, nullptr};
  pages.Advise(MADV_HUGEPAGE);
  const char* first = pages.page(0);
  const char* last = pages.page(pages.count);
  if (AnyBacked(pages)) return {nullptr, nullptr};
  // They may be out on a swap device: forget those.
  const size_t size = static_cast<size_t>(last - first);
  if (madvise(pages.page(0), size, MADV_DONTNEED) != 0) return {nullptr, nullptr};
  return {first, last};
}

void BackHugePage(void* data, int64_t bytes, const void* place) {
  HugePages page(data, bytes);
  const uintptr_t offset = reinterpret_cast<uintptr_t>(place) - page.first;
  const int64_t which = static_cast<int64_t>(offset / kHugePage);
  if (which >= page.count) return;
  page.first += which * kHugePage;
  page.count = 1;
  page.Advise(MADV_POPULATE_WRITE);
}
#else
Zeros PreferHugePages(void*, int64_t) { return {nullptr, nullptr}; }
void BackHugePage(void*, int64_t, const void*) {}
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
  HugePages(to, bytes).Advise(MADV_COLLAPSE);
#endif
}

}  // namespace jbag
