// The operations that walk the bags: spmm, extremum and sddmm.
//
// Traffic: the ids and coefficients once, each named row once, the output once.

#include <stdint.h>
#include <string.h>

#include "kernels/bags.h"
#include "kernels/gathered_rows.h"
#include "kernels/integer_math.h"
#include "kernels/kernels.h"
#include "kernels/simd_loops.h"

namespace jbag {
namespace {

// Reduces the bags in parallel: begin(slot) where a task starts, whole(segments,
// bag) for consecutive bags of one block each, part(block) for a block of a longer
// bag, poison(bag) for a malformed bag, and in the end combine(bag, start, end) for
// each bag of several blocks.
template <typename Begin, typename Whole, typename Part, typename Poison,
          typename Combine>
void ForEachBag(Pool& pool, const Bags& bags, const Bounds& bounds, const Cut& cut,
                Begin begin, Whole whole, Part part, Poison poison, Combine combine) {
  const int64_t num_bags = bags.num_bags;
  const int64_t tasks = NumTasks(bounds[num_bags] + num_bags, cut);
  const bool all_whole = bounds.well_formed() && bounds.longest() <= cut.block;
  ParallelFor(pool, tasks, [&](int64_t task) {
    const int64_t from = task * cut.task;
    const int64_t to = from + cut.task;
    int64_t bag = BagAt(bounds, num_bags, from);
    begin(Max(bounds[bag], from - bag));
    if (all_whole) {
      if (bounds[bag] + bag < from) ++bag;
      bounds.VisitSegments(bag, FirstBagFrom(bounds, num_bags, to), whole);
      return;
    }
    int64_t first = bag;  // of the bags not reduced yet, which are whole
    int64_t end = bounds[bag];
    for (; bag < num_bags; ++bag) {
      const int64_t start = end;
      if (start + bag >= to) break;
      end = bounds[bag + 1];
      const bool malformed = bounds.malformed(bag);
      const bool starts = start + bag >= from;
      if (starts && !malformed && end - start <= cut.block) continue;
      bounds.VisitSegments(first, bag, whole);
      first = bag + 1;
      if (malformed) {
        if (starts) poison(bag);
      } else if (end - start > cut.block) {
        VisitBlocks(bag, start, end, cut.block, from, to, part);
      }
    }
    bounds.VisitSegments(first, bag, whole);
  });
  if (bounds.longest() <= cut.block) return;
  ParallelFor(pool, tasks, [&](int64_t task) {
    const int64_t from = task * cut.task;
    int64_t bag = BagAt(bounds, num_bags, from);
    for (; bag < num_bags && bounds[bag] + bag < from + cut.task; ++bag) {
      const int64_t start = bounds[bag];
      const int64_t end = bounds[bag + 1];
      if (start + bag < from || end - start <= cut.block) continue;
      if (!bounds.malformed(bag)) combine(bag, start, end);
    }
  });
}

void FillNaN(Type type, void* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if (type == Type::kFloat32) static_cast<float*>(out)[i] = __builtin_nanf("");
    if (type == Type::kFloat64) static_cast<double*>(out)[i] = __builtin_nan("");
    if (type == Type::kBFloat16) static_cast<uint16_t*>(out)[i] = 0x7fc0;
    if (type == Type::kFloat16) static_cast<uint16_t*>(out)[i] = 0x7e00;
  }
}

// Joins the extremes of a bag's block to those of the blocks before.
template <typename A>
void JoinExtremes(const void* values, const int32_t* slots, int64_t width, bool largest,
                  int32_t none, void* joint, int32_t* joint_slots) {
  const A* part = static_cast<const A*>(values);
  A* best = static_cast<A*>(joint);
  for (int64_t i = 0; i < width; ++i) {
    if (slots[i] == none) continue;
    const bool worse = largest ? part[i] <= best[i] : part[i] >= best[i];
    if (joint_slots[i] != none && (worse || best[i] != best[i])) continue;
    best[i] = part[i];
    joint_slots[i] = slots[i];
  }
}

}  // namespace

Error Spmm(const Loops& loops, Pool& pool, const Matrix& table, const Bags& bags,
           Average average, const Matrix& output) {
  const RowLoops& rows = loops.over(table.type);
  const SumLoops& sums = loops.over_sums(table.type);
  const Type sum_type = SumType(table.type);
  const int64_t width = table.width;
  const int64_t sum_bytes = width * SizeOf(sum_type);
  const int64_t out_bytes = width * SizeOf(output.type);
  const Cut cut(width * SizeOf(table.type), sum_bytes);
  BagIds ids;
  Bounds bounds;
  if (Error error = bounds.Read(bags)) return error;
  if (Error error = ids.Read(loops, pool, bags, table.rows)) return error;
  const int64_t size = bounds[bags.num_bags];
  Scratch<char> partials;
  if (bounds.longest() > cut.block &&
      !partials.Allocate(NumPartials(size + bags.num_bags, cut.block) * sum_bytes)) {
    return kOutOfMemory;
  }
  const Slots slots(table, (*ids).first(size), bags.coefficients);
  char* out = static_cast<char*>(output.data);
  // The output of bags of one id is as large as all rows that are read. Where its
  // memory is new to the process, page faults would take longer than the reads.
  PreferHugePages(out, bags.num_bags * out_bytes);
  ForEachBag(
      pool, bags, bounds, cut, [&](int64_t slot) { slots.FetchFirst(slot); },
      [&](const Segments& segments, int64_t bag) {
        rows.sum(slots, segments, average, nullptr, output.type, out + bag * out_bytes);
      },
      [&](const Block& block) {
        rows.sum(slots, block.segment(), Average::kNone, nullptr, sum_type,
                 partials.data() + block.partial * sum_bytes);
      },
      [&](int64_t bag) { FillNaN(output.type, out + bag * out_bytes, width); },
      [&](int64_t bag, int64_t start, int64_t end) {
        const void* sum = AddPartials(sums, partials.data(), width, sum_bytes, bag,
                                      start, end, cut.block);
        const int64_t filled =
            average == Average::kNone ? 1 : slots.NumFilled(start, end);
        sums.average(sum, width, average, filled, output.type, out + bag * out_bytes);
      });
  return nullptr;
}

Error Extremum(const Loops& loops, Pool& pool, const Matrix& table, const Bags& bags,
               bool largest, void* output, int32_t* winners) {
  const RowLoops& rows = loops.over(table.type);
  const Type sum_type = SumType(table.type);
  const int64_t width = table.width;
  const int64_t sum_bytes = width * SizeOf(sum_type);
  const int32_t none = static_cast<int32_t>(bags.ids.size);
  const Cut cut(width * SizeOf(table.type), sum_bytes);
  BagIds ids;
  Bounds bounds;
  if (Error error = bounds.Read(bags)) return error;
  if (Error error = ids.Read(loops, pool, bags, table.rows)) return error;
  const int64_t size = bounds[bags.num_bags];
  char* out = static_cast<char*>(output);
  Scratch<char> partials;
  Scratch<int32_t> partial_winners;
  if (bounds.longest() > cut.block) {
    const int64_t count = NumPartials(size + bags.num_bags, cut.block);
    if (!partials.Allocate(count * sum_bytes) ||
        !partial_winners.Allocate(count * width)) {
      return kOutOfMemory;
    }
  }
  const Slots slots(table, (*ids).first(size), bags.coefficients);
  ForEachBag(
      pool, bags, bounds, cut, [&](int64_t slot) { slots.FetchFirst(slot); },
      [&](const Segments& segments, int64_t bag) {
        rows.extremum(slots, segments, largest, none, out + bag * sum_bytes,
                      winners + bag * width);
      },
      [&](const Block& block) {
        rows.extremum(slots, block.segment(), largest, none,
                      partials.data() + block.partial * sum_bytes,
                      partial_winners.data() + block.partial * width);
      },
      [&](int64_t bag) {
        FillNaN(sum_type, out + bag * sum_bytes, width);
        for (int64_t i = 0; i < width; ++i) winners[bag * width + i] = none;
      },
      [&](int64_t bag, int64_t start, int64_t end) {
        char* best = out + bag * sum_bytes;
        int32_t* best_slots = winners + bag * width;
        if (width > 0) memset(best, 0, static_cast<size_t>(sum_bytes));
        for (int64_t i = 0; i < width; ++i) best_slots[i] = none;
        const auto join =
            sum_type == Type::kFloat64 ? JoinExtremes<double> : JoinExtremes<float>;
        VisitPartials(bag, start, end, cut.block, [&](int64_t partial) {
          join(partials.data() + partial * sum_bytes,
               partial_winners.data() + partial * width, width, largest, none, best,
               best_slots);
        });
      });
  return nullptr;
}

Error Sddmm(const Loops& loops, Pool& pool, const Matrix& table,
            const Matrix& cotangent, const Bags& bags, void* output) {
  const int64_t size = bags.ids.size;
  const int64_t num_bags = bags.num_bags;
  const int64_t bag_bytes = table.width * SizeOf(cotangent.type);
  const int64_t dot_bytes = SizeOf(cotangent.type);
  const Cut cut(table.width * SizeOf(table.type), bag_bytes);
  BagIds ids;
  Bounds bounds;
  if (Error error = bounds.Read(bags)) return error;
  if (Error error = ids.Read(loops, pool, bags, table.rows)) return error;
  const Slots slots(table, *ids, nullptr);
  char* out = static_cast<char*>(output);
  const char* bag_rows = static_cast<const char*>(cotangent.data);
  // Zeros for the slots [first, last).
  const auto clear = [&](int64_t first, int64_t last) {
    if (first >= last) return;
    memset(out + first * dot_bytes, 0, static_cast<size_t>((last - first) * dot_bytes));
  };
  ParallelFor(pool, CeilDiv(size, cut.task), [&](int64_t task) {
    const int64_t from = task * cut.task;
    const int64_t to = Min(from + cut.task, size);
    slots.FetchFirst(from);
    int64_t bag = BagOf(bounds, num_bags, from);
    while (bag < num_bags && bounds[bag] < to) {
      int64_t last = bag;  // of the well-formed bags from this one on
      if (bounds.well_formed()) {
        last = FirstWhere(bag, num_bags, [&](int64_t b) { return bounds[b] >= to; });
      } else {
        while (last < num_bags && bounds[last] < to && !bounds.malformed(last)) ++last;
      }
      bounds.VisitSegments(bag, last, [&](const Segments& segments, int64_t first) {
        loops.over(table.type)
            .dots(slots, segments, from, to, bag_rows + first * bag_bytes, out);
      });
      bag = last;
      for (; bag < num_bags && bounds[bag] < to && bounds.malformed(bag); ++bag) {
        clear(Max(bounds[bag], from), Min(bounds[bag + 1], to));
      }
    }
    clear(Max(bounds[num_bags], from), to);
  });
  return nullptr;
}

}  // namespace jbag
