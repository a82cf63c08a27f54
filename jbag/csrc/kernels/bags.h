// Bags as the operations read them: ids and bounds in 32 bits, and how the slots are
// divided into blocks, which are summed in order, and into tasks, which threads run.
//
// A bag is a sequence of blocks of a fixed size, counted from its first slot. Each
// block is reduced on its own and a bag's blocks are then combined in order, so that
// neither the threads nor the tasks have a say in the result. Tasks are cut by work, a
// bag's overhead counting as one slot: position(bag) = bounds[bag] + bag grows
// strictly, and task t does the blocks whose position lies in [t * task, (t + 1) *
// task). One huge bag thus becomes many tasks, and so do many
// empty bags.

#ifndef JBAG_KERNELS_BAGS_H_
#define JBAG_KERNELS_BAGS_H_

#include <stdint.h>

#include "kernels/gathered_rows.h"
#include "kernels/integer_math.h"
#include "kernels/kernels.h"
#include "kernels/simd_loops.h"

namespace jbag {

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

// The ids of bags in 32 bits, which the loops read.
//
// Traffic: none for 32-bit ids; 12 bytes a slot for 64-bit ones.
class BagIds {
 public:
  Error Read(const Loops& loops, Pool& pool, const Bags& bags, int64_t num_rows) {
    if (num_rows > INT32_MAX) return kTooManyRows;
    const int64_t size = bags.ids.size;
    ids_.size = size;
    if (!bags.ids.is_64_bit) {
      // No slot has a padding id that 32 bits can't hold.
      const bool has_empty =
          bags.has_empty && bags.empty >= INT32_MIN && bags.empty <= INT32_MAX;
      ids_.data = static_cast<const int32_t*>(bags.ids.data);
      ids_.has_empty = has_empty;
      ids_.empty = has_empty ? static_cast<int32_t>(bags.empty) : kNarrowOutOfRange;
      return nullptr;
    }
    if (!narrow_.Allocate(size)) return kOutOfMemory;
    const int64_t* from = static_cast<const int64_t*>(bags.ids.data);
    ParallelFor(pool, CeilDiv(size, kPart), [&](int64_t part) {
      const int64_t first = part * kPart;
      loops.narrow(from + first, Min(kPart, size - first), num_rows, bags.has_empty,
                   bags.empty, narrow_.data() + first);
    });
    ids_.data = narrow_.data();
    ids_.has_empty = bags.has_empty;
    ids_.empty = bags.has_empty ? kNarrowEmpty : kNarrowOutOfRange;
    return nullptr;
  }

  const Ids& operator*() const { return ids_; }

 private:
  static constexpr int64_t kPart = 1 << 16;

  Ids ids_ = {};
  Scratch<int32_t> narrow_;
};

// Bounds of the bags that partition the slots, in 32 bits: the offsets as they are or,
// where some are malformed, the running maximum of those that lie within the slots.
//
// Traffic: the offsets once; 64-bit ones are written as 32-bit ones, too.
class Bounds {
 public:
  Error Read(const Bags& bags) {
    num_bags_ = bags.num_bags;
    length_ = bags.length;
    longest_ = bags.length;
    ragged_ = bags.offsets.data != nullptr;
    if (!ragged_) return nullptr;
    bool well_formed;
    if (bags.offsets.is_64_bit) {
      if (!own_.Allocate(num_bags_ + 1)) return kOutOfMemory;
      bounds_ = own_.data();
      well_formed = Check<int64_t, uint64_t>(bags);
    } else {
      bounds_ = static_cast<const int32_t*>(bags.offsets.data);
      well_formed = Check<int32_t, uint32_t>(bags);
    }
    return well_formed ? nullptr : Repair(bags);
  }

  int64_t operator[](int64_t bag) const {
    return ragged_ ? bounds_[bag] : bag * length_;
  }
  // No bag is malformed.
  bool well_formed() const { return moved_.data() == nullptr; }
  // Whether a bag's bounds had to be repaired: such a bag is NaN and receives nothing.
  bool malformed(int64_t bag) const {
    return moved_.data() != nullptr && (moved_[bag] || moved_[bag + 1]);
  }
  int64_t longest() const { return longest_; }

  // Calls f(segments, bag) for parts of the bags [first, last), of which `bag` is the
  // first one.
  template <typename F>
  void VisitSegments(int64_t first, int64_t last, F f) const {
    if (ragged_) {
      if (first < last) {
        f(Segments{bounds_ + first, bounds_ + first + 1, last - first}, first);
      }
      return;
    }
    constexpr int64_t kMost = 256;
    int32_t bounds[kMost + 1];
    for (; first < last; first += kMost) {
      const int64_t count = Min(kMost, last - first);
      for (int64_t i = 0; i <= count; ++i) {
        bounds[i] = static_cast<int32_t>((first + i) * length_);
      }
      f(Segments{bounds, bounds + 1, count}, first);
    }
  }

 private:
  template <typename Offset, typename Unsigned>
  bool Check(const Bags& bags) {
    const Offset* offsets = static_cast<const Offset*>(bags.offsets.data);
    int32_t* narrow = own_.data();
    bool falls = offsets[0] != 0;
    Unsigned longest = 0;
    for (int64_t bag = 0; bag < bags.num_bags; ++bag) {
      const Offset start = offsets[bag];
      const Offset end = offsets[bag + 1];
      // Unsigned, as the difference of malformed ones may overflow.
      const Unsigned length = static_cast<Unsigned>(end) - static_cast<Unsigned>(start);
      falls |= end < start;
      longest = length > longest ? length : longest;
      if (sizeof(Offset) > sizeof(int32_t)) narrow[bag + 1] = static_cast<int32_t>(end);
    }
    if (sizeof(Offset) > sizeof(int32_t)) narrow[0] = 0;
    longest_ = static_cast<int64_t>(longest);
    return !falls && static_cast<int64_t>(offsets[bags.num_bags]) <= bags.ids.size;
  }

  Error Repair(const Bags& bags) {
    if (!own_.Allocate(num_bags_ + 1)) return kOutOfMemory;
    if (!moved_.Allocate(num_bags_ + 1)) return kOutOfMemory;
    int64_t bound = 0;
    longest_ = 0;
    for (int64_t i = 0; i <= num_bags_; ++i) {
      const int64_t offset = bags.offsets[i];
      const int64_t before = bound;
      if (i > 0) bound = Max(bound, Min(offset, bags.ids.size));
      longest_ = Max(longest_, bound - before);
      own_[i] = static_cast<int32_t>(bound);
      moved_[i] = bound != offset;
    }
    bounds_ = own_.data();
    return nullptr;
  }

  bool ragged_ = false;
  const int32_t* bounds_ = nullptr;
  int64_t num_bags_ = 0;
  int64_t length_ = 0;
  int64_t longest_ = 0;
  Scratch<int32_t> own_;
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
  int32_t first;  // slots [first, last)
  int32_t last;
  int64_t partial;  // where its reduction goes

  Segments segment() const { return {&first, &last, 1}; }
};

// The index of a block's partial reduction, for bags of several blocks. First blocks
// are more than `block` positions away from other first blocks, and later blocks from
// later blocks of other bags: hence two places for each `block` positions.
inline int64_t PartialIndex(int64_t position, bool first, int64_t block) {
  return position / block * 2 + (first ? 0 : 1);
}
inline int64_t NumPartials(int64_t positions, int64_t block) {
  return (positions / block + 1) * 2;
}

// Visits the blocks of a bag of several, slots [start, end), whose positions lie in
// [from, to).
template <typename Visit>
void VisitBlocks(int64_t bag, int64_t start, int64_t end, int64_t block, int64_t from,
                 int64_t to, Visit visit) {
  const int64_t position = start + bag;
  int64_t skipped = from > position ? CeilDiv(from - position, block) * block : 0;
  for (; start + skipped < end && position + skipped < to; skipped += block) {
    const int64_t first = start + skipped;
    visit(Block{static_cast<int32_t>(first),
                static_cast<int32_t>(Min(first + block, end)),
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

// Adds up the partial sums of a bag of several blocks, each a row of `row_bytes`, in
// order; the first takes up the others, and is returned.
inline void* AddPartials(const SumLoops& loops, char* partials, int64_t width,
                         int64_t row_bytes, int64_t bag, int64_t start, int64_t end,
                         int64_t block) {
  char* sums = nullptr;
  VisitPartials(bag, start, end, block, [&](int64_t partial) {
    char* part = partials + partial * row_bytes;
    if (sums == nullptr) {
      sums = part;
    } else {
      loops.add(sums, part, width);
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

// The first bag that starts at a position or after it, or `num_bags`.
inline int64_t FirstBagFrom(const Bounds& bounds, int64_t num_bags, int64_t position) {
  return FirstWhere(0, num_bags,
                    [&](int64_t bag) { return bounds[bag] + bag >= position; });
}

// The bag of a slot: the first that ends past it, or `num_bags`.
inline int64_t BagOf(const Bounds& bounds, int64_t num_bags, int64_t slot) {
  return FirstWhere(0, num_bags, [&](int64_t bag) { return bounds[bag + 1] > slot; });
}

}  // namespace jbag

#endif  // JBAG_KERNELS_BAGS_H_
