// The slots of bags: the rows of a matrix that they name, and their coefficients.
//
// Traffic: 4 bytes a slot for the id, and its coefficient if there are any. Rows are
// prefetched some slots ahead of the one that is read.

#ifndef JBAG_KERNELS_GATHERED_ROWS_H_
#define JBAG_KERNELS_GATHERED_ROWS_H_

#include <stdint.h>

#include "kernels/integer_math.h"
#include "kernels/kernels.h"

namespace jbag {

// What a loop reads. Its functions are those of Slots below.
struct SlotRows {
  uintptr_t matrix;
  uint32_t num_rows;
  int64_t width;
  int64_t stride;  // bytes
  const int32_t* ids;
  bool has_empty;
  uint32_t empty;
  int64_t last;  // slot
  const void* coefficients;
  int64_t mask;    // 0 where one coefficient is that of every slot, else -1
  int64_t ahead;   // slots
  bool straddles;  // whether rows may start within a line
};

// Ids in 32 bits. One that equals `empty` is an empty slot; any other outside [0,
// num_rows) names no row. Without `has_empty`, `empty` is an id of the latter kind.
struct Ids {
  const int32_t* data;
  int64_t size;
  bool has_empty;
  int32_t empty;

  Ids first(int64_t count) const { return {data, count, has_empty, empty}; }
};

namespace {

inline int64_t SizeOf(Type type) {
  switch (type) {
    case Type::kFloat32:
      return 4;
    case Type::kFloat64:
      return 8;
    default:
      return 2;
  }
}

// The type that sums over rows of `type` have.
inline Type SumType(Type type) {
  return type == Type::kFloat64 ? type : Type::kFloat32;
}

constexpr uintptr_t kLine = 64;

// Inlined by force: GCC takes a function that only prefetches for one that does
// nothing, and drops the call.
__attribute__((always_inline)) inline void Prefetch(uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address));
}

// No type of the rows is a parameter of this class, so that code that only divides
// slots among threads is compiled once. It is local to each file that includes it, as
// these are compiled for different instruction sets.
class Slots : public SlotRows {
 public:
  explicit Slots(const SlotRows& rows) : SlotRows(rows) {}
  // `factors`, of the type of sums, is null where all are 1.
  Slots(const Matrix& from, const Ids& named, const void* factors) {
    matrix = reinterpret_cast<uintptr_t>(from.data);
    num_rows = static_cast<uint32_t>(from.rows);
    width = from.width;
    stride = from.width * SizeOf(from.type);
    ids = named.data;
    has_empty = named.has_empty;
    empty = static_cast<uint32_t>(named.empty);
    last = named.size - 1;
    coefficients = factors;
    mask = -1;
    if (factors == nullptr) {
      mask = 0;
      coefficients = from.type == Type::kFloat64 ? static_cast<const void*>(&kOneDouble)
                                                 : &kOneFloat;
    }
    ahead = Clamp(kBytesAhead / Max(stride, 1), 8, 32);
    straddles = Straddles(matrix, stride);
  }

  bool weighted() const { return mask != 0; }
  bool is_empty(int32_t id) const {
    return has_empty && static_cast<uint32_t>(id) == empty;
  }
  // The number of slots in [first, end) that aren't empty.
  int64_t NumFilled(int64_t first, int64_t end) const {
    int64_t count = end - first;
    if (has_empty) {
      for (int64_t slot = first; slot < end; ++slot) count -= is_empty(ids[slot]);
    }
    return count;
  }
  // The row of a slot, or null where there is none.
  template <typename Row>
  const Row* row(int64_t slot) const {
    const uint32_t named = id(slot);
    if (__builtin_expect(named >= num_rows || named == empty, 0)) return nullptr;
    return reinterpret_cast<const Row*>(Address(named));
  }
  // Without coefficients the mask picks the one for every slot.
  const void* coefficient(int64_t slot, int64_t size) const {
    return static_cast<const char*>(coefficients) + (slot & mask) * size;
  }
  template <typename A>
  A coefficient(int64_t slot) const {
    return static_cast<const A*>(coefficients)[slot & mask];
  }

  // How far ahead a loop that ends before `end` fetches: not past the last slot of
  // all.
  int64_t Ahead(int64_t end) const { return Min(ahead, last - (end - 1)); }

  // Fetches the whole row of the slot some slots ahead.
  __attribute__((always_inline)) void FetchAhead(int64_t slot) const {
    Fetch(Min(slot + ahead, last));
  }
  // Fetches what would have been fetched before `slot`, where a thread starts anew.
  __attribute__((always_inline)) void FetchFirst(int64_t slot) const {
    for (int64_t i = 0; i < ahead && slot + i <= last; ++i) Fetch(slot + i);
  }

 private:
  static constexpr int64_t kBytesAhead = 1 << 12;
  static constexpr float kOneFloat = 1;
  static constexpr double kOneDouble = 1;

  // Negative ids are past every row.
  uint32_t id(int64_t slot) const { return static_cast<uint32_t>(ids[slot]); }

  // Whether some row of a matrix starts within a line and ends in the next.
  static bool Straddles(uintptr_t matrix, uintptr_t stride) {
    return stride % kLine == 0
               ? matrix % kLine != 0
               : stride == 0 || kLine % stride != 0 || matrix % stride != 0;
  }

  // The address of an id's row. An integer, as the id may be out of range: a prefetch
  // of such an address does no harm.
  uintptr_t Address(uint32_t named) const {
    return matrix + static_cast<uintptr_t>(named) * static_cast<uintptr_t>(stride);
  }

  __attribute__((always_inline)) void Fetch(int64_t slot) const {
    const uintptr_t row = Address(id(slot));
    const uintptr_t bytes = static_cast<uintptr_t>(stride);
    // By distances: the address of a row that isn't there may wrap.
    for (uintptr_t at = 0; at < bytes; at += kLine) Prefetch(row + at);
    Prefetch(row + bytes - 1);
  }
};

// What a loop over a tile of columns holds in registers.
template <typename Row>
class TileSlots {
 public:
  explicit TileSlots(const SlotRows& rows)
      : matrix_(rows.matrix),
        stride_(static_cast<uintptr_t>(rows.stride)),
        num_rows_(rows.num_rows),
        empty_(rows.empty),
        straddles_(rows.straddles) {}

  // The tile that starts at a column.
  TileSlots From(int64_t column) const {
    TileSlots tile = *this;
    tile.matrix_ += static_cast<uintptr_t>(column) * sizeof(Row);
    return tile;
  }

  // Whether an id names a row.
  bool is_row(int32_t id) const {
    return static_cast<uint32_t>(id) < num_rows_ && static_cast<uint32_t>(id) != empty_;
  }
  const Row* row(int32_t id) const { return reinterpret_cast<const Row*>(Address(id)); }

  // Fetches what a tile of K vectors of W reads of a slot's row; the last vector starts
  // at `last_offset`. Inlined by force: see Prefetch.
  template <int W, int K>
  __attribute__((always_inline)) void Fetch(const int32_t* slot,
                                            int64_t last_offset) const {
    const uintptr_t tile = Address(*slot);
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      const int64_t offset = j < K - 1 || K == 1 ? j * W : last_offset;
      if (j * W * sizeof(Row) % kLine == 0) Prefetch(tile + offset * sizeof(Row));
    }
    if (!straddles_) return;
    // A line that isn't fetched yet; twice the same would be two page walks.
    const uintptr_t start = tile + (K == 1 ? 0 : last_offset) * sizeof(Row);
    const uintptr_t end = start + W * sizeof(Row) - 1;
    const uintptr_t here = reinterpret_cast<uintptr_t>(slot);
    Prefetch(start / kLine == end / kLine ? here : end);
  }

 private:
  uintptr_t Address(int32_t id) const {
    return matrix_ + static_cast<uint32_t>(id) * stride_;
  }

  uintptr_t matrix_;
  uintptr_t stride_;  // bytes
  uint32_t num_rows_;
  uint32_t empty_;
  bool straddles_;
};

}  // namespace
}  // namespace jbag

#endif  // JBAG_KERNELS_GATHERED_ROWS_H_
