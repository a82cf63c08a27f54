// The transposed product, and the rows of it that slots name.
//
// Traffic: that of the sorted slots, and the output once.

#ifndef JBAG_KERNELS_TRANSPOSING_H_
#define JBAG_KERNELS_TRANSPOSING_H_

#include <stdint.h>
#include <string.h>

#include "kernels/blocks.h"
#include "kernels/numbers.h"
#include "kernels/rows.h"
#include "kernels/sorting.h"

namespace jbag {
namespace {

// Writes zeros to [first, last), but for what holds them.
inline void Clear(void* first, void* last, const Zeros& zeros) {
  char* from = static_cast<char*>(first);
  char* to = static_cast<char*>(last);
  if (from < to && (from < zeros.first || from >= zeros.last || to > zeros.last)) {
    memset(from, 0, static_cast<size_t>(to - from));
  }
}

// Writes the rows of the transposed product, zeros where no slot names them.
template <typename T>
struct RowWriter {
  const Slots<Sum<T>, int32_t>& slots;
  const Zeros& zeros;
  T* out;

  T* row(int64_t row) const { return out + row * slots.width(); }
  void gap(int64_t first, int64_t last) const { Clear(row(first), row(last), zeros); }
  void whole(int64_t named, int64_t start, int64_t end) const {
    SumOf(slots, start, end, Sum<T>{1}, row(named));
  }
  void joined(int64_t named, const Sum<T>* sums) const {
    Divide(sums, slots.width(), Sum<T>{1}, row(named));
  }
  void passed() const {}
};

template <typename T>
Error SpmmTranspose(Pool& pool, const Matrix& cotangent, const Bags& bags,
                    const Matrix& output) {
  using A = Sum<T>;
  const int64_t width = output.width;
  const int64_t num_rows = output.rows;
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
  if (num_rows == 0 || width == 0) return nullptr;
  Cut cut(width * sizeof(A), width * sizeof(A));
  // A few huge pages each, that few are shared; many tasks, that threads end together.
  cut.task = Max(Clamp(num_rows * row_bytes / 16, 1 << 18, 1 << 22) / row_bytes, 64);
  Bounds bounds;
  if (Error error = bounds.Read(bags)) return error;
  SortedSlots<A> sorted;
  if (Error error = sorted.Sort(pool, bags, bounds, num_rows)) return error;
  const Slots<A, int32_t> slots(cotangent, sorted.transposed(), sorted.size());
  T* out = static_cast<T*>(output.data);
  const Zeros zeros = PreferHugePages(out, num_rows * row_bytes);
  return WalkRuns(pool, sorted, slots, num_rows, cut, [&](int64_t, int64_t to) {
    // Two threads that met on a new page would both have it cleared: the one that two
    // tasks share is cleared at the start of the first, long before either writes it.
    BackHugePage(out, num_rows * row_bytes, out + sorted.RowAt(to) * width);
    return RowWriter<T>{slots, zeros, out};
  });
}

// Writes the rows that slots name, one after the other, and which they are.
template <typename A, typename Id>
struct RowPacker {
  const Slots<A, int32_t>& slots;
  Id* indices;
  A* sums;
  int64_t capacity;
  int64_t place;  // of the next run

  // Where the sums of a row go; null where they are too many.
  A* Place(int64_t row) {
    const int64_t here = place++;
    if (here >= capacity) return nullptr;
    indices[here] = static_cast<Id>(row);
    return sums + here * slots.width();
  }
  void gap(int64_t, int64_t) const {}
  void whole(int64_t row, int64_t start, int64_t end) {
    if (A* out = Place(row)) SumOf(slots, start, end, A{1}, out);
  }
  void joined(int64_t row, const A* joint) {
    if (A* out = Place(row)) Divide(joint, slots.width(), A{1}, out);
  }
  void passed() { ++place; }
};

template <typename A, typename Id>
Error Coalesce(Pool& pool, const Matrix& cotangent, const Bags& bags, int64_t num_rows,
               Id* indices, const Matrix& output) {
  const int64_t width = output.width;
  const int64_t capacity = output.rows;
  const Cut cut(width * sizeof(A), width * sizeof(A));
  A* sums = static_cast<A*>(output.data);
  Bounds bounds;
  if (Error error = bounds.Read(bags)) return error;
  SortedSlots<A> sorted;
  if (num_rows > 0) {
    if (Error error = sorted.Sort(pool, bags, bounds, num_rows)) return error;
  }
  const Zeros zeros =
      PreferHugePages(sums, capacity * width * static_cast<int64_t>(sizeof(A)));
  // Of each task, the runs that start before it.
  const int64_t tasks = NumTasks(sorted.size(), cut);
  Scratch<int64_t> places;
  if (!places.Allocate(tasks + 1)) return kOutOfMemory;
  ParallelFor(pool, tasks, [&](int64_t task) {
    const int64_t from = task * cut.task;
    const int64_t to = Min(from + cut.task, sorted.size());
    int64_t starts = 0;
    for (int64_t i = from; i < to; ++i) {
      starts += i == 0 || sorted.row(i) != sorted.row(i - 1);
    }
    places[task + 1] = starts;
  });
  places[0] = 0;
  for (int64_t task = 0; task < tasks; ++task) places[task + 1] += places[task];
  const Slots<A, int32_t> slots(cotangent, sorted.transposed(), sorted.size());
  const auto begin = [&](int64_t from, int64_t) {
    const int64_t place = places[from / cut.task];
    return RowPacker<A, Id>{slots, indices, sums, capacity, place};
  };
  if (Error error = WalkRuns(pool, sorted, slots, 0, cut, begin)) return error;
  const int64_t filled = Min(places[tasks], capacity);
  ParallelFor(pool, CeilDiv(capacity - filled, cut.task), [&](int64_t task) {
    const int64_t from = filled + task * cut.task;
    const int64_t to = Min(from + cut.task, capacity);
    Fill(indices + from, to - from, static_cast<Id>(num_rows));
    Clear(sums + from * width, sums + to * width, zeros);
  });
  return nullptr;
}

}  // namespace
}  // namespace jbag

#endif  // JBAG_KERNELS_TRANSPOSING_H_
