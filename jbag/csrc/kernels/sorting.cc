#include "kernels/sorting.h"

#include <stdint.h>
#include <string.h>

namespace jbag {
namespace {

// A filled slot: the row it names, its bag and, unless all are 1, its coefficient.
template <typename C>
struct Entry {
  Entry() = default;
  Entry(int32_t id, int64_t of, const char* coefficients, int64_t slot)
      : row(static_cast<uint32_t>(id)), bag(static_cast<int32_t>(of)) {
    memcpy(&coefficient, coefficients + slot * sizeof(C), sizeof(C));
  }
  void PutCoefficient(char* to, int64_t at) const {
    memcpy(to + at * sizeof(C), &coefficient, sizeof(C));
  }

  uint32_t row;
  int32_t bag;
  C coefficient;
};
template <>
struct Entry<void> {
  Entry() = default;
  Entry(int32_t id, int64_t of, const char*, int64_t)
      : row(static_cast<uint32_t>(id)), bag(static_cast<int32_t>(of)) {}
  void PutCoefficient(char*, int64_t) const {}

  uint32_t row;
  int32_t bag;
};

constexpr int kMostBits = 11;

// Calls visitor(entry) for the slots in [first, last) that lie in a bag and name a row.
template <typename Slot, typename Visitor>
inline void VisitFilled(const Bags& bags, const Ids& ids, const Bounds& bounds,
                        int64_t num_rows, int64_t first, int64_t last, bool bags_matter,
                        const Visitor& visitor) {
  const int32_t* named = ids.data;
  const uint32_t past = static_cast<uint32_t>(num_rows);
  const char* coefficients = static_cast<const char*>(bags.coefficients);
  const int32_t empty = ids.empty;
  const auto visit = [=](int64_t slot, int64_t end, int64_t bag) {
    for (; slot < end; ++slot) {
      const int32_t id = named[slot];
      if (static_cast<uint32_t>(id) >= past || id == empty) continue;
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

}  // namespace

template <typename C>
Error SortedSlots::SortAs(Pool& pool, const Bags& bags, const Ids& ids,
                          const Bounds& bounds, int64_t num_rows) {
  using Slot = Entry<C>;
  using Key = uint32_t;
  constexpr int64_t coefficient_size = sizeof(Slot) - sizeof(Entry<void>);
  int bits = 1;
  while ((static_cast<uint64_t>(num_rows - 1) >> bits) > 0) ++bits;
  const int passes = static_cast<int>(CeilDiv(bits, kMostBits));
  const int pass_bits = static_cast<int>(CeilDiv(bits, passes));
  const int64_t num_digits = int64_t{1} << pass_bits;
  const int64_t chunk = Max(1 << 11, CeilDiv(size_, Min(2 * pool.num_threads(), 64)));
  Scratch<Slot> entries[2];
  Scratch<uint32_t> counts;
  if (!rows_.Allocate(size_) || !bags_.Allocate(size_) ||
      (weighted_ && !coefficients_.Allocate(size_ * coefficient_size)) ||
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
      } else {
        VisitFilled<Slot>(bags, ids, bounds, num_rows, first, last, bags_matter,
                          visit_entry);
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
        visit(which, true,
              [next, to](Key digit, const Slot& entry) { to[next[digit]++] = entry; });
        return;
      }
      int32_t* rows = rows_.data();
      int32_t* of = bags_.data();
      char* coefficients = coefficients_.data();
      visit(which, true, [next, rows, of, coefficients](Key digit, const Slot& entry) {
        const uint32_t at = next[digit]++;
        rows[at] = static_cast<int32_t>(entry.row);
        of[at] = entry.bag;
        entry.PutCoefficient(coefficients, at);
      });
    });
    size_ = total;
  }
  return nullptr;
}

Error SortedSlots::Sort(Pool& pool, const Bags& bags, const Ids& ids,
                        const Bounds& bounds, int64_t num_rows, Type sums) {
  weighted_ = bags.coefficients != nullptr;
  size_ = bounds[bags.num_bags];
  if (!weighted_) return SortAs<void>(pool, bags, ids, bounds, num_rows);
  return SizeOf(sums) == sizeof(uint64_t)
             ? SortAs<uint64_t>(pool, bags, ids, bounds, num_rows)
             : SortAs<uint32_t>(pool, bags, ids, bounds, num_rows);
}

}  // namespace jbag
