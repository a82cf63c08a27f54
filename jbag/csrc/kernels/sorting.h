// The slots in the order of the rows they name: the bags of the transposed matrix,
// whose "ids" are the bags that the slots came from. Each row's slots, a run, are
// summed as a bag's are; a row that many name is spread over all threads.
//
// Traffic: the ids, a few bytes a slot for each pass of the sort, the cotangent's rows
// (mostly from cache).

#ifndef JBAG_KERNELS_SORTING_H_
#define JBAG_KERNELS_SORTING_H_

#include <stdint.h>

#include "kernels/bags.h"
#include "kernels/gathered_rows.h"
#include "kernels/integer_math.h"
#include "kernels/kernels.h"
#include "kernels/simd_loops.h"

namespace jbag {

// A stable radix sort, by row, of the slots that lie in a bag and name a row. There is
// only one stable order, so that how the slots are dealt to threads can't show.
class SortedSlots {
 public:
  // `sums` is the type of the coefficients.
  Error Sort(Pool& pool, const Bags& bags, const Ids& ids, const Bounds& bounds,
             int64_t num_rows, Type sums);

  int64_t size() const { return size_; }
  int64_t row(int64_t i) const { return rows_[i]; }
  // The row of each slot [size].
  const int32_t* rows() const { return rows_.data(); }
  // The slots as those of the transposed matrix, which name the rows of `cotangent`.
  SlotRows Over(const Matrix& cotangent) const {
    return Slots(cotangent, {bags_.data(), size_, false, kNarrowOutOfRange},
                 weighted_ ? coefficients_.data() : nullptr);
  }

  // Where a run stands among the tasks: at its first slot, plus its row if rows count
  // as slots do; `num_counted` of them then, else 0.
  static int64_t Before(int64_t row, int64_t num_counted) {
    return num_counted > 0 ? row : 0;
  }
  // The row that stands at a position, where rows count.
  int64_t RowAt(int64_t position) const {
    return position -
           FirstWhere(0, size_, [&](int64_t i) { return i + row(i) >= position; });
  }

  // Visits what of the positions [from, to) the slots, and the rows if they count, take
  // up, in order: gap(first_row, last_row) where no slot names counted rows, run(row,
  // start, end) where some do. A run may have started before `from`.
  template <typename Gap, typename Run>
  void Visit(int64_t num_counted, int64_t from, int64_t to, Gap gap, Run run) const {
    const auto position = [&](int64_t i) { return i + Before(row(i), num_counted); };
    int64_t start =
        num_counted > 0
            ? FirstWhere(0, size_, [&](int64_t i) { return position(i) >= from; })
            : from;
    int64_t next_row = 0;
    if (start > 0) {
      next_row = row(start - 1);
      start = FirstWhere(0, start, [&](int64_t i) { return row(i) >= next_row; });
    }
    for (;;) {
      if (num_counted > 0) {
        const int64_t here = start < size_ ? row(start) : num_counted;
        const int64_t first = Max(next_row, from - start);
        const int64_t last = Min(here, to - start);
        if (first < last) gap(first, last);
      }
      if (start == size_ || position(start) >= to) return;
      const int64_t here = row(start);
      const int64_t end = End(start);
      run(here, start, end);
      next_row = here + 1;
      start = end;
    }
  }

 private:
  // Where the run of a row that starts at `start` ends; most are short.
  int64_t End(int64_t start) const {
    const int64_t here = row(start);
    const int64_t near = Min(start + 8, size_);
    int64_t end = start + 1;
    while (end < near && row(end) == here) ++end;
    if (end < near) return end;
    return FirstWhere(end, size_, [&](int64_t i) { return row(i) > here; });
  }

  // C is as large as a coefficient, or void where there are none to move.
  template <typename C>
  Error SortAs(Pool& pool, const Bags& bags, const Ids& ids, const Bounds& bounds,
               int64_t num_rows);

  int64_t size_ = 0;
  bool weighted_ = false;
  Scratch<int32_t> rows_;
  Scratch<int32_t> bags_;
  Scratch<char> coefficients_;
};

// Runs that are summed at once.
class Runs {
 public:
  static constexpr int64_t kMost = 16;

  int64_t count() const { return count_; }
  Segments segments() const { return {starts_, ends_, count_}; }
  void Add(int64_t start, int64_t end) {
    starts_[count_] = static_cast<int32_t>(start);
    ends_[count_++] = static_cast<int32_t>(end);
  }
  void Clear() { count_ = 0; }

 private:
  int64_t count_ = 0;
  int32_t starts_[kMost];
  int32_t ends_[kMost];
};

// Walks the runs of the sorted slots on all threads. begin(from, to) makes what a task
// works with:
//
//   gap(first, last)         no slot names the rows [first, last); if rows count
//   whole(row, start, end)   a run, whose slots are yet to be summed
//   joined(row, sums)        a run that was too long for one thread, summed; after all
//                            others, and from a new `begin`
//   passed()                 a run that is `joined`, or was `whole`, at another time
//   finish()                 no more comes
//
// A task sees its runs in order, each in but one task. How a run is summed doesn't
// depend on the threads.
template <typename Begin>
Error WalkRuns(const Loops& loops, Pool& pool, const SortedSlots& sorted,
               const Matrix& cotangent, int64_t num_counted, const Cut& cut,
               const Begin& begin) {
  const SlotRows slots = sorted.Over(cotangent);
  const int64_t positions = sorted.size() + num_counted;
  const int64_t tasks = NumTasks(positions, cut);
  Scratch<char> partials;
  if (sorted.size() > cut.block &&
      !partials.Allocate(NumPartials(positions, cut.block) * slots.stride)) {
    return kOutOfMemory;
  }
  bool split = false;  // whether some row's slots take several blocks
  ParallelFor(pool, tasks, [&](int64_t task) {
    const int64_t from = task * cut.task;
    const int64_t to = Min(from + cut.task, positions);
    auto worker = begin(from, to);
    sorted.Visit(
        num_counted, from, to,
        [&](int64_t first, int64_t last) { worker.gap(first, last); },
        [&](int64_t row, int64_t start, int64_t end) {
          const int64_t before = SortedSlots::Before(row, num_counted);
          const bool starts = start + before >= from;
          if (end - start <= cut.block) {
            if (starts) worker.whole(row, start, end);
            return;
          }
          if (starts) worker.passed();
          __atomic_store_n(&split, true, __ATOMIC_RELAXED);
          VisitBlocks(before, start, end, cut.block, from, to, [&](const Block& block) {
            loops.over(cotangent.type)
                .sum(slots, block.segment(), Average::kNone, nullptr, cotangent.type,
                     partials.data() + block.partial * slots.stride);
          });
        });
    worker.finish();
  });
  if (!split) return nullptr;
  ParallelFor(pool, tasks, [&](int64_t task) {
    const int64_t from = task * cut.task;
    const int64_t to = Min(from + cut.task, positions);
    auto worker = begin(from, to);
    sorted.Visit(
        num_counted, from, to, [](int64_t, int64_t) {},
        [&](int64_t row, int64_t start, int64_t end) {
          const int64_t before = SortedSlots::Before(row, num_counted);
          if (start + before < from) return;
          if (end - start <= cut.block) {
            worker.passed();
          } else {
            worker.joined(row, AddPartials(loops.over_sums(cotangent.type),
                                           partials.data(), slots.width, slots.stride,
                                           before, start, end, cut.block));
          }
        });
    worker.finish();
  });
  return nullptr;
}

}  // namespace jbag

#endif  // JBAG_KERNELS_SORTING_H_
