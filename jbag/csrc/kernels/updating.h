// Moves the rows of a table that slots name by a rule, in place.
//
// A row's gradient is the sum over its run of sorted slots, in cache; mostly one slot
// names a row, and its gradient is where the cotangent has it.
//
// Traffic: that of the sorted slots; of the table and each state the rows that slots
// name, once in and once out, fetched some runs ahead. They come in order.

#ifndef JBAG_KERNELS_UPDATING_H_
#define JBAG_KERNELS_UPDATING_H_

#include <stdint.h>
#include <string.h>

#include "kernels/blocks.h"
#include "kernels/numbers.h"
#include "kernels/rows.h"
#include "kernels/rules.h"
#include "kernels/sorting.h"

namespace jbag {
namespace {

inline uint32_t Mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352d;
  x = (x ^ (x >> 15)) * 0x846ca68b;
  return x ^ (x >> 16);
}

template <typename T>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

// How numbers are rounded to a row of a table.
struct ToNearest {
  ToNearest(const uint32_t*, int64_t) {}

  template <int W, typename T>
  void Put(T* row, int64_t column, const Vector<Sum<T>, W>& v) const {
    Store<W>(row + column, v);
  }
};

// To bfloat16, up or down with the odds that make it right on average: the seed, the
// row and the column decide.
struct AtRandom {
  AtRandom(const uint32_t* seed, int64_t row)
      : hash(Mix(static_cast<uint32_t>(row) ^ seed[0]) + seed[1]) {}

  template <int W>
  void Put(BFloat16* row, int64_t column, const Vector<float, W>& v) const {
    using U = Vector<uint32_t, W>;
    U x;
    for (int lane = 0; lane < W; ++lane) x[lane] = static_cast<uint32_t>(lane);
    x = (x + static_cast<uint32_t>(column)) * 0x9e3779b9u + hash;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    x = (x ^ (x >> 16)) >> 16;
    // Infinities stay, and so do NaNs, whose first bits might be an infinity's.
    const U bits = Bits<U>(v);
    const U magnitude = bits & 0x7fffffff;
    const U infinity = U{} + 0x7f800000;
    const U kept = Choose(magnitude > infinity, bits | 0x400000, bits);
    const auto narrow = __builtin_convertvector(
        Choose(magnitude < infinity, bits + x, kept) >> 16, Vector<uint16_t, W>);
    memcpy(row + column, &narrow, sizeof(narrow));
  }

  uint32_t hash;
};

// Adds up the lanes by halves.
template <int W, typename A>
inline A SumOfLanes(const Vector<A, W>& v) {
  if constexpr (W == 1) {
    return v[0];
  } else {
    Vector<A, W / 2> halves[2];
    memcpy(halves, &v, sizeof(halves));
    return SumOfLanes<W / 2, A>(halves[0] + halves[1]);
  }
}

// The sum of the squares of scale * x[i].
template <typename A, int W = kWidth<A>>
inline A SumOfSquares(const A* x, A scale, int64_t width) {
  using V = Vector<A, W>;
  A sum = 0;
  int64_t at = 0;
  if (width >= W) {
    V sums[2] = {};
    for (; at + 2 * W <= width; at += 2 * W) {
      const V first = scale * Load<W>(x + at);
      const V second = scale * Load<W>(x + at + W);
      sums[0] += first * first;
      sums[1] += second * second;
    }
    if (at + W <= width) {
      const V first = scale * Load<W>(x + at);
      sums[0] += first * first;
      at += W;
    }
    sum = SumOfLanes<W, A>(sums[0] + sums[1]);
  }
  if constexpr (W > 1) {
    if (at < width) sum += SumOfSquares<A, W / 2>(x + at, scale, width - at);
  }
  return sum;
}

constexpr RuleShape ShapeOf(Rule rule) {
  for (const RuleShape& shape : kRules) {
    if (shape.rule == rule) return shape;
  }
  return {};
}

// Moves a row; its gradient is `scale` times what is given.
template <typename A>
using MoveRow = void (*)(const Matrix& table, const Update&, int64_t row,
                         const A* gradient, A scale);

template <typename T, template <typename> class RuleOf, typename Rounding>
struct RowMover {
  using A = Sum<T>;

  RuleOf<A> rule;
  A divisor;
  Rounding rounding;
  T* row;
  A* states[2];
  const A* gradient;
  A scale;

  static void Move(const Matrix& table, const Update& update, int64_t row,
                   const A* gradient, A scale) {
    A* states[2];
    for (int i = 0; i < 2; ++i) states[i] = static_cast<A*>(update.states[i]);
    RuleOf<A> rule;
    memcpy(&rule, update.numbers, sizeof(rule));
    A divisor = 1;
    if constexpr (kShape.per_row > 0) {
      const A squares = SumOfSquares(gradient, scale, table.width);
      const A mean = squares / static_cast<A>(Max(table.width, 1));
      divisor = rule.Divisor(mean, states[kPerElement] + row);
    }
    for (int i = 0; i < kPerElement; ++i) states[i] += row * table.width;
    T* numbers = static_cast<T*>(table.data) + row * table.width;
    const RowMover mover{
        rule,     divisor, Rounding(update.seed, row), numbers, {states[0], states[1]},
        gradient, scale};
    mover.MoveColumns<kWidth<A>>(table.width);
  }

  static constexpr RuleShape kShape = ShapeOf(RuleOf<A>::kRule);
  static constexpr int kPerElement = kShape.per_element;
  static_assert(sizeof(RuleOf<A>) == kShape.numbers * sizeof(A), "all its numbers");

  template <int W>
  struct Columns {
    Vector<A, W> row;
    Vector<A, W> gradient;
    Vector<A, W> states[kPerElement + 1];
  };

  template <int W>
  Columns<W> Read(int64_t column) const {
    Columns<W> columns;
    columns.row = Load<W>(row + column);
    columns.gradient = scale * Load<W>(gradient + column);
    for (int i = 0; i < kPerElement; ++i)
      columns.states[i] = Load<W>(states[i] + column);
    return columns;
  }

  template <int W>
  void Write(int64_t column, Columns<W> columns) const {
    const auto moved =
        rule.Moved(columns.row, columns.gradient, columns.states, divisor);
    rounding.template Put<W>(row, column, moved);
    for (int i = 0; i < kPerElement; ++i)
      Store<W>(states[i] + column, columns.states[i]);
  }

  // Where W doesn't divide the width the last vector overlaps the one before, so it is
  // read before that is written.
  template <int W>
  void MoveColumns(int64_t width) const {
    if constexpr (W > 1) {
      if (width < W) {
        MoveColumns<W / 2>(width);
        return;
      }
    }
    const int64_t last = width - W;
    if (last < 0) return;
    const RowMover mover = *this;  // a copy, that what it holds stays in registers
    const auto tail = mover.template Read<W>(last);
    for (int64_t column = 0; column < last; column += W) {
      mover.template Write<W>(column, mover.template Read<W>(column));
    }
    mover.template Write<W>(last, tail);
  }
};

// What is read and written where a row moves.
class MovingRows {
 public:
  MovingRows(const Matrix& table, int64_t number, const Update& update, int64_t sum) {
    const RuleShape shape = ShapeOf(update.rule);
    Add(table.data, table.width * number);
    for (int i = 0; i < shape.per_element + shape.per_row; ++i) {
      Add(update.states[i], i < shape.per_element ? table.width * sum : sum);
    }
    int64_t bytes = 0;
    for (int i = 0; i < size_; ++i) bytes += parts_[i].bytes;
    ahead_ = Clamp(kBytesAhead / Max(bytes, 1), 8, 32);
  }

  // Inlined by force: see Slots.
  __attribute__((always_inline)) void Fetch(int64_t row) const {
    for (int i = 0; i < size_; ++i) {
      const int64_t bytes = parts_[i].bytes;
      const char* from = parts_[i].first + row * bytes;
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 1);
      __builtin_prefetch(from + bytes - 1, 1);
    }
  }

  // How many rows ahead of the one that moves are fetched.
  int64_t ahead() const { return ahead_; }

 private:
  static constexpr int64_t kBytesAhead = 1 << 13;

  struct Part {
    const char* first;
    int64_t bytes;  // a row
  };

  void Add(const void* first, int64_t bytes) {
    if (bytes > 0) parts_[size_++] = {static_cast<const char*>(first), bytes};
  }

  Part parts_[3];
  int size_ = 0;
  int64_t ahead_;
};

// Moves the rows of runs.
template <typename A>
struct RunMover {
  const SortedSlots<A>& sorted;
  const Slots<A, int32_t>& slots;
  const Matrix& table;
  const Update& update;
  const MovingRows& rows;
  MoveRow<A> move;
  A* gradient;  // scratch, a row

  void gap(int64_t, int64_t) const {}
  void whole(int64_t row, int64_t start, int64_t end) const {
    for (int64_t slot = Max(start, end - rows.ahead()); slot < end; ++slot) {
      rows.Fetch(sorted.row(Min(slot + rows.ahead(), sorted.size() - 1)));
    }
    if (end - start == 1) {
      slots.FetchAhead(start);
      move(table, update, row, slots.row(start), slots.coefficient(start));
    } else {
      SumOf(slots, start, end, A{1}, gradient);
      move(table, update, row, gradient, A{1});
    }
  }
  void joined(int64_t row, const A* sums) const {
    move(table, update, row, sums, A{1});
  }
  void passed() const {}
};

template <typename A>
Error UpdateRowsBy(MoveRow<A> move, int64_t number, Pool& pool, const Matrix& table,
                   const Update& update, const Matrix& cotangent, const Bags& bags) {
  if (table.rows == 0) return nullptr;
  Bounds bounds;
  if (Error error = bounds.Read(bags)) return error;
  SortedSlots<A> sorted;
  if (Error error = sorted.Sort(pool, bags, bounds, table.rows)) return error;
  const int64_t size = sorted.size();
  Cut cut(table.width * sizeof(A), table.width * sizeof(A));
  // A row takes longer to move than to read: it and its states are written, too.
  cut.task = Max(cut.task / 4, 64);
  // Apart, that no two threads write the same line.
  const int64_t stride = CeilDiv(table.width, 64) * 64;
  Scratch<A> gradients;
  if (!gradients.Allocate(NumTasks(size, cut) * stride)) return kOutOfMemory;
  const Slots<A, int32_t> slots(cotangent, sorted.transposed(), size);
  const MovingRows rows(table, number, update, sizeof(A));
  return WalkRuns(pool, sorted, slots, 0, cut, [&](int64_t from, int64_t) {
    const int64_t fetched = Min(from + rows.ahead(), size);
    for (int64_t slot = from; slot < fetched; ++slot) rows.Fetch(sorted.row(slot));
    slots.FetchFirst(from);
    A* gradient = gradients.data() + from / cut.task * stride;
    return RunMover<A>{sorted, slots, table, update, rows, move, gradient};
  });
}

template <typename T, template <typename> class RuleOf>
MoveRow<Sum<T>> MoverBy(const Update& update) {
  if constexpr (kIsBFloat16<T>) {
    if (update.seed != nullptr) return RowMover<T, RuleOf, AtRandom>::Move;
  }
  return RowMover<T, RuleOf, ToNearest>::Move;
}

template <typename T>
MoveRow<Sum<T>> MoverOf(const Update& update) {
  switch (update.rule) {
    case Rule::kSgd:
      return MoverBy<T, Sgd>(update);
    case Rule::kMomentum:
      return MoverBy<T, Momentum>(update);
    case Rule::kAdagrad:
      return MoverBy<T, Adagrad>(update);
    case Rule::kRowwiseAdagrad:
      return MoverBy<T, RowwiseAdagrad>(update);
    case Rule::kAdam:
      return MoverBy<T, Adam>(update);
    case Rule::kRowwiseAdam:
      return MoverBy<T, RowwiseAdam>(update);
    case Rule::kRowwiseRmsprop:
      return MoverBy<T, RowwiseRmsprop>(update);
    case Rule::kFtrl:
      return MoverBy<T, Ftrl>(update);
  }
  return nullptr;
}

template <typename T>
Error UpdateRows(Pool& pool, const Matrix& table, const Update& update,
                 const Matrix& cotangent, const Bags& bags) {
  return UpdateRowsBy<Sum<T>>(MoverOf<T>(update), sizeof(T), pool, table, update,
                              cotangent, bags);
}

}  // namespace
}  // namespace jbag

#endif  // JBAG_KERNELS_UPDATING_H_
