// Moves the rows of a table that slots name by a rule, in place.
//
// A row's gradient is the sum over its run of sorted slots, in cache; mostly one slot
// names a row, and its gradient is where the cotangent has it.
//
// Traffic: that of the sorted slots; of the table and each state the rows that slots
// name, once in and once out, fetched some runs ahead. They come in order.

#ifndef JBAG_UPDATING_H_
#define JBAG_UPDATING_H_

#include <stdint.h>
#include <string.h>

#include "blocks.h"
#include "numbers.h"
#include "rows.h"
#include "rules.h"
#include "sorting.h"

namespace jbag {
namespace {

inline uint32_t Mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352d;
  x = (x ^ (x >> 15)) * 0x846ca68b;
  return x ^ (x >> 16);
}

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

// The sum of the squares of scale * x[i], in four running vectors, lanes by halves.
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

// Moves one row at a time.
template <typename T, typename Step, typename Rounding>
class RowMover {
 public:
  using A = Sum<T>;

  RowMover(const Matrix& table, const Update& update)
      : width_(table.width),
        table_(static_cast<T*>(table.data)),
        states_{static_cast<A*>(update.states[0]), static_cast<A*>(update.states[1])},
        seed_(update.seed) {
    memcpy(&step_, update.numbers, sizeof(step_));
  }

  // The row's gradient is `scale` times what is given.
  void Move(int64_t row, const A* gradient, A scale) const {
    A divisor = 1;
    if constexpr (kShape.narrow > 0) {
      const A squares = SumOfSquares(gradient, scale, width_);
      divisor = step_.Divisor(squares / static_cast<A>(width_), states_[kWide] + row);
    }
    const Row place{*this, row};
    MoveColumns<kWidth<A>>(place, gradient, scale, divisor);
  }

  __attribute__((always_inline)) void Fetch(int64_t row) const {
    FetchRow(table_ + row * width_, width_ * static_cast<int64_t>(sizeof(T)));
    for (int i = 0; i < kWide; ++i) {
      FetchRow(states_[i] + row * width_, width_ * static_cast<int64_t>(sizeof(A)));
    }
    if (kShape.narrow > 0) __builtin_prefetch(states_[kWide] + row, 1);
  }

  // Rows of the table and the states that are fetched ahead.
  int64_t ahead() const {
    const int64_t bytes = static_cast<int64_t>(sizeof(T) + kWide * sizeof(A)) * width_;
    return Clamp(kBytesAhead / Max(bytes, 1), 8, 32);
  }

 private:
  static constexpr RuleShape kShape = ShapeOf(Step::kRule);
  static constexpr int kWide = kShape.wide;
  static_assert(sizeof(Step) == kShape.numbers * sizeof(A), "a number is missing");
  static constexpr int64_t kBytesAhead = 1 << 13;

  struct Row {
    Row(const RowMover& mover, int64_t row)
        : table(mover.table_ + row * mover.width_), rounding(mover.seed_, row) {
      for (int i = 0; i < kWide; ++i) states[i] = mover.states_[i] + row * mover.width_;
    }
    T* table;
    A* states[kWide + 1];
    Rounding rounding;
  };

  template <int W>
  struct Columns {
    Vector<A, W> row;
    Vector<A, W> gradient;
    Vector<A, W> states[kWide + 1];
  };

  template <int W>
  static Columns<W> Read(const Row& from, const A* gradient, A scale, int64_t column) {
    Columns<W> columns;
    columns.row = Load<W>(from.table + column);
    columns.gradient = scale * Load<W>(gradient + column);
    for (int i = 0; i < kWide; ++i) {
      columns.states[i] = Load<W>(from.states[i] + column);
    }
    return columns;
  }

  template <int W>
  static void Write(const Step& step, Columns<W> columns, A divisor, const Row& to,
                    int64_t column) {
    const auto moved =
        step.Moved(columns.row, columns.gradient, columns.states, divisor);
    to.rounding.template Put<W>(to.table, column, moved);
    for (int i = 0; i < kWide; ++i) {
      Store<W>(to.states[i] + column, columns.states[i]);
    }
  }

  // Where W doesn't divide the width the last vector overlaps the one before, so it is
  // read before that is written.
  template <int W>
  void MoveColumns(const Row& row, const A* gradient, A scale, A divisor) const {
    if constexpr (W > 1) {
      if (width_ < W) {
        MoveColumns<W / 2>(row, gradient, scale, divisor);
        return;
      }
    }
    const int64_t last = width_ - W;
    if (last < 0) return;
    // Copies, that what they hold stays in registers.
    const Step step = step_;
    const Row place = row;
    const auto tail = Read<W>(place, gradient, scale, last);
    for (int64_t column = 0; column < last; column += W) {
      Write<W>(step, Read<W>(place, gradient, scale, column), divisor, place, column);
    }
    Write<W>(step, tail, divisor, place, last);
  }

  __attribute__((always_inline)) static void FetchRow(const void* row, int64_t bytes) {
    const char* from = static_cast<const char*>(row);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 1);
    __builtin_prefetch(from + bytes - 1, 1);
  }

  int64_t width_;
  T* table_;
  A* states_[2];
  const uint32_t* seed_;
  Step step_;
};

// Moves the rows of runs.
template <typename A, typename Mover>
struct RunMover {
  const SortedSlots<A>& sorted;
  const Slots<A, int32_t>& slots;
  const Mover& mover;
  int64_t ahead;
  A* gradient;  // scratch, a row

  // Fetches what follows on a slot, where a thread starts.
  void FetchFirst(int64_t slot) const {
    for (int64_t i = slot; i < Min(slot + ahead, sorted.size()); ++i) {
      mover.Fetch(sorted.row(i));
    }
  }
  void gap(int64_t, int64_t) const {}
  void whole(int64_t row, int64_t start, int64_t end) const {
    for (int64_t slot = Max(start, end - ahead); slot < end; ++slot) {
      mover.Fetch(sorted.row(Min(slot + ahead, sorted.size() - 1)));
    }
    if (end - start == 1) {
      slots.FetchAhead(start);
      mover.Move(row, slots.row(start), slots.coefficient(start));
    } else {
      SumOf(slots, start, end, A{1}, gradient);
      mover.Move(row, gradient, A{1});
    }
  }
  void joined(int64_t row, const A* sums) const { mover.Move(row, sums, A{1}); }
  void passed() const {}
};

template <typename T, template <typename> class Step, typename Rounding>
Error UpdateBy(Pool& pool, const Matrix& table, const Update& update,
               const Matrix& cotangent, const Bags& bags) {
  using A = Sum<T>;
  using Mover = RowMover<T, Step<A>, Rounding>;
  const int64_t width = table.width;
  if (table.rows == 0) return nullptr;
  Bounds bounds;
  if (Error error = bounds.Read(bags)) return error;
  SortedSlots<A> sorted;
  if (Error error = sorted.Sort(pool, bags, bounds, table.rows)) return error;
  const Cut cut(width * sizeof(A), width * sizeof(A));
  // Apart, that no two threads write the same line.
  const int64_t stride = CeilDiv(width, 64) * 64;
  Scratch<A> gradients;
  if (!gradients.Allocate(NumTasks(sorted.size(), cut) * stride)) return kOutOfMemory;
  const Slots<A, int32_t> slots(cotangent, sorted.transposed(), sorted.size());
  const Mover mover(table, update);
  return WalkRuns(pool, sorted, slots, 0, cut, [&](int64_t from, int64_t) {
    A* gradient = gradients.data() + from / cut.task * stride;
    RunMover<A, Mover> runs{sorted, slots, mover, mover.ahead(), gradient};
    runs.FetchFirst(from);
    return runs;
  });
}

template <typename T, template <typename> class Step>
Error UpdateWith(Pool& pool, const Matrix& table, const Update& update,
                 const Matrix& cotangent, const Bags& bags) {
  if constexpr (sizeof(T) == sizeof(BFloat16)) {
    if (update.seed != nullptr && table.type == Type::kBFloat16) {
      return UpdateBy<BFloat16, Step, AtRandom>(pool, table, update, cotangent, bags);
    }
  }
  return UpdateBy<T, Step, ToNearest>(pool, table, update, cotangent, bags);
}

template <typename T>
Error UpdateRows(Pool& pool, const Matrix& table, const Update& update,
                 const Matrix& cotangent, const Bags& bags) {
  switch (update.rule) {
    case Rule::kSgd:
      return UpdateWith<T, Sgd>(pool, table, update, cotangent, bags);
    case Rule::kMomentum:
      return UpdateWith<T, Momentum>(pool, table, update, cotangent, bags);
    case Rule::kAdagrad:
      return UpdateWith<T, Adagrad>(pool, table, update, cotangent, bags);
    case Rule::kRowwiseAdagrad:
      return UpdateWith<T, RowwiseAdagrad>(pool, table, update, cotangent, bags);
    case Rule::kAdam:
      return UpdateWith<T, Adam>(pool, table, update, cotangent, bags);
    case Rule::kRowwiseAdam:
      return UpdateWith<T, RowwiseAdam>(pool, table, update, cotangent, bags);
    case Rule::kRowwiseRmsprop:
      return UpdateWith<T, RowwiseRmsprop>(pool, table, update, cotangent, bags);
    case Rule::kFtrl:
      return UpdateWith<T, Ftrl>(pool, table, update, cotangent, bags);
  }
  return "jbag: unknown rule";
}

}  // namespace
}  // namespace jbag

#endif  // JBAG_UPDATING_H_
