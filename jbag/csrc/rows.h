// Reductions of gathered rows, feature by feature, in registers.
//
// A row of D features is read in vectors of W, the widest that fit in D and the
// machine; the last one overlaps the one before where W doesn't divide D, so
// that any D takes no masks and no scalar tail. Up to eight vectors make a
// tile; wider rows take several passes over the slots, whose rows are in cache
// by then.
//
// Traffic: each row once from memory, fetched some slots ahead; sums stay in
// registers.

#ifndef JBAG_ROWS_H_
#define JBAG_ROWS_H_

#include <stdint.h>

#include "blocks.h"
#include "numbers.h"

namespace jbag {
namespace {

template <typename A>
constexpr A kNaN = __builtin_nan("");

// The rows that slots name, and their coefficients.
template <typename Row, typename Id>
class Slots {
 public:
  using A = Sum<Row>;

  // Slots [0, size) of the bags.
  Slots(const Matrix& table, const Bags& bags, int64_t size)
      : table_(static_cast<const Row*>(table.data)),
        rows_(static_cast<uint64_t>(table.rows)),
        stride_(table.width),
        width_(table.width),
        ids_(static_cast<const Id*>(bags.ids.data)),
        coefficients_(bags.coefficients == nullptr
                          ? &kOne
                          : static_cast<const A*>(bags.coefficients)),
        mask_(bags.coefficients == nullptr ? 0 : -1),
        has_empty_(bags.has_empty),
        empty_(bags.has_empty ? static_cast<uint64_t>(bags.empty) : kNoRow),
        last_(size - 1),
        fetched_(Min(RowBytes(), kMostFetched)),
        ahead_(Clamp(kBytesAhead / Max(RowBytes(), 1), 8, 32)) {}

  // The same slots, of a table of the columns [column, column + width) alone.
  Slots Columns(int64_t column, int64_t width) const {
    Slots some = *this;
    some.table_ += column;
    some.width_ = width;
    some.fetched_ = Min(some.RowBytes(), kMostFetched);
    return some;
  }

  int64_t width() const { return width_; }
  bool weighted() const { return mask_ != 0; }
  bool empty(int64_t slot) const { return has_empty_ && id(slot) == empty_; }
  // The row of a slot, or null where there is none.
  const Row* row(int64_t slot) const {
    const uint64_t named = id(slot);
    return __builtin_expect(named < rows_ && named != empty_, 1)
               ? table_ + named * stride_
               : nullptr;
  }
  // Without coefficients the mask picks the one for every slot.
  A coefficient(int64_t slot) const { return coefficients_[slot & mask_]; }

  // Fetches the row of the slot some slots ahead of this one. Inlined by force:
  // GCC takes a function that only prefetches for one that does nothing, and
  // drops the call.
  __attribute__((always_inline)) void FetchAhead(int64_t slot) const {
    Fetch(Min(slot + ahead_, last_));
  }
  // Fetches what would have been fetched before `slot`, where a thread starts
  // anew.
  __attribute__((always_inline)) void FetchFirst(int64_t slot) const {
    for (int64_t i = 0; i < ahead_ && slot + i <= last_; ++i) Fetch(slot + i);
  }

 private:
  static constexpr uintptr_t kLine = 64;
  static constexpr int64_t kBytesAhead = 1 << 12;
  // What is longer is left to the hardware, which has seen by then where it
  // leads.
  static constexpr int64_t kMostFetched = 32 * kLine;
  static constexpr A kOne = 1;
  static constexpr uint64_t kNoRow = UINT64_MAX;

  // Negative ids are past every row.
  uint64_t id(int64_t slot) const {
    return static_cast<uint64_t>(static_cast<int64_t>(ids_[slot]));
  }

  int64_t RowBytes() const { return width_ * static_cast<int64_t>(sizeof(Row)); }

  __attribute__((always_inline)) void Fetch(int64_t slot) const {
    const uint64_t named = id(slot);
    // An integer: there may be no table.
    const uintptr_t row = reinterpret_cast<uintptr_t>(table_) +
                          (named < rows_ ? named : 0) * stride_ * sizeof(Row);
    const uintptr_t end = row + fetched_;
    for (uintptr_t line = row & ~(kLine - 1); line < end; line += kLine) {
      __builtin_prefetch(reinterpret_cast<const void*>(line));
    }
  }

  const Row* table_;
  uint64_t rows_;
  int64_t stride_;
  int64_t width_;
  const Id* ids_;
  const A* coefficients_;
  int64_t mask_;
  bool has_empty_;
  uint64_t empty_;
  int64_t last_;
  int64_t fetched_;  // bytes of a row
  int64_t ahead_;    // slots
};
template <typename Row, typename Id>
constexpr Sum<Row> Slots<Row, Id>::kOne;

// Calls f with the slots of the bags, their ids being of either width.
template <typename Row, typename F>
inline void WithSlots(const Matrix& table, const Bags& bags, int64_t size, F f) {
  if (bags.ids.wide) {
    f(Slots<Row, int64_t>(table, bags, size));
  } else {
    f(Slots<Row, int32_t>(table, bags, size));
  }
}

constexpr int kMostVectors = 8;

// Where vector j of K stands in a tile: the last one ends where the tile does.
template <int W, int K>
inline int64_t Offset(int j, int64_t last_offset) {
  return j < K - 1 ? j * W : last_offset;
}

template <int W, int K, typename F>
inline void Tile(int vectors, int64_t column, int64_t last_offset, F& f) {
  if constexpr (K < kMostVectors) {
    if (vectors > K) {
      Tile<W, K + 1>(vectors, column, last_offset, f);
      return;
    }
  }
  f.template operator()<W, K>(column, last_offset);
}

// Calls f.operator()<W, K>(column, last_offset) for tiles that cover [0, width)
// and don't overlap.
template <typename A, int W = kWidth<A>, typename F>
inline void Tiles(int64_t width, F& f) {
  if constexpr (W > 1) {
    if (width < W) {
      Tiles<A, W / 2>(width, f);
      return;
    }
  }
  if constexpr (W < kWidth<A>) {
    // Less than a vector of twice the width.
    if (width == W) {
      f.template operator()<W, 1>(0, 0);
    } else if (width > W) {
      f.template operator()<W, 2>(0, width - W);
    }
  } else {
    constexpr int64_t kColumns = kMostVectors * W;
    int64_t column = 0;
    for (; width - column >= kColumns + W; column += kColumns) {
      f.template operator()<W, kMostVectors>(column, kColumns - W);
    }
    if (width - column > kColumns) {
      // Less than a vector must not be left over.
      f.template operator()<W, kMostVectors - 1>(column, kColumns - 2 * W);
      column += kColumns - W;
    }
    const int64_t left = width - column;
    if (left > 0) {
      Tile<W, 1>(static_cast<int>(CeilDiv(left, W)), column, left - W, f);
    }
  }
}

// sums = the sum of the rows of the slots [first, last) times their
// coefficients.
template <typename Row, typename Id, bool kWeighted>
struct SumRows {
  const Slots<Row, Id> slots;  // a copy, that what it holds stays in registers
  int64_t first;
  int64_t last;
  Sum<Row>* sums;
  bool unknown = false;  // set where an id names no row: then the sums are void

  template <int W, int K>
  void operator()(int64_t column, int64_t last_offset) {
    using V = Vector<Sum<Row>, W>;
    V total[K] = {};
    for (int64_t slot = first; slot < last; ++slot) {
      if (column == 0) slots.FetchAhead(slot);
      const Row* row = slots.row(slot);
      if (row == nullptr) {
        if (slots.empty(slot)) continue;
        unknown = true;
        return;
      }
      row += column;
      const V coefficient = slots.coefficient(slot) - V{};
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) {
        const V values = Load<W>(row + Offset<W, K>(j, last_offset));
        total[j] += kWeighted ? coefficient * values : values;
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      Store<W>(sums + column + Offset<W, K>(j, last_offset), total[j]);
    }
  }
};

template <typename A>
inline void Fill(A* out, int64_t size, A value) {
  for (int64_t i = 0; i < size; ++i) out[i] = value;
}

template <typename Row, typename Id>
inline void SumOf(const Slots<Row, Id>& slots, int64_t first, int64_t last,
                  Sum<Row>* sums) {
  const auto run = [&](auto sum) {
    Tiles<Sum<Row>>(slots.width(), sum);
    if (sum.unknown) Fill(sums, slots.width(), kNaN<Sum<Row>>);
  };
  if (slots.weighted()) {
    run(SumRows<Row, Id, true>{slots, first, last, sums});
  } else {
    run(SumRows<Row, Id, false>{slots, first, last, sums});
  }
}

template <typename A>
struct SlotNumber {
  using Type = int32_t;
};
template <>
struct SlotNumber<double> {
  using Type = int64_t;
};

// The first largest of the rows times their coefficients times `sign`, which is
// 1 or -1, and its slot. NaN beats every number and no NaN.
template <typename Row, typename Id>
struct LargestRows {
  const Slots<Row, Id> slots;
  int64_t first;  // a filled slot
  int64_t last;
  Sum<Row> sign;
  Sum<Row>* values;
  int32_t* winners;
  int64_t end = 0;  // where the first id that names no row stands, or `last`

  template <int W, int K>
  void operator()(int64_t column, int64_t last_offset) {
    using A = Sum<Row>;
    using V = Vector<A, W>;
    using S = Vector<typename SlotNumber<A>::Type, W>;
    V best[K];
    S best_slots[K];
    const Row* row = slots.row(first) + column;
    V coefficient = sign * slots.coefficient(first) - V{};
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      best[j] = coefficient * Load<W>(row + Offset<W, K>(j, last_offset));
      best_slots[j] = S{} + static_cast<int32_t>(first);
    }
    if (column == 0) slots.FetchAhead(first);
    for (end = first + 1; end < last; ++end) {
      if (column == 0) slots.FetchAhead(end);
      row = slots.row(end);
      if (row == nullptr) {
        if (slots.empty(end)) continue;
        break;
      }
      row += column;
      coefficient = sign * slots.coefficient(end) - V{};
      const S slot = S{} + static_cast<int32_t>(end);
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) {
        const V value = coefficient * Load<W>(row + Offset<W, K>(j, last_offset));
        // A NaN compares as false: it isn't worse, and what is one stays.
        const S worse = value <= best[j];
        const S wins = ~worse & (best[j] == best[j]);
        best[j] = wins ? value : best[j];
        best_slots[j] = wins ? slot : best_slots[j];
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      const int64_t at = column + Offset<W, K>(j, last_offset);
      Store<W>(values + at, sign * best[j]);
      const auto narrow = __builtin_convertvector(best_slots[j], Vector<int32_t, W>);
      memcpy(winners + at, &narrow, sizeof(narrow));
    }
  }
};

// Writes the extremes of the slots [first, last), or zeros and `none` if all
// are empty.
template <typename Row, typename Id>
inline void ExtremesOf(const Slots<Row, Id>& slots, int64_t first, int64_t last,
                       bool largest, int32_t none, Sum<Row>* values, int32_t* winners) {
  using A = Sum<Row>;
  const int64_t width = slots.width();
  while (first < last && slots.empty(first)) ++first;
  if (first == last) {
    Fill(values, width, A{0});
    Fill(winners, width, none);
    return;
  }
  if (slots.row(first) == nullptr) {
    Fill(values, width, kNaN<A>);
    Fill(winners, width, static_cast<int32_t>(first));
    return;
  }
  const A sign = largest ? 1 : -1;
  LargestRows<Row, Id> best{slots, first, last, sign, values, winners};
  Tiles<A>(width, best);
  if (best.end >= last) return;
  // A row of NaN, which beats all but the NaNs before it. Those after it are
  // beaten.
  for (int64_t i = 0; i < width; ++i) {
    if (values[i] != values[i]) continue;
    values[i] = kNaN<A>;
    winners[i] = static_cast<int32_t>(best.end);
  }
}

// <a, b>: four running vectors, then ever narrower ones for what is left.
template <int W, typename Row>
inline Sum<Row> DotTail(const Row* a, const Sum<Row>* b, int64_t width) {
  Sum<Row> sum = 0;
  if (width >= W) {
    const Vector<Sum<Row>, W> products = Load<W>(a) * Load<W>(b);
    for (int lane = 0; lane < W; ++lane) sum += products[lane];
    a += W;
    b += W;
    width -= W;
  }
  if constexpr (W > 1) sum += DotTail<W / 2>(a, b, width);
  return sum;
}

template <typename Row>
inline Sum<Row> Dot(const Row* a, const Sum<Row>* b, int64_t width) {
  using A = Sum<Row>;
  constexpr int W = kWidth<A>;
  using V = Vector<A, W>;
  V sums[4] = {};
  int64_t at = 0;
  for (; at + 4 * W <= width; at += 4 * W) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      sums[j] += Load<W>(a + at + j * W) * Load<W>(b + at + j * W);
    }
  }
  for (; at + W <= width; at += W) sums[0] += Load<W>(a + at) * Load<W>(b + at);
  const V total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  A sum = 0;
  for (int lane = 0; lane < W; ++lane) sum += total[lane];
  if constexpr (W > 1) sum += DotTail<W / 2>(a + at, b + at, width - at);
  return sum;
}

}  // namespace
}  // namespace jbag

#endif  // JBAG_ROWS_H_
