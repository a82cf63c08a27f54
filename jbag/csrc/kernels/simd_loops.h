// The loops over features: functions that are compiled once for each instruction set
// and each type of rows. The code that divides bags among threads is compiled once, and
// calls a loop for many segments of slots at a time.
//
// Sums are float for float32 and 16-bit rows, double for float64.

#ifndef JBAG_KERNELS_SIMD_LOOPS_H_
#define JBAG_KERNELS_SIMD_LOOPS_H_

#include <stdint.h>

#include "kernels/gathered_rows.h"
#include "kernels/kernels.h"

namespace jbag {

// Segment i of `count` is the slots [starts[i], ends[i]).
struct Segments {
  const int32_t* starts;
  const int32_t* ends;
  int64_t count;
};

// Moves row `row` of a table and of its states; its gradient is `scale` (one number)
// times the `gradient` given, both of the type of sums.
using MoveRow = void (*)(const Matrix& table, const Update&, int64_t row,
                         const void* gradient, const void* scale);

// Loops over rows of one type.
struct RowLoops {
  // Writes the average of each segment's rows times their coefficients to a row of
  // `out`. Its type is that of the rows, or that of their sums.
  // Segment i goes to row i, or to row places[starts[i]] unless `places` is null.
  void (*sum)(const SlotRows&, const Segments&, Average, const int32_t* places,
              Type out_type, void* out);
  // Writes the largest (or smallest) of each segment's rows times their coefficients to
  // row i of `values`, of the type of sums, and the first slots that hold them to
  // `winners`: zeros and `none` if all slots are empty.
  void (*extremum)(const SlotRows&, const Segments&, bool largest, int32_t none,
                   void* values, int32_t* winners);
  // Writes, for each slot in [first, last) of the segments, the dot product of its row
  // with row i of `bag_rows`, of the type of sums; zero where the slot is empty.
  void (*dots)(const SlotRows&, const Segments&, int64_t first, int64_t last,
               const void* bag_rows, void* out);
  // What moves a row of a table of this type.
  MoveRow (*mover)(Rule, bool at_random);
};

// Loops over sums of one type.
struct SumLoops {
  // sums[i] += more[i].
  void (*add)(void* sums, const void* more, int64_t width);
  // out = the average of `count` rows whose sum is given, rounded once.
  void (*average)(const void* sums, int64_t width, Average, int64_t count,
                  Type out_type, void* out);
};

struct Loops {
  const char* instruction_set;
  RowLoops rows[kNumTypes];
  SumLoops sums[kNumTypes];  // those of float32 and float64 alone
  // Narrows 64-bit ids: `empty` (where there is one) becomes kNarrowEmpty and every
  // other id outside [0, num_rows) kNarrowOutOfRange.
  void (*narrow)(const int64_t* from, int64_t size, int64_t num_rows, bool has_empty,
                 int64_t empty, int32_t* to);

  const RowLoops& over(Type rows_type) const {
    return rows[static_cast<int>(rows_type)];
  }
  const SumLoops& over_sums(Type rows_type) const {
    return sums[static_cast<int>(SumType(rows_type))];
  }
};

constexpr int32_t kNarrowEmpty = -1;
constexpr int32_t kNarrowOutOfRange = -2;

}  // namespace jbag

#endif  // JBAG_KERNELS_SIMD_LOOPS_H_
