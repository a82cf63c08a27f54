// What the host passes to the kernels: compiled by the host's compiler and by NVRTC.

#ifndef JBAG_CUDA_DEVICE_ARGUMENTS_H_
#define JBAG_CUDA_DEVICE_ARGUMENTS_H_

namespace jbag {
namespace cuda {

// A bag of more slots than a piece is summed by pieces, of which each is a partial sum:
// no bag, and no row of the transposed product, occupies one group of threads for long.
constexpr int kPiece = 256;

// The positions whose segments one warp counts.
constexpr int kChunk = 1024;

// Rows that a thread loads before it uses the first: by Little's law an H100 wants
// about 17 KB in flight in each multiprocessor.
constexpr int kInFlight = 8;

// Threads of a block.
constexpr int kBlock = 128;

// Ragged: ids [N] and bounds [B + 1]. Rectangular: ids [B, length], no bounds. A bound
// that replaces a malformed offset is stored as its complement.
struct Slots {
  const void* ids;
  const int* bounds;
  const void* coefficients;  // [N], of the type of sums; null: ones
  long long num_bags;
  long long num_slots;
  long long length;
  long long empty;  // the id of empty slots
  int has_empty;
  int average;  // 0: none, 1: mean, 2: sqrtn
};

// A row-major matrix whose rows the ids name.
struct Dense {
  const void* data;
  long long rows;
  int width;
};

// How threads divide a row: a group of 2^lanes_log2 threads, one vector each; the
// grid's second axis counts such parts of the row.
struct Division {
  int lanes_log2;
};

// Sums of pieces [P, D], their winners or numbers of filled slots.
struct Partials {
  void* sums;
  int* integers;
};

// A table to update, and the states of the rule, those per element first.
struct Table {
  void* data;
  void* states[2];
  const void* scalars;
  const unsigned* seed;
};

}  // namespace cuda
}  // namespace jbag

#endif  // JBAG_CUDA_DEVICE_ARGUMENTS_H_
