// Loops that move a row of a table, and of its states, by a rule.
//
// Traffic: the row's gradient once; the row and its states once in and once out.

#ifndef JBAG_KERNELS_ROW_UPDATES_H_
#define JBAG_KERNELS_ROW_UPDATES_H_

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/integer_math.h"
#include "kernels/kernels.h"
#include "kernels/rules.h"
#include "kernels/simd_loops.h"
#include "kernels/vectors.h"

namespace jbag {
namespace {

inline uint32_t Mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352d;
  x = (x ^ (x >> 15)) * 0x846ca68b;
  return x ^ (x >> 16);
}

// Rounds to bfloat16, up or down with the odds that make it right on average: the hash
// of the seed and the row, and the column decide.
template <int W>
inline void StoreAtRandom(BFloat16* row, int64_t column, uint32_t hash,
                          const Vector<float, W>& v) {
  using U = Vector<uint32_t, W>;
  U x;
#pragma GCC unroll 16
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

// Reads what a row has missed that is current since some step.
template <typename RuleOfA, typename A>
inline RuleOfA ReadMissed(const Update& update, int32_t steps) {
  constexpr int kNumbers = sizeof(RuleOfA) / sizeof(A);
  const uint32_t from = static_cast<uint32_t>(steps);
  const uint32_t lag = (static_cast<uint32_t>(update.count) - from) % kStepPeriod;
  const A* column =
      static_cast<const A*>(update.numbers) + (from & (update.columns - 1));
  A numbers[kNumbers];
  for (int i = 0; i < kNumbers; ++i) {
    numbers[i] =
        lag < update.columns ? column[i * update.columns] : static_cast<A>(NAN);
  }
  RuleOfA rule;
  memcpy(static_cast<void*>(&rule), numbers, sizeof(numbers));
  return rule;
}

template <typename T, template <typename> class RuleOf, bool kAtRandom = false>
struct RowMover {
  using A = Sum<T>;

  RuleOf<A> rule;
  A divisor;
  uint32_t hash;  // for rounding at random
  T* row;
  A* states[2];
  const A* gradient;
  A scale;

  static void Move(const Matrix& table, const Update& update, int64_t row,
                   const void* from, const void* factor) {
    const A* gradient = kShape.catches_up ? nullptr : static_cast<const A*>(from);
    A scale = 1;
    A* states[2];
    for (int i = 0; i < 2; ++i) states[i] = static_cast<A*>(update.states[i]);
    RuleOf<A> rule;
    if constexpr (kShape.catches_up) {
      rule = ReadMissed<RuleOf<A>, A>(update, *static_cast<const int32_t*>(from));
    } else {
      memcpy(&rule, update.numbers, sizeof(rule));
      memcpy(&scale, factor, sizeof(scale));
      if (update.steps != nullptr) {
        if (update.steps[row] != update.count) scale = static_cast<A>(NAN);
        update.steps[row] = (update.count + 1) % kStepPeriod;
      }
    }
    A divisor = 1;
    if constexpr (kShape.per_row > 0) {
      const A squares =
          kShape.catches_up ? 0 : SumOfSquares(gradient, scale, table.width);
      const A mean = squares / static_cast<A>(Max(table.width, 1));
      divisor = rule.Divisor(mean, states[kPerElement] + row);
    }
    for (int i = 0; i < kPerElement; ++i) states[i] += row * table.width;
    T* numbers = static_cast<T*>(table.data) + row * table.width;
    uint32_t hash = 0;
    if constexpr (kAtRandom) {
      hash = Mix(static_cast<uint32_t>(row) ^ update.seed[0]) + update.seed[1];
    }
    const RowMover mover{rule,     divisor, hash, numbers, {states[0], states[1]},
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
    if constexpr (!kShape.catches_up) {
      columns.gradient = scale * Load<W>(gradient + column);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kPerElement; ++i) {
      columns.states[i] = Load<W>(states[i] + column);
    }
    return columns;
  }

  template <int W>
  void Write(int64_t column, Columns<W> columns) const {
    const auto moved =
        rule.Moved(columns.row, columns.gradient, columns.states, divisor);
#pragma GCC unroll 2
    for (int i = 0; i < kPerElement; ++i) {
      Store<W>(states[i] + column, columns.states[i]);
    }
    if constexpr (kAtRandom) {
      StoreAtRandom<W>(row, column, hash, moved);
    } else {
      Store<W>(row + column, moved);
    }
  }

  // Where W doesn't divide the width the last vector overlaps the one before, so it is
  // read before that is written.
  template <int W>
  void MoveColumns(int64_t width) const {
    if constexpr (W > 1) {
      if (width < W) {
        MoveColumns<W == 4 ? 1 : W / 2>(width);
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

template <typename T, template <typename> class RuleOf>
MoveRow MoverBy([[maybe_unused]] bool at_random) {
  if constexpr (kType<T> == Type::kBFloat16) {
    if (at_random) return RowMover<T, RuleOf, true>::Move;
  }
  return RowMover<T, RuleOf>::Move;
}

template <typename T>
MoveRow MoverOf(Rule rule, bool at_random) {
  switch (rule) {
    case Rule::kSgd:
      return MoverBy<T, Sgd>(at_random);
    case Rule::kMomentum:
      return MoverBy<T, Momentum>(at_random);
    case Rule::kAdagrad:
      return MoverBy<T, Adagrad>(at_random);
    case Rule::kRowwiseAdagrad:
      return MoverBy<T, RowwiseAdagrad>(at_random);
    case Rule::kAdam:
      return MoverBy<T, Adam>(at_random);
    case Rule::kRowwiseAdam:
      return MoverBy<T, RowwiseAdam>(at_random);
    case Rule::kRowwiseRmsprop:
      return MoverBy<T, RowwiseRmsprop>(at_random);
    case Rule::kFtrl:
      return MoverBy<T, Ftrl>(at_random);
    case Rule::kCatchUp:
      return MoverBy<T, CatchUp>(at_random);
    case Rule::kCatchUpMomentum:
      return MoverBy<T, CatchUpMomentum>(at_random);
    case Rule::kCatchUpAdam:
      return MoverBy<T, CatchUpAdam>(at_random);
    case Rule::kCatchUpRowwiseAdam:
      return MoverBy<T, CatchUpRowwiseAdam>(at_random);
  }
  return nullptr;
}

}  // namespace
}  // namespace jbag

#endif  // JBAG_KERNELS_ROW_UPDATES_H_
