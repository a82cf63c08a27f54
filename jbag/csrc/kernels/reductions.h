// Reductions of gathered rows, feature by feature, in registers.
//
// A row of D features is read in vectors of W, the widest that fit in D and the
// machine; the last one overlaps the one before where W doesn't divide D, so that any D
// takes no masks and no scalar tail. Up to eight vectors make a tile. Wider rows are
// tiles of equal width, the last of which overlaps the one before, and take a pass over
// the slots for each; the rows are in cache by then.
//
// Traffic: each row once from memory, fetched some slots ahead; sums stay in registers
// and are written once.

#ifndef JBAG_KERNELS_REDUCTIONS_H_
#define JBAG_KERNELS_REDUCTIONS_H_

#include <stdint.h>

#include "kernels/gathered_rows.h"
#include "kernels/integer_math.h"
#include "kernels/simd_loops.h"
#include "kernels/vectors.h"

namespace jbag {
namespace {

// Where vector j of K stands in a tile: the last one ends where the tile does.
template <int W, int K>
inline int64_t Offset(int j, int64_t last_offset) {
  return j < K - 1 || K == 1 ? j * W : last_offset;
}

template <int W, int K, typename F>
inline void Tile(int64_t vectors, int64_t last_offset, int64_t count, F& f) {
  if constexpr (K < F::kMostVectors) {
    if (vectors > K) {
      Tile<W, K + 1>(vectors, last_offset, count, f);
      return;
    }
  }
  // So few vectors are one tile.
  f.template operator()<W, K>(last_offset, 2 * K <= F::kMostVectors ? 1 : count);
}

// Calls f.operator()<W, K>(last_offset, count) for `count` tiles that cover [0, width):
// see Column.
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
      f.template operator()<W, 1>(0, 1);
    } else if (width > W) {
      f.template operator()<W, 2>(width - W, 1);
    }
  } else if (width > 0) {
    const int64_t vectors = CeilDiv(width, W);
    const int64_t count = CeilDiv(vectors, F::kMostVectors);
    const int64_t each = CeilDiv(vectors, count);
    Tile<W, 1>(each, count == 1 ? width - W : (each - 1) * W, count, f);
  }
}

// The first column of a tile of some: the last one ends where the row does.
template <int W, int K>
inline int64_t Column(int64_t tile, int64_t last_offset, int64_t width) {
  return Min(tile * K * W, width - (last_offset + W));
}

// Rounds a tile of sums. Inlined by force: what is passed by reference would be in
// memory, and not in registers, while it is summed.
template <int W, int K, typename V, typename T>
__attribute__((always_inline)) inline void StoreTile(const V (&total)[K], T* tile,
                                                     int64_t last_offset) {
#pragma GCC unroll 8
  for (int j = 0; j < K; ++j) {
    Store<W>(tile + Offset<W, K>(j, last_offset), total[j]);
  }
}

// The number that a sum of `count` rows is divided by.
template <typename A>
inline A Divisor(Average average, int64_t count) {
  if (average == Average::kNone) return 1;
  const A filled = static_cast<A>(Max(count, 1));
  return average == Average::kMean ? filled : SquareRoot(filled);
}

template <typename A>
inline void Fill(A* out, int64_t size, A value) {
  for (int64_t i = 0; i < size; ++i) out[i] = value;
}

// out = the averages of the rows of segments of slots times their coefficients.
template <typename Row, bool kWeighted>
struct SumSegments {
  using A = Sum<Row>;
  static constexpr int kMostVectors = 8;

  const Slots& slots;
  Segments segments;
  Average average;
  const int32_t* places;
  Type out_type;
  void* out;

  template <int W, int K>
  void operator()(int64_t last_offset, int64_t tiles) const {
    // A copy, which what is written can't change.
    const SumSegments sum = *this;
    const TileSlots<Row> first_tile(slots);
    const int64_t width = slots.width;
    for (int64_t i = 0; i < sum.segments.count; ++i) {
      const int64_t first = sum.segments.starts[i];
      const int64_t last = sum.segments.ends[i];
      const int64_t place = sum.places == nullptr ? i : sum.places[first];
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t column = Column<W, K>(tile, last_offset, width);
        sum.template SumTile<W, K>(first_tile.From(column), first, last, last_offset,
                                   place * width + column);
      }
    }
  }

  // Inlined by force: see StoreTile.
  template <int W, int K>
  __attribute__((always_inline)) void SumTile(const TileSlots<Row>& tile, int64_t first,
                                              int64_t last, int64_t last_offset,
                                              int64_t at) const {
    using V = Vector<A, W>;
    const int64_t ahead = slots.Ahead(last);
    const int32_t* const end = slots.ids + last;
    const A* coefficients = static_cast<const A*>(slots.coefficients) + first;
    V total[K] = {};
    int64_t filled = last - first;
    for (const int32_t* slot = slots.ids + first; slot != end; ++slot) {
      tile.template Fetch<W, K>(slot + ahead, last_offset);
      if (__builtin_expect(!tile.is_row(*slot), 0)) {
        if (slots.is_empty(*slot)) {
          --filled;
          if (kWeighted) ++coefficients;
          continue;
        }
        // No row has that id: the sum is void.
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j) total[j] = kNaN<A> - V{};
        break;
      }
      const Row* row = tile.row(*slot);
      if (kWeighted) {
        const V coefficient = *coefficients++ - V{};
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j) {
          total[j] += coefficient * Load<W>(row + Offset<W, K>(j, last_offset));
        }
      } else {
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j) {
          total[j] += Load<W>(row + Offset<W, K>(j, last_offset));
        }
      }
    }
    if (average != Average::kNone) {
      const A divisor = Divisor<A>(average, filled);
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) total[j] /= divisor;
    }
    if (out_type == kType<Row>) {
      StoreTile<W, K>(total, static_cast<Row*>(out) + at, last_offset);
    } else if constexpr (sizeof(Row) < sizeof(float)) {
      StoreTile<W, K>(total, static_cast<A*>(out) + at, last_offset);
    } else if constexpr (sizeof(Row) == sizeof(float)) {
      if (out_type == Type::kBFloat16) {
        StoreTile<W, K>(total, static_cast<BFloat16*>(out) + at, last_offset);
      } else {
        StoreTile<W, K>(total, static_cast<Float16*>(out) + at, last_offset);
      }
    }
  }
};

template <typename Row>
void SumRows(const SlotRows& rows, const Segments& segments, Average average,
             const int32_t* places, Type out_type, void* out) {
  const Slots slots(rows);
  if (slots.weighted()) {
    SumSegments<Row, true> sum{slots, segments, average, places, out_type, out};
    Tiles<Sum<Row>>(slots.width, sum);
  } else {
    SumSegments<Row, false> sum{slots, segments, average, places, out_type, out};
    Tiles<Sum<Row>>(slots.width, sum);
  }
}

template <typename T>
struct DividedRow {
  static constexpr int kMostVectors = 1;

  const Sum<T>* sums;
  int64_t width;
  Sum<T> divisor;
  T* out;

  template <int W, int K>
  void operator()(int64_t last_offset, int64_t tiles) const {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t column = Column<W, K>(tile, last_offset, width);
      for (int j = 0; j < K; ++j) {
        const int64_t at = column + Offset<W, K>(j, last_offset);
        Store<W>(out + at, Load<W>(sums + at) / divisor);
      }
    }
  }
};

// out = sums / divisor, rounded once. The two don't overlap.
template <typename T>
void Divide(const Sum<T>* sums, int64_t width, Sum<T> divisor, void* out) {
  DividedRow<T> row{sums, width, divisor, static_cast<T*>(out)};
  Tiles<Sum<T>>(width, row);
}

template <typename A>
void AverageSums(const void* from, int64_t width, Average average, int64_t count,
                 Type out_type, void* out) {
  const A* sums = static_cast<const A*>(from);
  const A divisor = Divisor<A>(average, count);
  if (out_type == kType<A>) {
    Divide<A>(sums, width, divisor, out);
  } else if constexpr (sizeof(A) == sizeof(float)) {
    if (out_type == Type::kBFloat16) Divide<BFloat16>(sums, width, divisor, out);
    if (out_type == Type::kFloat16) Divide<Float16>(sums, width, divisor, out);
  }
}

template <typename A>
void AddSums(void* sums, const void* more, int64_t width) {
  A* to = static_cast<A*>(sums);
  const A* from = static_cast<const A*>(more);
  for (int64_t i = 0; i < width; ++i) to[i] += from[i];
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
template <typename Row>
struct LargestRows {
  // A vector of these takes two registers.
  static constexpr int kMostVectors = kRegisters == 32 ? 8 : 6;

  const Slots& slots;
  int64_t first;  // a filled slot
  int64_t last;
  Sum<Row> sign;
  Sum<Row>* values;
  int32_t* winners;
  int64_t end = 0;  // where the first id that names no row stands, or `last`

  template <int W, int K>
  void operator()(int64_t last_offset, int64_t tiles) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      FindLargest<W, K>(Column<W, K>(tile, last_offset, slots.width), last_offset);
    }
  }

  template <int W, int K>
  __attribute__((always_inline)) void FindLargest(int64_t column, int64_t last_offset) {
    using A = Sum<Row>;
    using V = Vector<A, W>;
    using S = Vector<typename SlotNumber<A>::Type, W>;
    V best[K];
    S best_slots[K];
    const TileSlots<Row> tile = TileSlots<Row>(slots).From(column);
    const int64_t ahead = slots.Ahead(last);
    const int32_t* ids = slots.ids;
    const Row* row = tile.row(ids[first]);
    V coefficient = sign * slots.template coefficient<A>(first) - V{};
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      best[j] = coefficient * Load<W>(row + Offset<W, K>(j, last_offset));
      best_slots[j] = S{} + static_cast<int32_t>(first);
    }
    tile.template Fetch<W, K>(ids + first + ahead, last_offset);
    for (end = first + 1; end < last; ++end) {
      tile.template Fetch<W, K>(ids + end + ahead, last_offset);
      if (__builtin_expect(!tile.is_row(ids[end]), 0)) {
        if (slots.is_empty(ids[end])) continue;
        break;
      }
      row = tile.row(ids[end]);
      coefficient = sign * slots.template coefficient<A>(end) - V{};
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
template <typename Row>
inline void ExtremesOf(const Slots& slots, int64_t first, int64_t last, bool largest,
                       int32_t none, Sum<Row>* values, int32_t* winners) {
  using A = Sum<Row>;
  const int64_t width = slots.width;
  while (first < last && slots.is_empty(slots.ids[first])) ++first;
  if (first == last) {
    Fill(values, width, A{0});
    Fill(winners, width, none);
    return;
  }
  if (slots.template row<Row>(first) == nullptr) {
    Fill(values, width, kNaN<A>);
    Fill(winners, width, static_cast<int32_t>(first));
    return;
  }
  const A sign = largest ? 1 : -1;
  LargestRows<Row> best{slots, first, last, sign, values, winners};
  Tiles<A>(width, best);
  if (best.end >= last) return;
  // A row of NaN, which beats all but the NaNs before it. Those after it are beaten.
  for (int64_t i = 0; i < width; ++i) {
    if (values[i] != values[i]) continue;
    values[i] = kNaN<A>;
    winners[i] = static_cast<int32_t>(best.end);
  }
}

template <typename Row>
void Extremes(const SlotRows& rows, const Segments& segments, bool largest,
              int32_t none, void* values, int32_t* winners) {
  const Slots slots(rows);
  Sum<Row>* to = static_cast<Sum<Row>*>(values);
  for (int64_t i = 0; i < segments.count; ++i) {
    ExtremesOf<Row>(slots, segments.starts[i], segments.ends[i], largest, none,
                    to + i * slots.width, winners + i * slots.width);
  }
}

// <a, b>: four running vectors, then ever narrower ones for what is left.
template <int W, typename Row>
inline Sum<Row> DotTail(const Row* a, const Sum<Row>* b, int64_t width) {
  Sum<Row> sum = 0;
  if (width >= W) {
    const Vector<Sum<Row>, W> products = Load<W>(a) * Load<W>(b);
#pragma GCC unroll 16
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
#pragma GCC unroll 16
  for (int lane = 0; lane < W; ++lane) sum += total[lane];
  if constexpr (W > 1) sum += DotTail<W / 2>(a + at, b + at, width - at);
  return sum;
}

template <typename Row>
void Dots(const SlotRows& rows, const Segments& segments, int64_t first, int64_t last,
          const void* bag_rows, void* output) {
  using A = Sum<Row>;
  const Slots slots(rows);
  const int64_t width = slots.width;
  const A* bag_row = static_cast<const A*>(bag_rows);
  A* out = static_cast<A*>(output);
  for (int64_t i = 0; i < segments.count; ++i, bag_row += width) {
    const int64_t end = Min(segments.ends[i], last);
    for (int64_t slot = Max(segments.starts[i], first); slot < end; ++slot) {
      slots.FetchAhead(slot);
      const Row* row = slots.template row<Row>(slot);
      if (slots.is_empty(slots.ids[slot]) || width == 0) {
        out[slot] = 0;
      } else if (row == nullptr) {
        out[slot] = kNaN<A>;
      } else {
        out[slot] = Dot(row, bag_row, width);
      }
    }
  }
}

}  // namespace
}  // namespace jbag

#endif  // JBAG_KERNELS_REDUCTIONS_H_
