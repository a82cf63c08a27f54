// Bags, their pieces, and the vectors of the rows that their slots name.

namespace jbag {
namespace cuda {

struct Range {
  int64 start;
  int64 end;
  bool malformed;
};

__device__ inline int64 BoundOf(int bound) { return bound < 0 ? ~bound : bound; }

__device__ inline Range RangeOf(const Slots& slots, int64 bag) {
  if (slots.bounds == nullptr) {
    return {bag * slots.length, (bag + 1) * slots.length, false};
  }
  const int start = slots.bounds[bag];
  const int end = slots.bounds[bag + 1];
  return {BoundOf(start), BoundOf(end), start < 0 || end < 0};
}

// The bag of a slot: the first that ends past it, or `num_bags`.
__device__ inline int64 BagOf(const Slots& slots, int64 slot) {
  if (slots.bounds == nullptr) {
    // There are fewer than 2^31 slots, and 64-bit divisions are slow.
    return static_cast<uint32>(slot) / static_cast<uint32>(slots.length);
  }
  int64 low = 0;
  int64 high = slots.num_bags;
  while (low < high) {
    const int64 middle = (low + high) / 2;
    if (BoundOf(slots.bounds[middle + 1]) > slot) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Pieces are numbered by the kPiece slots in which they start: in each such window at
// most one piece starts of a long bag from an earlier window, 2 * window, and the first
// piece of one other long bag, 2 * window + 1.
__device__ inline int64 PieceOf(int64 start, int64 piece) {
  return 2 * (start / kPiece + piece) + (piece == 0 ? 1 : 0);
}
__device__ inline bool IsLong(const Range& range) {
  return range.end - range.start > kPiece;
}
__device__ inline int64 NumPieces(const Range& range) {
  return (range.end - range.start + kPiece - 1) / kPiece;
}

// The slots of a piece; none if no long bag has it.
__device__ inline Range PieceRange(const Slots& slots, int64 piece) {
  const int64 window = piece / 2 * kPiece;
  const bool first = piece % 2 == 1;
  const int64 slot = first ? window + kPiece - 1 : window;
  if (slot >= slots.num_slots) return {0, 0, false};
  const int64 bag = BagOf(slots, slot);
  if (bag == slots.num_bags) return {0, 0, false};
  const Range range = RangeOf(slots, bag);
  if (!IsLong(range) || range.malformed || (range.start >= window) != first) {
    return {0, 0, false};
  }
  const int64 from = range.start + (window - range.start / kPiece * kPiece);
  if (from >= range.end) return {0, 0, false};
  return {from, from + kPiece < range.end ? from + kPiece : range.end, false};
}

// A thread's part of the work: the item of its group, and its vector of the row.
struct Part {
  int64 item;
  int64 vector;
};
__device__ inline Part PartOf(const Division& division) {
  const int64 groups = blockDim.x >> division.lanes_log2;
  const int lane = threadIdx.x & ((1 << division.lanes_log2) - 1);
  return {blockIdx.x * groups + (threadIdx.x >> division.lanes_log2),
          (static_cast<int64>(blockIdx.y) << division.lanes_log2) + lane};
}

// Whether an id names a row; there are fewer than 2^31.
__device__ inline bool Names(int id, int64 num_rows) {
  return static_cast<uint32>(id) < static_cast<uint32>(num_rows);
}
__device__ inline bool Names(int64 id, int64 num_rows) {
  return id >= 0 && id < num_rows;
}

// The vectors at one column of the rows that kInFlight slots name, from `first` on, and
// the factors to multiply them by. Slots from `end` on and empty ones have zeros,
// unknown ids zeros by NaN.
template <typename T, int W, typename Id>
struct RowVectors {
  using A = Sum<T>;
  using V = Vector<T, W>;
  V rows[kInFlight];
  A factors[kInFlight];
  bool filled[kInFlight];

  __device__ void Load(const Dense& dense, const Slots& slots, int64 first, int64 end,
                       int64 column) {
    const Id* ids = static_cast<const Id*>(slots.ids) + first;
    const A* coefficients = static_cast<const A*>(slots.coefficients) + first;
    const T* data = static_cast<const T*>(dense.data) + column;
    const int64 left = end - first;
    if (left >= kInFlight) {
      Id names[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) names[i] = __ldg(ids + i);
      bool plain = true;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        plain &= Names(names[i], dense.rows);
        plain &= !(slots.has_empty && names[i] == slots.empty);
      }
      // Without conditions, so that all loads are issued before a result is used.
      if (plain) {
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          rows[i].words = LoadRow(data, names[i], dense.width);
          filled[i] = true;
        }
        if (slots.coefficients != nullptr) {
#pragma unroll
          for (int i = 0; i < kInFlight; ++i) factors[i] = __ldg(coefficients + i);
        } else {
#pragma unroll
          for (int i = 0; i < kInFlight; ++i) factors[i] = 1;
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const Id name = i < left ? __ldg(ids + i) : Id(0);
      filled[i] = i < left && !(slots.has_empty && name == slots.empty);
      const bool known = filled[i] && Names(name, dense.rows);
      rows[i].words = known ? LoadRow(data, name, dense.width) : V::Words::Zeros();
      factors[i] = filled[i] && !known ? NaN<A>() : A(1);
      if (known && slots.coefficients != nullptr) factors[i] = __ldg(coefficients + i);
    }
  }

  static __device__ typename V::Words::Type LoadRow(const T* data, Id name, int width) {
    const T* row = data + static_cast<int64>(static_cast<int>(name)) * width;
    return __ldg(reinterpret_cast<const typename V::Words::Type*>(row));
  }
};

// bounds[i] = offsets[i] within the slots; sets `flag` where a bag is malformed.
template <typename Offset>
__global__ void CheckBounds(const Offset* offsets, int64 count, int64 num_slots,
                            int* bounds, int* flag) {
  const int64 i = blockIdx.x * static_cast<int64>(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  const Offset offset = offsets[i];
  const Offset before = i > 0 ? offsets[i - 1] : 0;
  const bool inside = offset >= 0 && offset <= num_slots;
  bounds[i] = inside ? static_cast<int>(offset) : 0;
  // All threads that write it write the same.
  if (!inside || offset < before || (i == 0 && offset != 0)) *flag = 1;
}

// Where the flag is set: the running maximum of the offsets within the slots, by one
// warp; the complement where that is not the offset.
template <typename Offset>
__global__ void RepairBounds(const Offset* offsets, int64 count, int64 num_slots,
                             int* bounds, const int* flag) {
  if (*flag == 0) return;
  const int lane = threadIdx.x;
  int carried = 0;
  for (int64 base = 0; base < count; base += 32) {
    const int64 i = base + lane;
    const Offset offset = i < count ? offsets[i] : Offset(0);
    int bound = 0;
    if (i > 0 && offset > 0) {
      bound = static_cast<int>(offset < num_slots ? offset : num_slots);
    }
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, bound, step);
      if (lane >= step && other > bound) bound = other;
    }
    if (carried > bound) bound = carried;
    if (i < count) bounds[i] = bound == offset ? bound : ~bound;
    carried = __shfl_sync(0xffffffffu, bound, 31);
  }
}

}  // namespace cuda
}  // namespace jbag
