// Sums of rows over bags: the product and, over sorted slots, the transposed product.
//
// Traffic: each slot's id, coefficient and row once; the sums once; a partial sum for
// each piece of a long bag.

namespace jbag {
namespace cuda {

// Adds the slots of a range; returns the number of filled ones.
template <typename T, int W, typename Id>
__device__ inline int AddSlots(const Dense& dense, const Slots& slots,
                               const Range& range, int64 column,
                               Sums<Sum<T>, W>* sums) {
  int filled = 0;
  for (int64 first = range.start; first < range.end; first += kInFlight) {
    RowVectors<T, W, Id> vectors;
    vectors.Load(dense, slots, first, range.end, column);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      filled += vectors.filled[i] ? 1 : 0;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        sums->x[k] += vectors.factors[i] * Widen(vectors.rows[i].x[k]);
      }
    }
  }
  return filled;
}

// Adds the partial sums of a long bag, in order; returns the number of filled slots.
template <typename A, int W>
__device__ inline int AddPartials(const Partials& partials, const Range& range,
                                  int64 width, int64 column, Sums<A, W>* sums) {
  const A* from = static_cast<const A*>(partials.sums) + column;
  const int64 pieces = NumPieces(range);
  int filled = 0;
  for (int64 first = 0; first < pieces; first += kInFlight) {
    Sums<A, W> parts[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      parts[i].Fill(0);
      if (first + i >= pieces) continue;
      const int64 piece = PieceOf(range.start, first + i);
      parts[i].Load(from + piece * width);
      if (partials.integers != nullptr) filled += partials.integers[piece];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
      for (int k = 0; k < W; ++k) sums->x[k] += parts[i].x[k];
    }
  }
  return filled;
}

// The sums of a bag, of slots or of partial sums.
template <typename T, int W, typename Id>
__device__ inline int AddBag(const Dense& dense, const Slots& slots,
                             const Partials& partials, const Range& range, int64 column,
                             Sums<Sum<T>, W>* sums) {
  return IsLong(range) ? AddPartials(partials, range, dense.width, column, sums)
                       : AddSlots<T, W, Id>(dense, slots, range, column, sums);
}

// The partial sums of all pieces of long bags.
template <typename T, int W, typename Id>
__global__ void SumPieces(Dense dense, Slots slots, Partials partials, int64 num_pieces,
                          Division division) {
  const Part part = PartOf(division);
  const int64 column = part.vector * W;
  if (part.item >= num_pieces || column >= dense.width) return;
  const Range range = PieceRange(slots, part.item);
  if (range.start == range.end) return;
  Sums<Sum<T>, W> sums;
  sums.Fill(0);
  const int filled = AddSlots<T, W, Id>(dense, slots, range, column, &sums);
  Sum<T>* to = static_cast<Sum<T>*>(partials.sums) + part.item * dense.width + column;
  Store(sums, to);
  if (partials.integers != nullptr && column == 0) {
    partials.integers[part.item] = filled;
  }
}

// out[b] = the sums of bag b, averaged and rounded. With `rows`, out[rows[b]] for the
// bags that have slots.
template <typename T, int W, typename Id, typename Out>
__global__ void SumBags(Dense dense, Slots slots, Partials partials, const int* rows,
                        Out* out, Division division) {
  using A = Sum<T>;
  const Part part = PartOf(division);
  const int64 column = part.vector * W;
  if (part.item >= slots.num_bags || column >= dense.width) return;
  const Range range = RangeOf(slots, part.item);
  if (rows != nullptr && range.start == range.end) return;
  Sums<A, W> sums;
  sums.Fill(0);
  if (range.malformed) {
    sums.Fill(NaN<A>());
  } else {
    const int filled = AddBag<T, W, Id>(dense, slots, partials, range, column, &sums);
    if (slots.average != 0) {
      A divisor = filled > 1 ? filled : 1;
      if (slots.average == 2) divisor = sqrt(divisor);
#pragma unroll
      for (int k = 0; k < W; ++k) sums.x[k] /= divisor;
    }
  }
  const int64 row = rows != nullptr ? rows[part.item] : part.item;
  Store(sums, out + row * dense.width + column);
}

}  // namespace cuda
}  // namespace jbag
