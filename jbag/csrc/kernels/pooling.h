// The operations that walk the bags: spmm, extremum and sddmm.

#ifndef JBAG_KERNELS_POOLING_H_
#define JBAG_KERNELS_POOLING_H_

#include <stdint.h>

#include "kernels/blocks.h"
#include "kernels/numbers.h"
#include "kernels/rows.h"

namespace jbag {
namespace {

// Reduces the bags in parallel: begin(slot) where a task starts, reduce(block) for each
// block, poison(bag) for a malformed bag, and in the end combine(bag, start, end) for
// each bag of several blocks.
template <typename Begin, typename Reduce, typename Poison, typename Combine>
inline void ForEachBag(Pool& pool, const Bags& bags, const Bounds& bounds,
                       const Cut& cut, Begin begin, Reduce reduce, Poison poison,
                       Combine combine) {
  const int64_t tasks = NumTasks(bounds[bags.num_bags] + bags.num_bags, cut);
  ParallelFor(pool, tasks, [&](int64_t task) {
    const int64_t from = task * cut.task;
    const int64_t to = from + cut.task;
    int64_t bag = BagAt(bounds, bags.num_bags, from);
    begin(Max(bounds[bag], from - bag));
    int64_t end = bounds[bag];
    for (; bag < bags.num_bags; ++bag) {
      const int64_t start = end;
      if (start + bag >= to) break;
      end = bounds[bag + 1];
      if (!bounds.malformed(bag)) {
        VisitBlocks(bag, start, end, cut.block, from, to, reduce);
      } else if (start + bag >= from) {
        poison(bag);
      }
    }
  });
  if (bounds.longest() <= cut.block) return;
  ParallelFor(pool, tasks, [&](int64_t task) {
    const int64_t from = task * cut.task;
    int64_t bag = BagAt(bounds, bags.num_bags, from);
    for (; bag < bags.num_bags && bounds[bag] + bag < from + cut.task; ++bag) {
      const int64_t start = bounds[bag];
      const int64_t end = bounds[bag + 1];
      if (start + bag < from || end - start <= cut.block) continue;
      if (!bounds.malformed(bag)) combine(bag, start, end);
    }
  });
}

template <typename Row, typename T>
Error Spmm(Pool& pool, const Matrix& table, const Bags& bags, Average average, T* out) {
  using A = Sum<Row>;
  const int64_t width = table.width;
  const Cut cut(width * sizeof(Row), width * sizeof(A));
  Bounds bounds;
  if (Error error = bounds.Read(bags)) return error;
  const int64_t size = bounds[bags.num_bags];
  Scratch<A> partials;
  if (bounds.longest() > cut.block &&
      !partials.Allocate(NumPartials(size + bags.num_bags, cut.block) * width)) {
    return kOutOfMemory;
  }
  WithSlots<Row>(table, bags, size, [&](const auto& slots) {
    const auto divisor = [&](int64_t first, int64_t last) {
      if (average == Average::kNone) return A{1};
      const A count = static_cast<A>(Max(slots.NumFilled(first, last), 1));
      return average == Average::kMean ? count : SquareRoot(count);
    };
    ForEachBag(
        pool, bags, bounds, cut, [&](int64_t slot) { slots.FetchFirst(slot); },
        [&](const Block& block) {
          const int64_t first = block.first;
          const int64_t last = block.last;
          if (block.whole) {
            SumOf(slots, first, last, divisor(first, last), out + block.bag * width);
          } else {
            SumOf(slots, first, last, A{1}, partials.data() + block.partial * width);
          }
        },
        [&](int64_t bag) { Fill(out + bag * width, width, kNaN<T>); },
        [&](int64_t bag, int64_t start, int64_t end) {
          const A* sums =
              AddPartials(partials.data(), width, bag, start, end, cut.block);
          Divide(sums, width, divisor(start, end), out + bag * width);
        });
  });
  return nullptr;
}

template <typename Row>
Error Extremum(Pool& pool, const Matrix& table, const Bags& bags, bool largest,
               void* output, int32_t* winners) {
  using A = Sum<Row>;
  const int64_t width = table.width;
  const int32_t none = static_cast<int32_t>(bags.ids.size);
  const Cut cut(width * sizeof(Row), width * sizeof(A));
  Bounds bounds;
  if (Error error = bounds.Read(bags)) return error;
  const int64_t size = bounds[bags.num_bags];
  A* out = static_cast<A*>(output);
  Scratch<A> partials;
  Scratch<int32_t> partial_winners;
  if (bounds.longest() > cut.block) {
    const int64_t count = NumPartials(size + bags.num_bags, cut.block) * width;
    if (!partials.Allocate(count) || !partial_winners.Allocate(count)) {
      return kOutOfMemory;
    }
  }
  WithSlots<Row>(table, bags, size, [&](const auto& slots) {
    ForEachBag(
        pool, bags, bounds, cut, [&](int64_t slot) { slots.FetchFirst(slot); },
        [&](const Block& block) {
          const int64_t at = (block.whole ? block.bag : block.partial) * width;
          ExtremesOf(slots, block.first, block.last, largest, none,
                     (block.whole ? out : partials.data()) + at,
                     (block.whole ? winners : partial_winners.data()) + at);
        },
        [&](int64_t bag) {
          Fill(out + bag * width, width, kNaN<A>);
          Fill(winners + bag * width, width, none);
        },
        [&](int64_t bag, int64_t start, int64_t end) {
          A* best = out + bag * width;
          int32_t* best_slots = winners + bag * width;
          Fill(best, width, A{0});
          Fill(best_slots, width, none);
          VisitPartials(bag, start, end, cut.block, [&](int64_t partial) {
            const A* part = partials.data() + partial * width;
            const int32_t* part_slots = partial_winners.data() + partial * width;
            for (int64_t i = 0; i < width; ++i) {
              if (part_slots[i] == none) continue;
              const bool worse = largest ? part[i] <= best[i] : part[i] >= best[i];
              if (best_slots[i] != none && (worse || best[i] != best[i])) continue;
              best[i] = part[i];
              best_slots[i] = part_slots[i];
            }
          });
        });
  });
  return nullptr;
}

template <typename Row>
Error Sddmm(Pool& pool, const Matrix& table, const Matrix& cotangent, const Bags& bags,
            void* output) {
  using A = Sum<Row>;
  const int64_t width = table.width;
  const Cut cut(width * sizeof(Row), width * sizeof(A));
  Bounds bounds;
  if (Error error = bounds.Read(bags)) return error;
  A* out = static_cast<A*>(output);
  const A* bag_rows = static_cast<const A*>(cotangent.data);
  const int64_t size = bags.ids.size;
  WithSlots<Row>(table, bags, size, [&](const auto& slots) {
    ParallelFor(pool, CeilDiv(size, cut.task), [&](int64_t task) {
      int64_t slot = task * cut.task;
      const int64_t to = Min(slot + cut.task, size);
      slots.FetchFirst(slot);
      int64_t bag = BagOf(bounds, bags.num_bags, slot);
      for (; slot < to && bag < bags.num_bags; ++bag) {
        const int64_t end = Min(bounds[bag + 1], to);
        const bool malformed = bounds.malformed(bag);
        for (; slot < end; ++slot) {
          slots.FetchAhead(slot);
          const Row* row = slots.row(slot);
          if (malformed || slots.empty(slot) || width == 0) {
            out[slot] = 0;
          } else if (row == nullptr) {
            out[slot] = kNaN<A>;
          } else {
            out[slot] = Dot(row, bag_rows + bag * width, width);
          }
        }
      }
      if (slot < to) Fill(out + slot, to - slot, A{0});
    });
  });
  return nullptr;
}

}  // namespace
}  // namespace jbag

#endif  // JBAG_KERNELS_POOLING_H_
