// The slots in the order of the rows they name: the bags of the transposed matrix,
// whose "ids" are the bags that the slots came from. Each row's slots, a run, are
// summed as a bag's are; a row that many name is spread over all threads.
//
// Traffic: the ids, a few bytes a slot for each pass of the sort, the cotangent's rows
// (mostly from cache).

#ifndef JBAG_KERNELS_SORTING_H_
#define JBAG_KERNELS_SORTING_H_

#include <stdint.h>
#include <string.h>

#include "kernels/blocks.h"
#include "kernels/numbers.h"
#include "kernels/rows.h"

namespace jbag {
namespace {

// A filled slot: the row it names, its bag and, unless all are 1, its coefficient.
template <typename Key, typename A>
struct Entry {
  Entry() = default;
  Entry(int64_t id, int64_t of, const A* coefficients, int64_t slot)
      : row(static_cast<Key>(id)),
        bag(static_cast<int32_t>(of)),
        coefficient(coefficients[slot]) {}
  void PutCoefficient(A* to) const { *to = coefficient; }

  Key row;
  int32_t bag;
  A coefficient;
};
template <typename Key>
struct Entry<Key, void> {
  Entry() = default;
  Entry(int64_t id, int64_t of, const void*, int64_t)
      : row(static_cast<Key>(id)), bag(static_cast<int32_t>(of)) {}
  void PutCoefficient(void*) const {}

  Key row;
  int32_t bag;
};

// A stable radix sort, by row, of the slots that lie in a bag and name a row. There is
// only one stable order, so that how the slots are dealt to threads can't show.
template <typename A>
class SortedSlots {
 public:
  Error Sort(Pool& pool, const Bags& bags, const Bounds& bounds, int64_t num_rows) {
    const bool weighted = bags.coefficients != nullptr;
    size_ = bounds[bags.num_bags];
    wide_ = num_rows > int64_t{INT32_MAX};
    if (wide_) {
      return weighted ? SortAs<uint64_t, A>(pool, bags, bounds, num_rows)
                      : SortAs<uint64_t, void>(pool, bags, bounds, num_rows);
    }
    return weighted ? SortAs<uint32_t, A>(pool, bags, bounds, num_rows)
                    : SortAs<uint32_t, void>(pool, bags, bounds, num_rows);
  }

  int64_t size() const { return size_; }
  int64_t row(int64_t i) const {
    return wide_ ? reinterpret_cast<const int64_t*>(rows_.data())[i]
                 : reinterpret_cast<const int32_t*>(rows_.data())[i];
  }
  // The bags of the transposed matrix, but for their bounds.
  Bags transposed() const {
    return {{bags_.data(), false, size_}, {}, 0, 0, coefficients_.data(), false, 0};
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

  static constexpr int kMostBits = 11;

  // C is void where there are no coefficients to move.
  template <typename Key, typename C>
  Error SortAs(Pool& pool, const Bags& bags, const Bounds& bounds, int64_t num_rows) {
    using Slot = Entry<Key, C>;
    int bits = 1;
    while (bits < 64 && (static_cast<uint64_t>(num_rows - 1) >> bits) > 0) ++bits;
    const int passes = static_cast<int>(CeilDiv(bits, kMostBits));
    const int pass_bits = static_cast<int>(CeilDiv(bits, passes));
    const int64_t num_digits = int64_t{1} << pass_bits;
    const int64_t chunk = Max(1 << 11, CeilDiv(size_, Min(2 * pool.num_threads(), 64)));
    Scratch<Slot> entries[2];
    Scratch<uint32_t> counts;
    if (!rows_.Allocate(size_ * static_cast<int64_t>(sizeof(Key))) ||
        !bags_.Allocate(size_) ||
        (bags.coefficients != nullptr && !coefficients_.Allocate(size_)) ||
        (passes > 1 && !entries[1].Allocate(size_)) ||
        (passes > 2 && !entries[0].Allocate(size_)) ||
        !counts.Allocate(num_digits * CeilDiv(size_, chunk))) {
      return kOutOfMemory;
    }
    for (int pass = 0; pass < passes; ++pass) {
      const int shift = pass * pass_bits;
      const Slot* from = entries[pass % 2].data();
      Slot* to = entries[(pass + 1) % 2].data();
      const int64_t chunks = CeilDiv(size_, chunk);
      // Calls visitor(digit, entry) for the slots of a chunk; the entries' bags may be
      // any where they don't matter. What visitors hold are copies, that it stays in
      // registers.
      const auto visit = [&](int64_t which, bool bags_matter, auto visitor) {
        const int64_t first = which * chunk;
        const int64_t last = Min(first + chunk, size_);
        const Key mask = static_cast<Key>(num_digits - 1);
        const auto visit_entry = [visitor, shift, mask](const Slot& entry) {
          visitor((entry.row >> shift) & mask, entry);
        };
        if (pass > 0) {
          const Slot* end = from + last;
          for (const Slot* entry = from + first; entry != end; ++entry) {
            visit_entry(*entry);
          }
        } else if (bags.ids.is_64_bit) {
          VisitFilled<Slot, int64_t, C>(bags, bounds, num_rows, first, last,
                                        bags_matter, visit_entry);
        } else {
          VisitFilled<Slot, int32_t, C>(bags, bounds, num_rows, first, last,
                                        bags_matter, visit_entry);
        }
      };
      ParallelFor(pool, chunks, [&](int64_t which) {
        uint32_t* mine = counts.data() + which * num_digits;
        memset(mine, 0, num_digits * sizeof(uint32_t));
        visit(which, false, [mine](Key digit, const Slot&) { ++mine[digit]; });
      });
      uint32_t total = 0;
      for (int64_t digit = 0; digit < num_digits; ++digit) {
        for (int64_t which = 0; which < chunks; ++which) {
          uint32_t& count = counts[which * num_digits + digit];
          const uint32_t start = total;
          total += count;
          count = start;
        }
      }
      ParallelFor(pool, chunks, [&](int64_t which) {
        uint32_t* next = counts.data() + which * num_digits;
        if (pass + 1 < passes) {
          visit(which, true, [next, to](Key digit, const Slot& entry) {
            to[next[digit]++] = entry;
          });
          return;
        }
        Key* rows = reinterpret_cast<Key*>(rows_.data());
        int32_t* of = bags_.data();
        A* coefficients = coefficients_.data();
        visit(which, true,
              [next, rows, of, coefficients](Key digit, const Slot& entry) {
                const uint32_t at = next[digit]++;
                rows[at] = entry.row;
                of[at] = entry.bag;
                entry.PutCoefficient(coefficients + at);
              });
      });
      size_ = total;
    }
    return nullptr;
  }

  template <typename Slot, typename Id, typename C, typename Visitor>
  static void VisitFilled(const Bags& bags, const Bounds& bounds, int64_t num_rows,
                          int64_t first, int64_t last, bool bags_matter,
                          const Visitor& visitor) {
    const Id* ids = static_cast<const Id*>(bags.ids.data);
    const C* coefficients = static_cast<const C*>(bags.coefficients);
    // An id that is no row stands for empty slots where there are none.
    const int64_t empty = bags.has_empty ? bags.empty : -1;
    const auto visit = [=](int64_t slot, int64_t end, int64_t bag) {
      for (; slot < end; ++slot) {
        const int64_t id = ids[slot];
        if (id < 0 || id >= num_rows || id == empty) continue;
        visitor(Slot(id, bag, coefficients, slot));
      }
    };
    if (!bags_matter && bounds.well_formed()) {
      visit(first, last, 0);
      return;
    }
    int64_t bag = BagOf(bounds, bags.num_bags, first);
    for (int64_t slot = first; slot < last && bag < bags.num_bags; ++bag) {
      const int64_t end = Min(bounds[bag + 1], last);
      if (!bounds.malformed(bag)) visit(slot, end, bag);
      slot = Max(slot, end);
    }
  }

  int64_t size_ = 0;
  bool wide_ = false;  // whether rows take 64 bits
  Scratch<char> rows_;
  Scratch<int32_t> bags_;
  Scratch<A> coefficients_;
};

// Walks the runs of the sorted slots on all threads. begin(from, to) makes what a task
// works with:
//
//   gap(first, last)         no slot names the rows [first, last); if rows count
//   whole(row, start, end)   a run, whose slots are yet to be summed
//   joined(row, sums)        a run that was too long for one thread, summed; after all
//                            others, and from a new `begin`
//   passed()                 a run that is `joined`, or was `whole`, at another time
//
// A task sees its runs in order, each in but one task. How a run is summed doesn't
// depend on the threads.
template <typename A, typename Begin>
Error WalkRuns(Pool& pool, const SortedSlots<A>& sorted, const Slots<A, int32_t>& slots,
               int64_t num_counted, const Cut& cut, const Begin& begin) {
  const int64_t width = slots.width();
  const int64_t positions = sorted.size() + num_counted;
  const int64_t tasks = NumTasks(positions, cut);
  Scratch<A> partials;
  if (sorted.size() > cut.block &&
      !partials.Allocate(NumPartials(positions, cut.block) * width)) {
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
          const int64_t before = SortedSlots<A>::Before(row, num_counted);
          const bool starts = start + before >= from;
          if (end - start <= cut.block) {
            if (starts) worker.whole(row, start, end);
            return;
          }
          if (starts) worker.passed();
          __atomic_store_n(&split, true, __ATOMIC_RELAXED);
          VisitBlocks(before, start, end, cut.block, from, to, [&](const Block& block) {
            A* partial = partials.data() + block.partial * width;
            SumOf(slots, block.first, block.last, A{1}, partial);
          });
        });
  });
  if (!split) return nullptr;
  ParallelFor(pool, tasks, [&](int64_t task) {
    const int64_t from = task * cut.task;
    const int64_t to = Min(from + cut.task, positions);
    auto worker = begin(from, to);
    sorted.Visit(
        num_counted, from, to, [](int64_t, int64_t) {},
        [&](int64_t row, int64_t start, int64_t end) {
          const int64_t before = SortedSlots<A>::Before(row, num_counted);
          if (start + before < from) return;
          if (end - start <= cut.block) {
            worker.passed();
          } else {
            worker.joined(row, AddPartials(partials.data(), width, before, start, end,
                                           cut.block));
          }
        });
  });
  return nullptr;
}

}  // namespace
}  // namespace jbag

#endif  // JBAG_KERNELS_SORTING_H_
