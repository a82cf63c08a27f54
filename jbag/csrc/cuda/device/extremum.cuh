// Maxima and minima over bags, and the slots that hold them.
//
// Traffic: each slot's id, coefficient and row once; values and winners once; both for
// each piece of a long bag.

namespace jbag {
namespace cuda {

// The best number so far and its slot, or `none`; earlier slots come first.
template <typename A, bool kLargest>
__device__ inline void Improve(A x, int slot, int none, A* value, int* winner) {
  const bool better = kLargest ? x > *value : x < *value;
  const bool is_first_nan = x != x && *value == *value;
  if (*winner == none || better || is_first_nan) {
    *value = x;
    *winner = slot;
  }
}

template <typename T, int W, typename Id, bool kLargest>
__device__ inline void ImproveBySlots(const Dense& dense, const Slots& slots,
                                      const Range& range, int64 column,
                                      Sums<Sum<T>, W>* values, int (&winners)[W]) {
  const int none = static_cast<int>(slots.num_slots);
  for (int64 first = range.start; first < range.end; first += kInFlight) {
    RowVectors<T, W, Id> vectors;
    vectors.Load(dense, slots, first, range.end, column);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!vectors.filled[i]) continue;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        Improve<Sum<T>, kLargest>(vectors.factors[i] * Widen(vectors.rows[i].x[k]),
                                  static_cast<int>(first) + i, none, &values->x[k],
                                  &winners[k]);
      }
    }
  }
}

template <typename T, int W, typename Id, bool kLargest>
__global__ void ExtremumOfPieces(Dense dense, Slots slots, Partials partials,
                                 int64 num_pieces, Division division) {
  const Part part = PartOf(division);
  const int64 column = part.vector * W;
  if (part.item >= num_pieces || column >= dense.width) return;
  const Range range = PieceRange(slots, part.item);
  if (range.start == range.end) return;
  Sums<Sum<T>, W> values;
  values.Fill(0);
  int winners[W];
  for (int k = 0; k < W; ++k) winners[k] = static_cast<int>(slots.num_slots);
  ImproveBySlots<T, W, Id, kLargest>(dense, slots, range, column, &values, winners);
  const int64 at = part.item * dense.width + column;
  Store(values, static_cast<Sum<T>*>(partials.sums) + at);
  StoreIntegers(winners, partials.integers + at);
}

template <typename T, int W, typename Id, bool kLargest>
__global__ void ExtremumOfBags(Dense dense, Slots slots, Partials partials, Sum<T>* out,
                               int* out_winners, Division division) {
  using A = Sum<T>;
  const Part part = PartOf(division);
  const int64 column = part.vector * W;
  if (part.item >= slots.num_bags || column >= dense.width) return;
  const Range range = RangeOf(slots, part.item);
  const int none = static_cast<int>(slots.num_slots);
  Sums<A, W> values;
  values.Fill(range.malformed ? NaN<A>() : A(0));
  int winners[W];
  for (int k = 0; k < W; ++k) winners[k] = none;
  if (range.malformed) {
    // NaN without a winner.
  } else if (!IsLong(range)) {
    ImproveBySlots<T, W, Id, kLargest>(dense, slots, range, column, &values, winners);
  } else {
    const int64 pieces = NumPieces(range);
    for (int64 piece = 0; piece < pieces; ++piece) {
      const int64 at = PieceOf(range.start, piece) * dense.width + column;
      Sums<A, W> best;
      best.Load(static_cast<const A*>(partials.sums) + at);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const int winner = partials.integers[at + k];
        if (winner == none) continue;
        Improve<A, kLargest>(best.x[k], winner, none, &values.x[k], &winners[k]);
      }
    }
  }
  const int64 at = part.item * dense.width + column;
  Store(values, out + at);
  StoreIntegers(winners, out_winners + at);
}

}  // namespace cuda
}  // namespace jbag
