// How the slots of the bags are cut: into blocks that are summed in order, and into
// tasks that threads take.
//
// A bag is a row of blocks of a fixed size, counted from its first slot. Each block is
// reduced on its own and a bag's blocks are then combined in order, so that neither the
// threads nor the tasks have a say in the result. Tasks are cut by work, a bag's
// overhead counting as one slot: position(bag) = bounds[bag] + bag grows strictly, and
// task t does the blocks whose position lies in [t * task, (t + 1) * task). One huge
// bag is so many tasks; many empty bags are, too.

#ifndef JBAG_KERNELS_BLOCKS_H_
#define JBAG_KERNELS_BLOCKS_H_

#include <stdint.h>

#include "kernels/kernels.h"

namespace jbag {
namespace {

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t Clamp(int64_t x, int64_t low, int64_t high) {
  return Max(low, Min(x, high));
}
inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that is not initialised; `data` is null where there was not enough.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t size) { Allocate(size); }
  ~Scratch() { GiveBack(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool Allocate(int64_t size) {
    GiveBack(data_);
    data_ = static_cast<T*>(Borrow(Max(size, 1) * static_cast<int64_t>(sizeof(T))));
    return data_ != nullptr;
  }
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

// The smallest i in [low, high) for which `holds`, which stays true once it is; or
// high.
template <typename Predicate>
inline int64_t FirstWhere(int64_t low, int64_t high, Predicate holds) {
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (holds(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Bounds of the bags that partition the slots: the offsets as they are or, where some
// are malformed, the running maximum of what of them lies within the slots.
class Bounds {
 public:
  Error Read(const Bags& bags) {
    offsets_ = bags.offsets;
    length_ = bags.length;
    longest_ = bags.length;
    if (offsets_.data == nullptr) return nullptr;
    const bool well_formed = offsets_.is_64_bit ? Check<int64_t, uint64_t>(bags)
                                                : Check<int32_t, uint32_t>(bags);
    return well_formed ? nullptr : Repair(bags);
  }

  int64_t operator[](int64_t bag) const {
    if (offsets_.data == nullptr) return bag * length_;
    return offsets_[bag];
  }
  // No bag is malformed.
  bool well_formed() const { return moved_.data() == nullptr; }
  // The bag's own bounds had to be repaired: it is NaN and receives nothing.
  bool malformed(int64_t bag) const {
    return moved_.data() != nullptr && (moved_[bag] || moved_[bag + 1]);
  }
  int64_t longest() const { return longest_; }

 private:
  template <typename Offset, typename Unsigned>
  bool Check(const Bags& bags) {
    const Offset* offsets = static_cast<const Offset*>(offsets_.data);
    bool falls = offsets[0] != 0;
    Unsigned longest = 0;
    for (int64_t bag = 0; bag < bags.num_bags; ++bag) {
      const Offset start = offsets[bag];
      const Offset end = offsets[bag + 1];
      // Unsigned, as the difference of malformed ones may overflow.
      const Unsigned length = static_cast<Unsigned>(end) - static_cast<Unsigned>(start);
      falls |= end < start;
      longest = length > longest ? length : longest;
    }
    longest_ = static_cast<int64_t>(longest);
    return !falls && static_cast<int64_t>(offsets[bags.num_bags]) <= bags.ids.size;
  }

  Error Repair(const Bags& bags) {
    if (!repaired_.Allocate(bags.num_bags + 1)) return kOutOfMemory;
    if (!moved_.Allocate(bags.num_bags + 1)) return kOutOfMemory;
    int64_t bound = 0;
    longest_ = 0;
    for (int64_t i = 0; i <= bags.num_bags; ++i) {
      const int64_t offset = offsets_[i];
      const int64_t before = bound;
      if (i > 0) bound = Max(bound, Min(offset, bags.ids.size));
      longest_ = Max(longest_, bound - before);
      repaired_[i] = bound;
      moved_[i] = bound != offset;
    }
    offsets_ = {repaired_.data(), true, bags.num_bags + 1};
    return nullptr;
  }

  Integers offsets_ = {nullptr, false, 0};
  int64_t length_ = 0;
  int64_t longest_ = 0;
  Scratch<int64_t> repaired_;
  Scratch<bool> moved_;
};

// The bytes of the cache lines that a row lies in, wherever it starts.
inline int64_t LinesOf(int64_t row_bytes) { return CeilDiv(row_bytes + 63, 64) * 64; }

// Sizes that depend on the width of a row alone.
struct Cut {
  int64_t block;  // slots
  int64_t task;   // slots and bags

  Cut(int64_t row_bytes, int64_t sum_bytes)
      : block(Clamp((1 << 17) / Max(sum_bytes, 1), 32, 2048)),
        task(Clamp((1 << 18) / LinesOf(row_bytes), 64, 16384)) {}
};

struct Block {
  int64_t bag;
  int64_t first;  // slots [first, last)
  int64_t last;
  bool whole;       // the only block of its bag
  int64_t partial;  // else where its reduction goes
};

// Where the partial reductions of a bag of several blocks lie. Its first block and its
// later ones are each more than `block` positions away from any other bag's.
inline int64_t PartialIndex(int64_t position, bool first, int64_t block) {
  return position / block * 2 + (first ? 0 : 1);
}
inline int64_t NumPartials(int64_t positions, int64_t block) {
  return (positions / block + 1) * 2;
}

// Visits the blocks of bag `bag`, slots [start, end), whose positions lie in [from,
// to).
template <typename Visit>
inline void VisitBlocks(int64_t bag, int64_t start, int64_t end, int64_t block,
                        int64_t from, int64_t to, Visit visit) {
  const int64_t position = start + bag;
  if (end - start <= block) {
    if (position >= from && position < to) visit(Block{bag, start, end, true, 0});
    return;
  }
  int64_t skipped = from > position ? CeilDiv(from - position, block) * block : 0;
  for (; start + skipped < end && position + skipped < to; skipped += block) {
    const int64_t first = start + skipped;
    visit(Block{bag, first, Min(first + block, end), false,
                PartialIndex(position + skipped, skipped == 0, block)});
  }
}

// Calls combine(partial) for the blocks of a bag of several, in order.
template <typename Combine>
inline void VisitPartials(int64_t bag, int64_t start, int64_t end, int64_t block,
                          Combine combine) {
  for (int64_t first = start; first < end; first += block) {
    combine(PartialIndex(bag + first, first == start, block));
  }
}

// Adds up the partial sums of a bag of several blocks, each a row of `width`, in order;
// the first takes up the others, and is returned.
template <typename A>
inline A* AddPartials(A* partials, int64_t width, int64_t bag, int64_t start,
                      int64_t end, int64_t block) {
  A* sums = nullptr;
  VisitPartials(bag, start, end, block, [&](int64_t partial) {
    A* part = partials + partial * width;
    if (sums == nullptr) {
      sums = part;
    } else {
      for (int64_t i = 0; i < width; ++i) sums[i] += part[i];
    }
  });
  return sums;
}

inline int64_t NumTasks(int64_t positions, const Cut& cut) {
  return CeilDiv(positions, cut.task);
}

// The last bag that starts at or before a position.
inline int64_t BagAt(const Bounds& bounds, int64_t num_bags, int64_t position) {
  return FirstWhere(1, num_bags,
                    [&](int64_t bag) { return bounds[bag] + bag > position; }) -
         1;
}

// The bag of a slot: the first that ends past it, or `num_bags`.
inline int64_t BagOf(const Bounds& bounds, int64_t num_bags, int64_t slot) {
  return FirstWhere(0, num_bags, [&](int64_t bag) { return bounds[bag + 1] > slot; });
}

}  // namespace
}  // namespace jbag

#endif  // JBAG_KERNELS_BLOCKS_H_
