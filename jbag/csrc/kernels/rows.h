// Reductions of gathered rows, feature by feature, in registers.
//
// A row of D features is read in vectors of W, the widest that fit in D and the
// machine; the last one overlaps the one before where W doesn't divide D, so that any D
// takes no masks and no scalar tail. Up to eight vectors make a tile. Rows of one tile
// are summed segment after segment; wider rows take several passes over each segment,
// whose rows are in cache by then.
//
// Traffic: each row once from memory, fetched some slots ahead; sums stay in registers
// and are written once.

#ifndef JBAG_KERNELS_ROWS_H_
#define JBAG_KERNELS_ROWS_H_

#include <stdint.h>

#include "kernels/arithmetic.h"
#include "kernels/loops.h"
#include "kernels/numbers.h"
#include "kernels/slots.h"

namespace jbag {
namespace {

// Where vector j of K stands in a tile: the last one ends where the tile does.
template <int W, int K>
inline int64_t Offset(int j, int64_t last_offset) {
  return j < K - 1 || K == 1 ? j * W : last_offset;
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
  f.template operator()<W, K>(column, last_offset, 1);
}

// Calls f.operator()<W, K>(column, last_offset, count) for tiles that cover [0, width)
// and don't overlap: `count` of them side by side, the first at `column`. Only a tile
// of the most vectors has others beside it.
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
      f.template operator()<W, 1>(0, 0, 1);
    } else if (width > W) {
      f.template operator()<W, 2>(0, width - W, 1);
    }
  } else {
    constexpr int64_t kColumns = kMostVectors * W;
    // Less than a vector must not be left over.
    const int64_t count = Max(width - W, 0) / kColumns;
    if (count > 0) f.template operator()<W, kMostVectors>(0, kColumns - W, count);
    int64_t column = count * kColumns;
    if (width - column > kColumns) {
      f.template operator()<W, kMostVectors - 1>(column, kColumns - 2 * W, 1);
      column += kColumns - W;
    }
    const int64_t left = width - column;
    if (left > 0) {
      Tile<W, 1>(static_cast<int>(CeilDiv(left, W)), column, left - W, f);
    }
  }
}

// Writes a tile of sums that are divided by `divisor`, rounded once. Inlined by force:
// what is passed by reference would be in memory, and not in registers, while it is
// summed.
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

// Rounds `count` vectors of a tile, which lie one after the other.
template <int W, typename T>
__attribute__((noinline)) void RoundTile(const float* from, int count, T* tile,
                                         int64_t last_offset) {
  for (int j = 0; j < count - 1; ++j) {
    Store<W>(tile + j * W, Load<W>(from + j * W));
  }
  Store<W>(tile + (count == 1 ? 0 : last_offset), Load<W>(from + (count - 1) * W));
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

  const Slots& slots;
  Segments segments;
  Average average;
  const int32_t* places;
  Type out_type;
  void* out;

  template <int W, int K>
  void operator()(int64_t column, int64_t last_offset, int64_t tiles) const {
    for (int64_t i = 0; i < segments.count; ++i) {
      const int64_t first = segments.starts[i];
      const int64_t place = places == nullptr ? i : places[first];
      const int64_t at = place * slots.width + column;
      for (int64_t tile = 0; tile < (K < kMostVectors ? 1 : tiles); ++tile) {
        const int64_t beside = tile * K * W;
        SumTile<W, K>(first, segments.ends[i], column + beside, last_offset,
                      at + beside);
      }
    }
  }

  // Inlined by force: what it reads of the slots is read once for all segments.
  template <int W, int K>
  __attribute__((always_inline)) void SumTile(int64_t first, int64_t last,
                                              int64_t column, int64_t last_offset,
                                              int64_t at) const {
    using V = Vector<A, W>;
    const TileSlots<Row> tile(slots, column);
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
    Write<W, K>(total, Divisor<A>(average, filled), at, last_offset);
  }

  // Inlined by force: see StoreQuotients.
  template <int W, int K, typename V>
  __attribute__((always_inline)) void Write(V (&total)[K], A divisor, int64_t at,
                                            int64_t last_offset) const {
    if (out_type == kType<Row>) {
      StoreQuotients<W, K>(total, divisor, static_cast<Row*>(out) + at, last_offset);
      return;
    }
    if constexpr (sizeof(Row) < sizeof(float)) {
      StoreQuotients<W, K>(total, divisor, static_cast<A*>(out) + at, last_offset);
    }
    if constexpr (sizeof(Row) == sizeof(float)) {
      float sums[W * K];
      StoreQuotients<W, K>(total, divisor, sums, (K - 1) * W);
      if (out_type == Type::kBFloat16) {
        RoundTile<W>(sums, K, static_cast<BFloat16*>(out) + at, last_offset);
      } else {
        RoundTile<W>(sums, K, static_cast<Float16*>(out) + at, last_offset);
      }
    }
  }
};

// The bytes of rows that one tile of several is summed over before the next one is:
// they stay in the first-level cache.
constexpr int64_t kBytesAtOnce = 1 << 12;

template <typename Row, bool kWeighted>
void SumSegmentsOf(SumSegments<Row, kWeighted> sum) {
  using A = Sum<Row>;
  const int64_t width = sum.slots.width;
  if (width <= kMostVectors * kWidth<A>) {
    Tiles<A>(width, sum);
    return;
  }
  const int64_t most = kBytesAtOnce / sum.slots.stride;
  const Segments all = sum.segments;
  char* out = static_cast<char*>(sum.out);
  const int64_t out_bytes = sum.places != nullptr ? 0 : width * SizeOf(sum.out_type);
  for (int64_t i = 0; i < all.count;) {
    const int64_t first = i;
    const int64_t end = all.starts[first] + most;
    do {
      ++i;
    } while (i < all.count && all.ends[i] <= end);
    sum.segments = {all.starts + first, all.ends + first, i - first};
    sum.out = out + first * out_bytes;
    Tiles<A>(width, sum);
  }
}

template <typename Row>
void SumRows(const SlotRows& rows, const Segments& segments, Average average,
             const int32_t* places, Type out_type, void* out) {
  const Slots slots(rows);
  if (slots.weighted()) {
    SumSegmentsOf(
        SumSegments<Row, true>{slots, segments, average, places, out_type, out});
  } else {
    SumSegmentsOf(
        SumSegments<Row, false>{slots, segments, average, places, out_type, out});
  }
}

template <typename T>
struct DividedRow {
  const Sum<T>* sums;
  Sum<T> divisor;
  T* out;

  template <int W, int K>
  void operator()(int64_t column, int64_t last_offset, int64_t tiles) const {
    for (; tiles > 0; --tiles, column += K * W) {
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
  DividedRow<T> row{sums, divisor, static_cast<T*>(out)};
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
  const Slots& slots;
  int64_t first;  // a filled slot
  int64_t last;
  Sum<Row> sign;
  Sum<Row>* values;
  int32_t* winners;
  int64_t end = 0;  // where the first id that names no row stands, or `last`

  template <int W, int K>
  void operator()(int64_t column, int64_t last_offset, int64_t tiles) {
    for (; tiles > 0; --tiles, column += K * W) FindLargest<W, K>(column, last_offset);
  }

  template <int W, int K>
  __attribute__((always_inline)) void FindLargest(int64_t column, int64_t last_offset) {
    using A = Sum<Row>;
    using V = Vector<A, W>;
    using S = Vector<typename SlotNumber<A>::Type, W>;
    V best[K];
    S best_slots[K];
    const TileSlots<Row> tile(slots, column);
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

#endif  // JBAG_KERNELS_ROWS_H_
