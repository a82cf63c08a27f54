// The part of CUDA's execution model that the kernels use, on one thread of a CPU.
//
// The threads of a block run one after another, on one fiber. A thread that waits for
// others, in a warp's shuffle, keeps that fiber; the threads after it go on on another
// one. A kernel without shuffles is thus a loop. It finds wrong results, threads that
// wait for ever and, with AddressSanitizer, accesses out of bounds; it doesn't find
// data races or unaligned vectors.

#ifndef JBAG_CUDA_STAND_IN_EXECUTION_MODEL_H_
#define JBAG_CUDA_STAND_IN_EXECUTION_MODEL_H_

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

namespace stand_in {

constexpr int kWarp = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackSize]};
  bool is_free = true;

  static constexpr size_t kStackSize = 1 << 16;
};

// What a thread gave to the operations of its warp. Two of them in turn: a thread can
// be at most one operation ahead of another that has not read the last one yet.
struct Lane {
  unsigned long long posted[2];
  unsigned operations = 0;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Lane> lanes;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  unsigned next_thread = 0;
  unsigned num_threads = 0;
  unsigned waits = 0;  // that ended or began in a round of the scheduler
  void (*body)(void*) = nullptr;
  void* context = nullptr;
};

inline thread_local Block block;
inline thread_local dim3 grid_size, block_size, block_index, thread_index;

// Runs threads that no fiber has begun until none is left.
inline void RunThreads() {
  while (block.next_thread < block.num_threads) {
    thread_index = {block.next_thread++, 0, 0};
    block.body(block.context);
    ++block.waits;
  }
  block.current->is_free = true;
  swapcontext(&block.current->context, &block.scheduler);
}

inline void Start(Fiber* fiber) {
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = Fiber::kStackSize;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, RunThreads, 0);
  fiber->is_free = false;
  block.current = fiber;
  swapcontext(&block.scheduler, &fiber->context);
}

// Lets the other threads go on; returns when this one's turn comes again.
inline void Wait() {
  Fiber* const fiber = block.current;
  const dim3 index = thread_index;
  swapcontext(&fiber->context, &block.scheduler);
  thread_index = index;
}

inline void RunBlock() {
  block.lanes.assign(block.num_threads, Lane{});
  block.next_thread = 0;
  for (;;) {
    block.waits = 0;
    bool any = false;
    for (size_t i = 0; i < block.fibers.size(); ++i) {
      if (block.fibers[i]->is_free) continue;
      any = true;
      block.current = block.fibers[i].get();
      swapcontext(&block.scheduler, &block.current->context);
    }
    while (block.next_thread < block.num_threads) {
      any = true;
      Fiber* free = nullptr;
      for (auto& fiber : block.fibers) {
        if (fiber->is_free) free = fiber.get();
      }
      if (free == nullptr) {
        block.fibers.push_back(std::make_unique<Fiber>());
        free = block.fibers.back().get();
      }
      ++block.waits;
      Start(free);
    }
    if (!any) return;
    if (block.waits == 0) {
      fprintf(stderr,
              "CUDA stand-in: threads of a warp wait for each other for ever\n");
      abort();
    }
  }
}

// Posts a value and waits until all threads of the mask have posted theirs; calls
// read(value of a lane) for what they posted.
template <typename T>
class Exchange {
 public:
  Exchange(unsigned mask, T value)
      : first_(thread_index.x / kWarp * kWarp), mask_(mask) {
    static_assert(sizeof(T) <= sizeof(unsigned long long), "a register or two");
    Lane& own = block.lanes[thread_index.x];
    slot_ = own.operations % 2;
    memcpy(&own.posted[slot_], &value, sizeof(T));
    const unsigned operation = ++own.operations;
    ++block.waits;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      if (first_ + lane >= block.num_threads) {
        fprintf(stderr, "CUDA stand-in: a mask names a thread that there is not\n");
        abort();
      }
      while (block.lanes[first_ + lane].operations < operation) Wait();
    }
    ++block.waits;
  }
  T operator[](unsigned lane) const {
    if ((mask_ >> lane & 1) == 0) {
      fprintf(stderr, "CUDA stand-in: a shuffle reads a lane outside its mask\n");
      abort();
    }
    T value;
    memcpy(&value, &block.lanes[first_ + lane].posted[slot_], sizeof(T));
    return value;
  }

 private:
  unsigned first_;
  unsigned mask_;
  unsigned slot_ = 0;
};

inline unsigned LaneIndex() { return thread_index.x % kWarp; }

// Launches a kernel whose arguments lie behind pointers, as cuLaunchKernel gets them.
template <typename... Arguments, size_t... kIndices>
void Launch(void (*kernel)(Arguments...), void** arguments, dim3 grid, dim3 threads,
            std::index_sequence<kIndices...>) {
  auto call = [&] { kernel(*static_cast<Arguments*>(arguments[kIndices])...); };
  grid_size = grid;
  block_size = threads;
  block.num_threads = threads.x;
  block.body = [](void* context) { (*static_cast<decltype(call)*>(context))(); };
  block.context = &call;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      block_index = {x, y, 0};
      RunBlock();
    }
  }
}
template <typename... Arguments>
void Launch(void (*kernel)(Arguments...), void** arguments, dim3 grid, dim3 threads) {
  Launch(kernel, arguments, grid, threads, std::index_sequence_for<Arguments...>{});
}

}  // namespace stand_in

#define gridDim stand_in::grid_size
#define blockDim stand_in::block_size
#define blockIdx stand_in::block_index
#define threadIdx stand_in::thread_index

using std::sqrt;

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return stand_in::Exchange<T>(mask, value)[static_cast<unsigned>(lane) % 32];
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  const unsigned lane = stand_in::LaneIndex() ^ static_cast<unsigned>(lanes);
  return stand_in::Exchange<T>(mask, value)[lane];
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  const stand_in::Exchange<T> exchange(mask, value);
  const unsigned lane = stand_in::LaneIndex();
  const unsigned step = static_cast<unsigned>(lanes);
  return lane < step ? value : exchange[lane - step];
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const stand_in::Exchange<bool> exchange(mask, predicate);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0 && exchange[lane]) votes |= 1u << lane;
  }
  return votes;
}
inline void __syncwarp(unsigned mask) { stand_in::Exchange<bool>(mask, true); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// Half precision, rounded to nearest even.
inline float HalfToFloat(unsigned short bits) {
  const unsigned sign = static_cast<unsigned>(bits & 0x8000) << 16;
  const unsigned exponent = bits >> 10 & 31;
  const unsigned fraction = bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) {
    const float x = std::ldexp(static_cast<float>(fraction), -24);
    return sign != 0 ? -x : x;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
inline unsigned short FloatToHalf(float x) {
  const unsigned bits = __float_as_uint(x);
  const unsigned sign = bits >> 16 & 0x8000;
  const float magnitude = std::fabs(x);
  unsigned half;
  if (x != x) {
    half = 0x7e00;
  } else if (magnitude >= 65520) {
    half = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    half = static_cast<unsigned>(std::nearbyint(magnitude * 0x1p24f));
  } else {
    const unsigned own = bits & 0x7fffffff;
    half = (own - 0x38000000 + 0xfff + (own >> 13 & 1)) >> 13;
  }
  return static_cast<unsigned short>(sign | half);
}

#endif  // JBAG_CUDA_STAND_IN_EXECUTION_MODEL_H_
