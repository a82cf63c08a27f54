// Moves the rows of a table that slots name by a rule, in place.
//
// A row's gradient is the sum over its run of sorted slots, in cache; mostly one slot
// names a row, and its gradient is where the cotangent has it.
//
// Traffic: that of the sorted slots; of the table and each state the rows that slots
// name, once in and once out, fetched some runs ahead. They come in order.

#include <stdint.h>

#include "kernels/bags.h"
#include "kernels/gathered_rows.h"
#include "kernels/integer_math.h"
#include "kernels/kernels.h"
#include "kernels/simd_loops.h"
#include "kernels/sorting.h"

namespace jbag {
namespace {

// What is read and written where a row moves.
class MovingRows {
 public:
  MovingRows(const Matrix& table, int64_t number, const Update& update, int64_t sum) {
    const RuleShape shape = ShapeOf(update.rule);
    Add(table.data, table.width * number);
    for (int i = 0; i < shape.per_element + shape.per_row; ++i) {
      Add(update.states[i], i < shape.per_element ? table.width * sum : sum);
    }
    if (update.steps != nullptr) Add(update.steps, sizeof(int32_t));
    int64_t bytes = 0;
    for (int i = 0; i < size_; ++i) bytes += parts_[i].bytes;
    ahead_ = Clamp(kBytesAhead / Max(bytes, 1), 8, 32);
  }

  // Inlined by force: see Prefetch.
  __attribute__((always_inline)) void Fetch(int64_t row) const {
    for (int i = 0; i < size_; ++i) {
      const int64_t bytes = parts_[i].bytes;
      const char* from = parts_[i].first + row * bytes;
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 1);
      __builtin_prefetch(from + bytes - 1, 1);
    }
  }

  // How many rows ahead of the one that moves are fetched.
  int64_t ahead() const { return ahead_; }

 private:
  static constexpr int64_t kBytesAhead = 1 << 13;

  struct Part {
    const char* first;
    int64_t bytes;  // a row
  };

  void Add(const void* first, int64_t bytes) {
    if (bytes > 0) parts_[size_++] = {static_cast<const char*>(first), bytes};
  }

  Part parts_[4];
  int size_ = 0;
  int64_t ahead_;
};

// The gradients of some rows, which stay in the first-level cache.
constexpr int64_t kScratchBytes = 1 << 11;

// Moves the rows of runs.
struct RunMover {
  const RowLoops& loops;
  const SortedSlots& sorted;
  const Slots& slots;
  const Matrix& table;
  const Type sums;
  const Update& update;
  const MovingRows& rows;
  const MoveRow move;
  const bool catches_up;
  char* gradients;  // scratch: rows
  int64_t most;     // of them
  Runs runs;        // of several slots, not summed yet

  void gap(int64_t, int64_t) const {}
  void whole(int64_t row, int64_t start, int64_t end) {
    FetchAhead(start, end);
    if (catches_up) {
      move(table, update, row, nullptr, nullptr);
    } else if (end - start == 1) {
      slots.FetchAhead(start);
      move(table, update, row, slots.row<char>(start),
           slots.coefficient(start, SizeOf(sums)));
    } else {
      runs.Add(start, end);
      if (runs.count() == most) finish();
    }
  }
  // Fetches the rows of the table that are named some slots after [start, end). Inlined
  // by force: see Prefetch.
  __attribute__((always_inline)) void FetchAhead(int64_t start, int64_t end) const {
    const int64_t last = Min(end + rows.ahead(), sorted.size());
    for (int64_t slot = Max(start, end - rows.ahead()) + rows.ahead(); slot < last;
         ++slot) {
      if (sorted.row(slot) != sorted.row(slot - 1)) rows.Fetch(sorted.row(slot));
    }
  }
  void joined(int64_t row, const void* sum) const {
    constexpr float kOne = 1;
    constexpr double kOneDouble = 1;
    const bool is_double = sums == Type::kFloat64;
    move(table, update, row, sum,
         is_double ? static_cast<const void*>(&kOneDouble) : &kOne);
  }
  void passed() const {}
  void finish() {
    const Segments some = runs.segments();
    if (some.count == 0) return;
    loops.sum(slots, some, Average::kNone, nullptr, sums, gradients);
    for (int64_t i = 0; i < some.count; ++i) {
      joined(sorted.row(some.starts[i]), gradients + i * slots.stride);
    }
    runs.Clear();
  }
};

}  // namespace

Error UpdateRows(const Loops& loops, Pool& pool, const Matrix& table,
                 const Update& update, const Matrix& cotangent, const Bags& bags) {
  if (table.rows == 0) return nullptr;
  const int64_t sum_bytes = SizeOf(cotangent.type);
  BagIds ids;
  Bounds bounds;
  SortedSlots sorted;
  if (Error error = bounds.Read(bags)) return error;
  if (Error error = ids.Read(loops, pool, bags, table.rows)) return error;
  if (Error error = sorted.Sort(pool, bags, *ids, bounds, table.rows, cotangent.type)) {
    return error;
  }
  const int64_t size = sorted.size();
  Cut cut(table.width * sum_bytes, table.width * sum_bytes);
  // A row takes longer to move than to read: it and its states are written, too.
  cut.task = Max(cut.task / 4, 64);
  const int64_t most =
      Clamp(kScratchBytes / Max(table.width * sum_bytes, 1), 1, Runs::kMost);
  // Apart, that no two threads write the same line.
  const int64_t stride = CeilDiv(most * table.width, 64) * 64 * sum_bytes;
  Scratch<char> gradients;
  if (!gradients.Allocate(NumTasks(size, cut) * stride)) return kOutOfMemory;
  const Slots slots(sorted.Over(cotangent));
  const MovingRows rows(table, SizeOf(table.type), update, sum_bytes);
  const MoveRow move =
      loops.over(table.type).mover(update.rule, update.seed != nullptr);
  const auto begin = [&](int64_t from, int64_t) {
    const int64_t fetched = Min(from + rows.ahead(), size);
    for (int64_t slot = from; slot < fetched; ++slot) rows.Fetch(sorted.row(slot));
    slots.FetchFirst(from);
    return RunMover{loops.over(cotangent.type),
                    sorted,
                    slots,
                    table,
                    cotangent.type,
                    update,
                    rows,
                    move,
                    ShapeOf(update.rule).catches_up,
                    gradients.data() + from / cut.task * stride,
                    most,
                    {}};
  };
  return WalkRuns(loops, pool, sorted, cotangent, 0, cut, begin);
}

}  // namespace jbag
