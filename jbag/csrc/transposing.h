// The transposed product. Sorted by row, stably, the slots are the bags of the
// transposed matrix: their "ids" are the bags they came from, and the product does the
// rest.
//
// Traffic: the ids, a few bytes a slot for each pass of the sort, the cotangent's rows
// (mostly from cache), and the output once.

#ifndef JBAG_TRANSPOSING_H_
#define JBAG_TRANSPOSING_H_

#include <stdint.h>
#include <string.h>

#include "blocks.h"
#include "numbers.h"
#include "rows.h"

namespace jbag {
namespace {

// A filled slot: the row it names, its bag, its coefficient.
template <typename Key, typename A>
struct Entry {
  Key row;
  int32_t bag;
  A coefficient;
};

// A stable radix sort, by row, of the slots that lie in a bag and name a row. There is
// only one stable order, so that how the slots are dealt to threads can't show.
template <typename Key, typename A>
class SortedSlots {
 public:
  Error Sort(Pool& pool, const Bags& bags, const Bounds& bounds, int64_t num_rows) {
    size_ = bounds[bags.num_bags];
    int bits = 1;
    while (bits < 64 && (static_cast<uint64_t>(num_rows - 1) >> bits) > 0) ++bits;
    const int passes = static_cast<int>(CeilDiv(bits, kMostBits));
    const int pass_bits = static_cast<int>(CeilDiv(bits, passes));
    const int64_t num_digits = int64_t{1} << pass_bits;
    const int64_t chunk = Max(1 << 13, CeilDiv(size_, 64));
    const bool weighted = bags.coefficients != nullptr;
    Scratch<Entry<Key, A>> entries[2];
    Scratch<uint32_t> counts;
    if (!rows_.Allocate(size_) || !bags_.Allocate(size_) ||
        (weighted && !coefficients_.Allocate(size_)) ||
        (passes > 1 && !entries[1].Allocate(size_)) ||
        (passes > 2 && !entries[0].Allocate(size_)) ||
        !counts.Allocate(num_digits * CeilDiv(size_, chunk))) {
      return kOutOfMemory;
    }
    for (int pass = 0; pass < passes; ++pass) {
      const int shift = pass * pass_bits;
      const Entry<Key, A>* from = entries[pass % 2].data();
      Entry<Key, A>* to = entries[(pass + 1) % 2].data();
      const int64_t chunks = CeilDiv(size_, chunk);
      // Calls visitor(digit, entry) for the slots of a chunk.
      const auto visit = [&](int64_t which, auto visitor) {
        const int64_t first = which * chunk;
        const int64_t last = Min(first + chunk, size_);
        const auto visit_entry = [&](const Entry<Key, A>& entry) {
          visitor((entry.row >> shift) & (num_digits - 1), entry);
        };
        if (pass == 0) {
          VisitFilled(bags, bounds, num_rows, first, last, visit_entry);
        } else {
          for (int64_t i = first; i < last; ++i) visit_entry(from[i]);
        }
      };
      ParallelFor(pool, chunks, [&](int64_t which) {
        uint32_t* mine = counts.data() + which * num_digits;
        memset(mine, 0, num_digits * sizeof(uint32_t));
        visit(which, [&](Key digit, const Entry<Key, A>&) { ++mine[digit]; });
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
          visit(which, [&](Key digit, const Entry<Key, A>& entry) {
            to[next[digit]++] = entry;
          });
          return;
        }
        visit(which, [&](Key digit, const Entry<Key, A>& entry) {
          const uint32_t at = next[digit]++;
          rows_[at] = entry.row;
          bags_[at] = entry.bag;
          if (weighted) coefficients_[at] = entry.coefficient;
        });
      });
      size_ = total;
    }
    return nullptr;
  }

  int64_t size() const { return size_; }
  int64_t row(int64_t i) const { return static_cast<int64_t>(rows_[i]); }
  // The bags of the transposed matrix, but for their bounds.
  Bags transposed() const {
    return {{bags_.data(), false, size_}, {}, 0, 0, coefficients_.data(), false, 0};
  }

  // The row that stands at a position: see Visit.
  int64_t RowAt(int64_t position) const {
    return position -
           FirstWhere(0, size_, [&](int64_t i) { return i + row(i) >= position; });
  }

  // A row and its slots stand as a bag and its slots do: position(row) is where its
  // slots start, plus the row. Visits what of [from, to) they take up, in order:
  // gap(first_row, last_row) where no slot names the rows, run(row, start, end) where
  // some do. A run may have started before `from`.
  template <typename Gap, typename Run>
  void Visit(int64_t num_rows, int64_t from, int64_t to, Gap gap, Run run) const {
    int64_t start = FirstWhere(0, size_, [&](int64_t i) { return i + row(i) >= from; });
    int64_t next_row = 0;
    if (start > 0) {
      next_row = row(start - 1);
      start = FirstWhere(0, start, [&](int64_t i) { return row(i) >= next_row; });
    }
    for (;;) {
      const int64_t here = start < size_ ? row(start) : num_rows;
      const int64_t first = Max(next_row, from - start);
      const int64_t last = Min(here, to - start);
      if (first < last) gap(first, last);
      if (start == size_ || start + here >= to) return;
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

  template <typename Visitor>
  static void VisitFilled(const Bags& bags, const Bounds& bounds, int64_t num_rows,
                          int64_t first, int64_t last, const Visitor& visitor) {
    const A* coefficients = static_cast<const A*>(bags.coefficients);
    int64_t slot = first;
    int64_t bag = BagOf(bounds, bags.num_bags, slot);
    for (; slot < last && bag < bags.num_bags; ++bag) {
      const int64_t end = Min(bounds[bag + 1], last);
      if (bounds.malformed(bag)) slot = Max(slot, end);
      for (; slot < end; ++slot) {
        const int64_t id = bags.ids[slot];
        if (id < 0 || id >= num_rows || (bags.has_empty && id == bags.empty)) continue;
        visitor(Entry<Key, A>{static_cast<Key>(id), static_cast<int32_t>(bag),
                              coefficients == nullptr ? 1 : coefficients[slot]});
      }
    }
  }

  int64_t size_ = 0;
  Scratch<Key> rows_;
  Scratch<int32_t> bags_;
  Scratch<A> coefficients_;
};

// Writes zeros to [first, last), but for what holds them.
inline void Clear(void* first, void* last, const Zeros& zeros) {
  char* from = static_cast<char*>(first);
  char* to = static_cast<char*>(last);
  if (from < zeros.first || from >= zeros.last || to > zeros.last) {
    memset(from, 0, static_cast<size_t>(to - from));
  }
}

template <typename T, typename Key>
Error TransposedProduct(Pool& pool, const Matrix& cotangent, const Bags& bags,
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
  SortedSlots<Key, A> sorted;
  if (Error error = sorted.Sort(pool, bags, bounds, num_rows)) return error;

  const Slots<A, int32_t> slots(cotangent, sorted.transposed(), sorted.size());
  T* out = static_cast<T*>(output.data);
  const int64_t positions = sorted.size() + num_rows;
  const int64_t tasks = NumTasks(positions, cut);
  Scratch<A> partials;
  if (sorted.size() > cut.block &&
      !partials.Allocate(NumPartials(positions, cut.block) * width)) {
    return kOutOfMemory;
  }
  const auto reduce = [&](const Block& block) {
    if (block.whole) {
      SumOf(slots, block.first, block.last, A{1}, out + block.bag * width);
    } else {
      A* partial = partials.data() + block.partial * width;
      SumOf(slots, block.first, block.last, A{1}, partial);
    }
  };

  const Zeros zeros = PreferHugePages(out, num_rows * row_bytes);
  bool split = false;  // whether some row's slots take several blocks
  ParallelFor(pool, tasks, [&](int64_t task) {
    const int64_t from = task * cut.task;
    const int64_t to = Min(from + cut.task, positions);
    // Two threads that met on a new page would both have it cleared: the one that two
    // tasks share is cleared at the start of the first, long before either writes it.
    BackHugePage(out, num_rows * row_bytes, out + sorted.RowAt(to) * width);
    sorted.Visit(
        num_rows, from, to,
        [&](int64_t first, int64_t last) {
          Clear(out + first * width, out + last * width, zeros);
        },
        [&](int64_t row, int64_t start, int64_t end) {
          if (end - start > cut.block) {
            __atomic_store_n(&split, true, __ATOMIC_RELAXED);
          }
          VisitBlocks(row, start, end, cut.block, from, to, reduce);
        });
  });
  if (!split) return nullptr;
  ParallelFor(pool, tasks, [&](int64_t task) {
    const int64_t from = task * cut.task;
    sorted.Visit(
        num_rows, from, from + cut.task, [](int64_t, int64_t) {},
        [&](int64_t row, int64_t start, int64_t end) {
          if (end - start <= cut.block || start + row < from) return;
          const A* sums =
              AddPartials(partials.data(), width, row, start, end, cut.block);
          Divide(sums, width, A{1}, out + row * width);
        });
  });
  return nullptr;
}

}  // namespace
}  // namespace jbag

#endif  // JBAG_TRANSPOSING_H_
