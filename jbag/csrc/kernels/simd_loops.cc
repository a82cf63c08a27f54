// The loops for one instruction set: this file is compiled once for each, with the
// compiler's flags for it and JBAG_LOOPS, the name of the function that returns them.
//
// No header of the C++ library with inline functions may come in here: the linker keeps
// one copy of such a function, and it could be the one that this machine can't run.

#include "kernels/simd_loops.h"

#include <stdint.h>
#include <string.h>

#include "kernels/reductions.h"
#include "kernels/row_updates.h"

namespace jbag {
namespace {

template <int kLanes>
void Narrow(const int64_t* from, int64_t size, int64_t num_rows, bool has_empty,
            int64_t empty, int32_t* to) {
  // By the halves of each id: SSE2 does not compare 64-bit numbers.
  using V = Vector<int32_t, kLanes>;
  const V rows = static_cast<int32_t>(num_rows) + V{};
  const V empty_low = static_cast<int32_t>(empty) + V{};
  const V empty_high = static_cast<int32_t>(empty >> 32) + V{};
  const V none = kNarrowOutOfRange + V{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    V first, second, low, high;
    memcpy(&first, from + i, sizeof(first));
    memcpy(&second, from + i + kLanes / 2, sizeof(second));
    if constexpr (kLanes == 4) {
      low = __builtin_shufflevector(first, second, 0, 2, 4, 6);
      high = __builtin_shufflevector(first, second, 1, 3, 5, 7);
    } else {
      low = __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14);
      high = __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15);
    }
    V named = Choose((high == V{}) & (low >= V{}) & (low < rows), low, none);
    if (has_empty) {
      named =
          Choose((low == empty_low) & (high == empty_high), kNarrowEmpty + V{}, named);
    }
    memcpy(to + i, &named, sizeof(named));
  }
  for (; i < size; ++i) {
    const int64_t id = from[i];
    const bool is_row = id >= 0 && id < num_rows;
    to[i] = has_empty && id == empty ? kNarrowEmpty
            : is_row                 ? static_cast<int32_t>(id)
                                     : kNarrowOutOfRange;
  }
}

constexpr char kInstructionSet[] =
#if defined(__AVX512F__)
    "AVX-512";
#elif defined(__AVX2__)
    "AVX2";
#else
    "baseline";
#endif

template <typename Row>
constexpr RowLoops kRowLoops = {SumRows<Row>, Extremes<Row>, Dots<Row>, MoverOf<Row>};

template <typename A>
constexpr SumLoops kSumLoops = {AddSums<A>, AverageSums<A>};

constexpr Loops kLoops = {
    kInstructionSet,
    {kRowLoops<float>, kRowLoops<double>, kRowLoops<BFloat16>, kRowLoops<Float16>},
    {kSumLoops<float>, kSumLoops<double>, {}, {}},
    Narrow < kVectorBytes < 32 ? 4 : 8 >,
};

}  // namespace

const Loops* JBAG_LOOPS() { return &kLoops; }

}  // namespace jbag
