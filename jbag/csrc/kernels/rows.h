// Reductions of gathered rows, feature by feature, in registers.
//
// A row of D features is read in vectors of W, the widest that fit in D and the
// machine; the last one overlaps the one before where W doesn't divide D, so that any D
// takes no masks and no scalar tail. Up to eight vectors make a tile; wider rows take
// several passes over the slots, whose rows are in cache by then.
//
// Traffic: each row once from memory, fetched some slots ahead; sums stay in registers.

#ifndef JBAG_KERNELS_ROWS_H_
#define JBAG_KERNELS_ROWS_H_

#include <stdint.h>

#include "kernels/blocks.h"
#include "kernels/numbers.h"

namespace jbag {
namespace {

// Where vector j of K stands in a tile: the last one ends where the tile does.
template <int W, int K>
inline int64_t Offset(int j, int64_t last_offset) {
  return j < K - 1 || K == 1 ? j * W : last_offset;
}

// The rows that slots name, and their coefficients.
template <typename Row, typename Id>
class Slots {
 public:
  using A = Sum<Row>;

  // Slots [0, size) of the bags.
  Slots(const Matrix& table, const Bags& bags, int64_t size)
      : table_(static_cast<const Row*>(table.data)),
        rows_(static_cast<uint64_t>(table.rows)),
        stride_(table.width * sizeof(Row)),
        width_(table.width),
        ids_(static_cast<const Id*>(bags.ids.data)),
        coefficients_(bags.coefficients == nullptr
                          ? &kOne
                          : static_cast<const A*>(bags.coefficients)),
        mask_(bags.coefficients == nullptr ? 0 : -1),
        has_empty_(bags.has_empty),
        empty_(bags.has_empty ? static_cast<uint64_t>(bags.empty) : kNoRow),
        last_(size - 1),
        ahead_(Clamp(kBytesAhead / Max(stride_, 1), 8, 32)),
        straddles_(Straddles(reinterpret_cast<uintptr_t>(table.data), stride_)) {}

  // The same slots, of a table of the columns [column, column + width) alone.
  Slots Columns(int64_t column, int64_t width) const {
    Slots some = *this;
    some.table_ += column;
    some.width_ = width;
    return some;
  }
  // The same slots for a loop that ends before `last`, which must not fetch past the
  // last slot of all.
  Slots Until(int64_t last) const {
    Slots some = *this;
    some.ahead_ = Min(ahead_, last_ - (last - 1));
    return some;
  }

  int64_t width() const { return width_; }
  bool weighted() const { return mask_ != 0; }
  bool empty(int64_t slot) const { return has_empty_ && id(slot) == empty_; }
  // The number of slots in [first, last) that aren't empty.
  int64_t NumFilled(int64_t first, int64_t last) const {
    int64_t count = last - first;
    if (has_empty_) {
      for (int64_t slot = first; slot < last; ++slot) count -= id(slot) == empty_;
    }
    return count;
  }
  // The row of a slot, or null where there is none.
  const Row* row(int64_t slot) const {
    const uint64_t named = id(slot);
    if (__builtin_expect(named >= rows_ || named == empty_, 0)) return nullptr;
    return reinterpret_cast<const Row*>(Address(named));
  }
  // Without coefficients the mask picks the one for every slot.
  A coefficient(int64_t slot) const { return coefficients_[slot & mask_]; }

  // Fetches, of the row of the slot some slots ahead of this one, what a tile of K
  // vectors of W reads. Inlined by force: GCC takes a function that only prefetches for
  // one that does nothing, and drops the call.
  template <int W, int K>
  __attribute__((always_inline)) void FetchAhead(int64_t slot,
                                                 int64_t last_offset) const {
    const uintptr_t tile = Address(id(slot + ahead_));
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      if (j * W * sizeof(Row) % kLine == 0) {
        Prefetch(tile + Offset<W, K>(j, last_offset) * sizeof(Row));
      }
    }
    if (!straddles_) return;
    // A line that isn't fetched yet; twice the same would be two page walks.
    const uintptr_t start = tile + Offset<W, K>(K - 1, last_offset) * sizeof(Row);
    const uintptr_t end = start + W * sizeof(Row) - 1;
    const uintptr_t here = reinterpret_cast<uintptr_t>(ids_ + slot);
    Prefetch(start / kLine == end / kLine ? here : end);
  }
  // Fetches the whole row of the slot some slots ahead.
  __attribute__((always_inline)) void FetchAhead(int64_t slot) const {
    Fetch(Min(slot + ahead_, last_));
  }
  // Fetches what would have been fetched before `slot`, where a thread starts anew.
  __attribute__((always_inline)) void FetchFirst(int64_t slot) const {
    for (int64_t i = 0; i < ahead_ && slot + i <= last_; ++i) Fetch(slot + i);
  }

 private:
  static constexpr uintptr_t kLine = 64;
  static constexpr int64_t kBytesAhead = 1 << 12;
  static constexpr A kOne = 1;
  static constexpr uint64_t kNoRow = UINT64_MAX;

  // Negative ids are past every row.
  uint64_t id(int64_t slot) const {
    return static_cast<uint64_t>(static_cast<int64_t>(ids_[slot]));
  }

  // Whether some row of a table starts within a line and ends in the next.
  static bool Straddles(uintptr_t table, uintptr_t stride) {
    return stride % kLine == 0
               ? table % kLine != 0
               : stride == 0 || kLine % stride != 0 || table % stride != 0;
  }

  // Where the row of an id is: an integer, as it may be none of the table's, which does
  // no harm to what only fetches.
  uintptr_t Address(uint64_t named) const {
    return reinterpret_cast<uintptr_t>(table_) + named * stride_;
  }

  __attribute__((always_inline)) static void Prefetch(uintptr_t address) {
    __builtin_prefetch(reinterpret_cast<const void*>(address));
  }

  __attribute__((always_inline)) void Fetch(int64_t slot) const {
    const uintptr_t row = Address(id(slot));
    const uintptr_t bytes = width_ * sizeof(Row);
    // By distances: the address of a row that isn't there may wrap.
    for (uintptr_t at = 0; at < bytes; at += kLine) Prefetch(row + at);
    Prefetch(row + bytes - 1);
  }

  const Row* table_;
  uint64_t rows_;
  int64_t stride_;  // bytes
  int64_t width_;
  const Id* ids_;
  const A* coefficients_;
  int64_t mask_;
  bool has_empty_;
  uint64_t empty_;
  int64_t last_;
  int64_t ahead_;   // slots
  bool straddles_;  // whether rows may start within a line
};
template <typename Row, typename Id>
constexpr Sum<Row> Slots<Row, Id>::kOne;

// Calls f with the slots of the bags, their ids being of either width.
template <typename Row, typename F>
inline void WithSlots(const Matrix& table, const Bags& bags, int64_t size, F f) {
  if (bags.ids.is_64_bit) {
    f(Slots<Row, int64_t>(table, bags, size));
  } else {
    f(Slots<Row, int32_t>(table, bags, size));
  }
}

constexpr int kMostVectors = 8;

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

// Calls f.operator()<W, K>(column, last_offset) for tiles that cover [0, width) and
// don't overlap.
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

// Writes a tile of sums divided by `divisor`, rounded once. Inlined by force: what is
// passed by reference would be in memory, and not in registers, while it is summed.
template <int W, int K, typename V, typename A, typename T>
__attribute__((always_inline)) inline void StoreQuotients(V (&total)[K], A divisor,
                                                          T* tile,
                                                          int64_t last_offset) {
  if (divisor != 1) {
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) total[j] /= divisor;
  }
#pragma GCC unroll 8
  for (int j = 0; j < K; ++j) {
    Store<W>(tile + Offset<W, K>(j, last_offset), total[j]);
  }
}

// out = the sum of the rows of the slots [first, last) times their coefficients,
// divided by `divisor`.
template <typename Row, typename Id, typename T, bool kWeighted>
struct SumRows {
  const Slots<Row, Id>& slots;
  int64_t first;
  int64_t last;
  Sum<Row> divisor;
  T* out;
  bool unknown = false;  // set where an id names no row: then the sums are void

  template <int W, int K>
  void operator()(int64_t column, int64_t last_offset) {
    using V = Vector<Sum<Row>, W>;
    V total[K] = {};
    // A copy, that what it holds stays in registers.
    const Slots<Row, Id> tile = slots.Columns(column, last_offset + W).Until(last);
    for (int64_t slot = first; slot < last; ++slot) {
      tile.template FetchAhead<W, K>(slot, last_offset);
      const Row* row = tile.row(slot);
      if (row == nullptr) {
        if (tile.empty(slot)) continue;
        unknown = true;
        return;
      }
      const V coefficient = tile.coefficient(slot) - V{};
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) {
        const V values = Load<W>(row + Offset<W, K>(j, last_offset));
        total[j] += kWeighted ? coefficient * values : values;
      }
    }
    StoreQuotients<W, K>(total, divisor, out + column, last_offset);
  }
};

template <typename A>
inline void Fill(A* out, int64_t size, A value) {
  for (int64_t i = 0; i < size; ++i) out[i] = value;
}

template <typename Row, typename Id, typename T>
inline void SumOf(const Slots<Row, Id>& slots, int64_t first, int64_t last,
                  Sum<Row> divisor, T* out) {
  const auto run = [&](auto sum) {
    Tiles<Sum<Row>>(slots.width(), sum);
    if (sum.unknown) Fill(out, slots.width(), kNaN<T>);
  };
  if (slots.weighted()) {
    run(SumRows<Row, Id, T, true>{slots, first, last, divisor, out});
  } else {
    run(SumRows<Row, Id, T, false>{slots, first, last, divisor, out});
  }
}

template <typename T>
struct DividedRow {
  const Sum<T>* sums;
  Sum<T> divisor;
  T* out;

  template <int W, int K>
  void operator()(int64_t column, int64_t last_offset) const {
    Vector<Sum<T>, W> total[K];
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      total[j] = Load<W>(sums + column + Offset<W, K>(j, last_offset));
    }
    StoreQuotients<W, K>(total, divisor, out + column, last_offset);
  }
};

// out = sums / divisor, rounded once. The two don't overlap.
template <typename T>
inline void Divide(const Sum<T>* sums, int64_t width, Sum<T> divisor, T* out) {
  DividedRow<T> row{sums, divisor, out};
  Tiles<Sum<T>>(width, row);
}

template <typename A>
struct SlotNumber {
  using Type = int32_t;
};
template <>
struct SlotNumber<double> {
  using Type = int64_t;
};

// The first largest of the rows times their coefficients times `sign`, which is 1 or
// -1, and its slot. NaN beats every number and no NaN.
template <typename Row, typename Id>
struct LargestRows {
  const Slots<Row, Id>& slots;
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
    const Slots<Row, Id> tile = slots.Columns(column, last_offset + W).Until(last);
    const Row* row = tile.row(first);
    V coefficient = sign * tile.coefficient(first) - V{};
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      best[j] = coefficient * Load<W>(row + Offset<W, K>(j, last_offset));
      best_slots[j] = S{} + static_cast<int32_t>(first);
    }
    tile.template FetchAhead<W, K>(first, last_offset);
    for (end = first + 1; end < last; ++end) {
      tile.template FetchAhead<W, K>(end, last_offset);
      row = tile.row(end);
      if (row == nullptr) {
        if (tile.empty(end)) continue;
        break;
      }
      coefficient = sign * tile.coefficient(end) - V{};
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

// Writes the extremes of the slots [first, last), or zeros and `none` if all are empty.
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
  // A row of NaN, which beats all but the NaNs before it. Those after it are beaten.
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

#endif  // JBAG_KERNELS_ROWS_H_
