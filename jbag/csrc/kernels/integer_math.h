// Arithmetic of sizes, and a search over them.

#ifndef JBAG_KERNELS_INTEGER_MATH_H_
#define JBAG_KERNELS_INTEGER_MATH_H_

#include <stdint.h>

namespace jbag {
namespace {

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t Clamp(int64_t x, int64_t low, int64_t high) {
  return Max(low, Min(x, high));
}
inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest i in [low, high) for which `holds`, which stays true once it is; or
// high.
template <typename Predicate>
inline int64_t FirstWhere(int64_t low, int64_t high, Predicate holds) {
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (holds(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace
}  // namespace jbag

#endif  // JBAG_KERNELS_INTEGER_MATH_H_
