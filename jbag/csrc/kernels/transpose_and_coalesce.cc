// The operations spmm_transpose, and coalesce: the rows of it that slots name.
//
// Traffic: that of the sorted slots, and the output once.

#include <stdint.h>
#include <string.h>

#include "kernels/bags.h"
#include "kernels/gathered_rows.h"
#include "kernels/integer_math.h"
#include "kernels/kernels.h"
#include "kernels/simd_loops.h"
#include "kernels/sorting.h"

namespace jbag {
namespace {

// Writes zeros to [first, last), but for what holds them.
void Clear(void* first, void* last, const Zeros& zeros) {
  char* from = static_cast<char*>(first);
  char* to = static_cast<char*>(last);
  if (from < to && (from < zeros.first || from >= zeros.last || to > zeros.last)) {
    memset(from, 0, static_cast<size_t>(to - from));
  }
}

// Writes the rows of the transposed product, zeros where no slot names them.
struct RowWriter {
  const RowLoops& loops;
  const SumLoops& sum_loops;
  const SortedSlots& sorted;
  const Slots& slots;
  const Zeros& zeros;
  const Matrix& output;
  Runs runs;

  char* row(int64_t row) const {
    return static_cast<char*>(output.data) + row * output.width * SizeOf(output.type);
  }
  void gap(int64_t first, int64_t last) const { Clear(row(first), row(last), zeros); }
  void whole(int64_t, int64_t start, int64_t end) {
    if (runs.count() == Runs::kMost) finish();
    runs.Add(start, end);
  }
  void joined(int64_t named, const void* sums) const {
    sum_loops.average(sums, output.width, Average::kNone, 1, output.type, row(named));
  }
  void passed() const {}
  void finish() {
    if (runs.count() > 0) {
      loops.sum(slots, runs.segments(), Average::kNone, sorted.rows(), output.type,
                output.data);
    }
    runs.Clear();
  }
};

// Writes the rows that slots name, one after the other, and which they are.
struct RowPacker {
  const RowLoops& loops;
  const SumLoops& sum_loops;
  const Slots& slots;
  const Integers& indices;  // written
  const Matrix& output;
  int64_t place;  // of the next run
  Runs runs;      // those before it

  char* row(int64_t place) const {
    return static_cast<char*>(output.data) + place * slots.stride;
  }
  // Writes a row's number at the next place; whether there is one.
  bool Put(int64_t row) {
    if (place >= output.rows) return false;
    void* numbers = const_cast<void*>(indices.data);
    if (indices.is_64_bit) {
      static_cast<int64_t*>(numbers)[place] = row;
    } else {
      static_cast<int32_t*>(numbers)[place] = static_cast<int32_t>(row);
    }
    ++place;
    return true;
  }
  void gap(int64_t, int64_t) const {}
  void whole(int64_t row, int64_t start, int64_t end) {
    if (runs.count() == Runs::kMost) finish();
    if (Put(row)) runs.Add(start, end);
  }
  void joined(int64_t named, const void* sums) {
    if (!Put(named)) return;
    sum_loops.average(sums, slots.width, Average::kNone, 1, output.type,
                      row(place - 1));
  }
  void passed() {
    finish();
    ++place;
  }
  void finish() {
    if (runs.count() > 0) {
      loops.sum(slots, runs.segments(), Average::kNone, nullptr, output.type,
                row(place - runs.count()));
    }
    runs.Clear();
  }
};

}  // namespace

Error SpmmTranspose(const Loops& loops, Pool& pool, const Matrix& cotangent,
                    const Bags& bags, const Matrix& output) {
  const int64_t width = output.width;
  const int64_t num_rows = output.rows;
  const int64_t row_bytes = width * SizeOf(output.type);
  if (num_rows == 0 || width == 0) return nullptr;
  Cut cut(width * SizeOf(cotangent.type), width * SizeOf(cotangent.type));
  // A few huge pages each, that few are shared; many tasks, that threads end together.
  cut.task = Max(Clamp(num_rows * row_bytes / 16, 1 << 18, 1 << 22) / row_bytes, 64);
  BagIds ids;
  Bounds bounds;
  SortedSlots sorted;
  if (Error error = bounds.Read(bags)) return error;
  if (Error error = ids.Read(loops, pool, bags, num_rows)) return error;
  if (Error error = sorted.Sort(pool, bags, *ids, bounds, num_rows, cotangent.type)) {
    return error;
  }
  const Slots slots(sorted.Over(cotangent));
  char* out = static_cast<char*>(output.data);
  const Zeros zeros = PreferHugePages(out, num_rows * row_bytes);
  const auto begin = [&](int64_t, int64_t to) {
    // Two threads that met on a new page would both have it cleared: the one that two
    // tasks share is cleared at the start of the first, long before either writes it.
    BackHugePage(out, num_rows * row_bytes, out + sorted.RowAt(to) * row_bytes);
    return RowWriter{loops.over(cotangent.type),
                     loops.over_sums(cotangent.type),
                     sorted,
                     slots,
                     zeros,
                     output,
                     {}};
  };
  return WalkRuns(loops, pool, sorted, cotangent, num_rows, cut, begin);
}

Error Coalesce(const Loops& loops, Pool& pool, const Matrix& cotangent,
               const Bags& bags, int64_t num_rows, void* indices,
               const Matrix& output) {
  const int64_t width = output.width;
  const int64_t capacity = output.rows;
  const int64_t row_bytes = width * SizeOf(output.type);
  const Cut cut(row_bytes, row_bytes);
  char* sums = static_cast<char*>(output.data);
  BagIds ids;
  Bounds bounds;
  SortedSlots sorted;
  if (Error error = bounds.Read(bags)) return error;
  if (num_rows > 0) {
    if (Error error = ids.Read(loops, pool, bags, num_rows)) return error;
    if (Error error = sorted.Sort(pool, bags, *ids, bounds, num_rows, output.type)) {
      return error;
    }
  }
  const Zeros zeros = PreferHugePages(sums, capacity * row_bytes);
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
  const Slots slots(sorted.Over(cotangent));
  const Integers rows = {indices, bags.ids.is_64_bit, capacity};
  const auto begin = [&](int64_t from, int64_t) {
    return RowPacker{loops.over(cotangent.type),
                     loops.over_sums(cotangent.type),
                     slots,
                     rows,
                     output,
                     places[from / cut.task],
                     {}};
  };
  if (Error error = WalkRuns(loops, pool, sorted, cotangent, 0, cut, begin)) {
    return error;
  }
  const int64_t filled = Min(places[tasks], capacity);
  ParallelFor(pool, CeilDiv(capacity - filled, cut.task), [&](int64_t task) {
    const int64_t from = filled + task * cut.task;
    const int64_t to = Min(from + cut.task, capacity);
    for (int64_t i = from; i < to; ++i) {
      if (rows.is_64_bit) {
        static_cast<int64_t*>(indices)[i] = num_rows;
      } else {
        static_cast<int32_t*>(indices)[i] = static_cast<int32_t>(num_rows);
      }
    }
    Clear(sums + from * row_bytes, sums + to * row_bytes, zeros);
  });
  return nullptr;
}

}  // namespace jbag
