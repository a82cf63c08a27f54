// Moves the rows of a table that slots name by a rule, in place.
//
// A row's gradient is the sum over its run of sorted slots, in cache; mostly one slot
// names a row, and its gradient is where the cotangent has it.
//
// Rules that catch up need no sort.
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
    if (update.steps != nullptr && !shape.catches_up) {
      Add(update.steps, sizeof(int32_t));
    }
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
  char* gradients;  // scratch: rows
  int64_t most;     // of them
  Runs runs;        // of several slots, not summed yet

  void gap(int64_t, int64_t) const {}
  void whole(int64_t row, int64_t start, int64_t end) {
    FetchAhead(start, end);
    if (end - start == 1) {
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

// A row that isn't current, and the steps that it has been through.
struct StaleRow {
  int32_t row;
  int32_t steps;
};

// Rows that aren't current, each once, almost in order: by blocks of neighbours.
class StaleRows {
 public:
  // Finds those that slots name, and counts them as current.
  Error Find(Pool& pool, const Update& update, const Ids& ids, int64_t num_rows) {
    const int64_t tasks = CeilDiv(ids.size, kTask);
    if (!found_.Allocate(ids.size) || !ordered_.Allocate(ids.size) ||
        !sizes_.Allocate(tasks)) {
      return kOutOfMemory;
    }
    const uint32_t past = static_cast<uint32_t>(num_rows);
    ParallelFor(pool, tasks, [&](int64_t task) {
      const int64_t first = task * kTask;
      const int64_t last = Min(first + kTask, ids.size);
      const auto is_row = [&](int64_t slot) {
        const int32_t id = ids.data[slot];
        return static_cast<uint32_t>(id) < past && id != ids.empty;
      };
      StaleRow* next = found_.data() + first;
      for (int64_t slot = first - kAhead; slot < last; ++slot) {
        const int64_t far = slot + kAhead;
        if (far < last && is_row(far)) {
          __builtin_prefetch(update.steps + ids.data[far], 1);
        }
        if (slot < first || !is_row(slot)) continue;
        const int32_t row = ids.data[slot];
        int32_t steps = __atomic_load_n(update.steps + row, __ATOMIC_RELAXED);
        // Of the threads that come to a row, one changes its steps.
        if (steps != update.count &&
            __atomic_compare_exchange_n(update.steps + row, &steps, update.count, false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
          *next++ = {row, steps};
        }
      }
      sizes_.data()[task] = next - (found_.data() + first);
    });
    Order(tasks, num_rows);
    return nullptr;
  }

  int64_t size() const { return size_; }
  const StaleRow& operator[](int64_t i) const { return ordered_.data()[i]; }

 private:
  static constexpr int64_t kTask = 1 << 12;  // slots
  static constexpr int64_t kAhead = 32;
  static constexpr int64_t kBlocks = 1 << 11;

  void Order(int64_t tasks, int64_t num_rows) {
    const int64_t rows_per_block = CeilDiv(num_rows, kBlocks);
    int shift = 0;
    while ((int64_t{1} << shift) < rows_per_block) ++shift;
    int64_t starts[kBlocks + 1] = {};
    const auto visit = [&](auto visitor) {
      for (int64_t task = 0; task < tasks; ++task) {
        const StaleRow* first = found_.data() + task * kTask;
        for (int64_t i = 0; i < sizes_.data()[task]; ++i) visitor(first[i]);
      }
    };
    visit([&](const StaleRow& x) { ++starts[(x.row >> shift) + 1]; });
    for (int64_t i = 0; i < kBlocks; ++i) starts[i + 1] += starts[i];
    size_ = starts[kBlocks];
    visit([&](const StaleRow& x) { ordered_.data()[starts[x.row >> shift]++] = x; });
  }

  Scratch<StaleRow> found_;
  Scratch<StaleRow> ordered_;
  Scratch<int64_t> sizes_;
  int64_t size_ = 0;
};

// Moves the rows that slots name by a rule that reads no gradient, if they aren't
// current.
Error CatchUpRows(const Loops& loops, Pool& pool, const Matrix& table,
                  const Update& update, const Ids& ids) {
  StaleRows stale;
  if (Error error = stale.Find(pool, update, ids, table.rows)) return error;
  const MoveRow move =
      loops.over(table.type).mover(update.rule, update.seed != nullptr);
  const MovingRows rows(table, SizeOf(table.type), update, SizeOf(SumType(table.type)));
  constexpr int64_t kTask = 1 << 10;  // rows
  ParallelFor(pool, CeilDiv(stale.size(), kTask), [&](int64_t task) {
    const int64_t first = task * kTask;
    const int64_t last = Min(first + kTask, stale.size());
    for (int64_t i = first - rows.ahead(); i < last; ++i) {
      if (i + rows.ahead() < last) rows.Fetch(stale[i + rows.ahead()].row);
      if (i >= first) move(table, update, stale[i].row, &stale[i].steps, nullptr);
    }
  });
  return nullptr;
}

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
  if (ShapeOf(update.rule).catches_up) {
    return CatchUpRows(loops, pool, table, update, *ids);
  }
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
                    gradients.data() + from / cut.task * stride,
                    most,
                    {}};
  };
  return WalkRuns(loops, pool, sorted, cotangent, 0, cut, begin);
}

}  // namespace jbag
