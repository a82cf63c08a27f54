// Sampled dots: out[i] = <table[ids[i]], cotangent[bag of i]>.
//
// Traffic: each slot's id and row once; the bag's row, mostly from cache.

namespace jbag {
namespace cuda {

// A group computes the dots of kInFlight slots that follow each other.
template <typename T, int W, typename Id>
__global__ void Dots(Dense table, Slots slots, const Sum<T>* cotangent, Sum<T>* out,
                     Division division) {
  using A = Sum<T>;
  const Part part = PartOf(division);
  const int64 first = part.item * kInFlight;
  if (first >= slots.num_slots) return;
  const int64 end =
      first + kInFlight < slots.num_slots ? first + kInFlight : slots.num_slots;

  int bags[kInFlight];  // -1: the slot is in no bag
  int64 bag = 0;
  Range range{0, 0, false};
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (range.end <= first + i && bag < slots.num_bags) {
      bag = BagOf(slots, first + i);
      if (bag < slots.num_bags) range = RangeOf(slots, bag);
    }
    const bool inside = bag < slots.num_bags && !range.malformed;
    bags[i] = inside ? static_cast<int>(bag) : -1;
  }

  A sums[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) sums[i] = 0;
  const int lanes = 1 << division.lanes_log2;
  for (int64 vector = part.vector; vector * W < table.width; vector += lanes) {
    RowVectors<T, W, Id> vectors;
    vectors.Load(table, slots, first, end, vector * W);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!vectors.filled[i] || bags[i] < 0) continue;
      Sums<A, W> row;
      row.Load(cotangent + static_cast<int64>(bags[i]) * table.width + vector * W);
      A dot = 0;
#pragma unroll
      for (int k = 0; k < W; ++k) dot += Widen(vectors.rows[i].x[k]) * row.x[k];
      sums[i] += vectors.factors[i] * dot;  // NaN for unknown ids
    }
  }
  const uint32 lane = threadIdx.x % 32;
  const uint32 group = lane >> division.lanes_log2 << division.lanes_log2;
  const uint32 mask = (lanes == 32 ? 0xffffffffu : (1u << lanes) - 1) << group;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    for (int step = lanes / 2; step > 0; step /= 2) {
      sums[i] += __shfl_xor_sync(mask, sums[i], step);
    }
    if (part.vector == 0 && first + i < end) out[first + i] = sums[i];
  }
}

}  // namespace cuda
}  // namespace jbag
