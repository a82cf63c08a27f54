// The transposed bags: the key of each slot, by which XLA sorts, and the segments of
// equal keys after it.
//
// Traffic: the ids once, and 8 bytes a slot; then the keys twice, and 8 bytes a row.

namespace jbag {
namespace cuda {

// The row that a slot names, or `num_rows` where it names none, and its bag.
template <typename Id>
__global__ void SlotKeys(Slots slots, const int* num_rows, int* keys, int* bags) {
  const int64 slot = blockIdx.x * static_cast<int64>(blockDim.x) + threadIdx.x;
  if (slot >= slots.num_slots) return;
  const int64 bag = BagOf(slots, slot);
  const Id id = static_cast<const Id*>(slots.ids)[slot];
  const bool kept = bag < slots.num_bags && !RangeOf(slots, bag).malformed &&
                    !(slots.has_empty && id == slots.empty) && id >= 0 &&
                    id < *num_rows;
  keys[slot] = kept ? static_cast<int>(id) : *num_rows;
  bags[slot] = kept ? static_cast<int>(bag) : 0;
}

// Whether a segment starts at a position of the sorted keys.
__device__ inline bool IsHead(const int* keys, int64 i, int64 size, int num_rows) {
  return i < size && keys[i] < num_rows && (i == 0 || keys[i] != keys[i - 1]);
}

// counts[c]: the segments that start in chunk c; one warp a chunk.
__global__ void CountSegments(const int* keys, int64 size, const int* num_rows,
                              int* counts) {
  const int64 chunk = blockIdx.x;
  int count = 0;
#pragma unroll 8
  for (int64 i = chunk * kChunk + threadIdx.x; i < (chunk + 1) * kChunk; i += 32) {
    count += IsHead(keys, i, size, *num_rows) ? 1 : 0;
  }
  for (int step = 16; step > 0; step /= 2) {
    count += __shfl_xor_sync(0xffffffffu, count, step);
  }
  if (threadIdx.x == 0) counts[chunk] = count;
}

// Replaces counts by the sums of those before, and appends their total; one warp.
__global__ void AccumulateCounts(int* counts, int64 num_chunks) {
  const int lane = threadIdx.x;
  int carried = 0;
  for (int64 base = 0; base < num_chunks; base += 32) {
    const int64 i = base + lane;
    const int count = i < num_chunks ? counts[i] : 0;
    int sum = count;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    if (i < num_chunks) counts[i] = carried + sum - count;
    carried += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) counts[num_chunks] = carried;
}

// starts [C + 1] of the first C segments, and their keys, rows [C]; past the last
// segment, the number of kept slots and `num_rows`. One warp a chunk.
template <typename Id>
__global__ void WriteSegments(const int* keys, int64 size, const int* num_rows,
                              const int* counts, int64 capacity, int* starts,
                              Id* rows) {
  const int64 chunk = blockIdx.x;
  const int lane = threadIdx.x;
  int64 rank = counts[chunk];
  for (int64 base = chunk * kChunk; base < (chunk + 1) * kChunk && base < size;
       base += 32) {
    const bool is_head = IsHead(keys, base + lane, size, *num_rows);
    const uint32 heads = __ballot_sync(0xffffffffu, is_head);
    const int64 own = rank + __popc(heads & ((1u << lane) - 1));
    if (is_head && own <= capacity) {
      starts[own] = static_cast<int>(base + lane);
      if (own < capacity) rows[own] = keys[base + lane];
    }
    rank += __popc(heads);
  }
  int64 kept = 0;
  int64 high = size;
  while (kept < high) {
    const int64 middle = (kept + high) / 2;
    if (keys[middle] < *num_rows) {
      kept = middle + 1;
    } else {
      high = middle;
    }
  }
  const int64 count = counts[gridDim.x];
  for (int64 i = count + chunk * 32 + lane; i <= capacity; i += gridDim.x * 32LL) {
    starts[i] = static_cast<int>(kept);
    if (i < capacity) rows[i] = *num_rows;
  }
}

}  // namespace cuda
}  // namespace jbag
