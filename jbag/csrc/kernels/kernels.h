// The operations of the embedding bag on a CPU, by plain pointers: no XLA, no Python.
//
// jbag/ops/kernels/contract.py has the meaning of the operations. Nothing is read or
// written outside the arrays that are given, whatever the ids and offsets hold. Results
// don't depend on the number of threads: sums run in an order that the bags alone
// decide.

#ifndef JBAG_KERNELS_KERNELS_H_
#define JBAG_KERNELS_KERNELS_H_

#include <stdint.h>

namespace jbag {

enum class Type { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kNumTypes = 4;

// A row-major matrix: a table [V, D], or one row per bag [B, D].
struct Matrix {
  void* data;
  Type type;
  int64_t rows;
  int64_t width;
};

// Integers of 32 or 64 bits; none where `data` is null.
struct Integers {
  const void* data;
  bool is_64_bit;
  int64_t size;

  int64_t operator[](int64_t i) const {
    return is_64_bit ? static_cast<const int64_t*>(data)[i]
                     : static_cast<const int32_t*>(data)[i];
  }
};

// Ragged: ids [N] and offsets [B + 1]. Rectangular: ids [B, length], no offsets.
struct Bags {
  Integers ids;
  Integers offsets;
  int64_t num_bags;
  int64_t length;
  const void* coefficients;  // [N], of the type that sums run in; null: ones
  bool has_empty;
  int64_t empty;  // the id of empty slots, if there are any
};

// Threads that run what is scheduled, some time. XLA's, or a test's.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int64_t num_threads() const = 0;
  virtual void Schedule(void (*task)(void*), void* data) = 0;
};

// Calls function(context, i) once for every i in [0, count), on the calling thread and
// those of the pool; returns when all are done. The caller does the work itself where
// the pool is busy, so that it can't wait for ever.
void ParallelFor(Pool& pool, int64_t count, void (*function)(void*, int64_t),
                 void* context);

template <typename F>
void ParallelFor(Pool& pool, int64_t count, F function) {
  ParallelFor(
      pool, count, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); }, &function);
}

// What a bag's sum is divided by: nothing, or the number of its filled slots (1 where
// there are none), or the root of that.
enum class Average { kNone, kMean, kSqrtN };

// How rows of a table move, given their gradient: jbag/ops/kernels/update_rules.py.
enum class Rule {
  kSgd,
  kMomentum,
  kAdagrad,
  kRowwiseAdagrad,
  kAdam,
  kRowwiseAdam,
  kRowwiseRmsprop,
  kFtrl,
  kCatchUp,
  kCatchUpMomentum,
  kCatchUpAdam,
  kCatchUpRowwiseAdam,
};

// A rule's name, how many numbers it takes, and how many states it keeps per element of
// the table [V, D] and per row [V], `steps` not counted. One that catches up reads no
// gradient, and a row's numbers are a column of a table.
struct RuleShape {
  const char* name;
  Rule rule;
  int numbers;
  int per_element;
  int per_row;
  bool catches_up = false;
};
constexpr RuleShape kRules[] = {
    {"sgd", Rule::kSgd, 2, 0, 0},
    {"momentum", Rule::kMomentum, 6, 1, 0},
    {"adagrad", Rule::kAdagrad, 3, 1, 0},
    {"rowwise_adagrad", Rule::kRowwiseAdagrad, 3, 0, 1},
    {"adam", Rule::kAdam, 5, 2, 0},
    {"rowwise_adam", Rule::kRowwiseAdam, 5, 1, 1},
    {"rowwise_rmsprop", Rule::kRowwiseRmsprop, 4, 0, 1},
    {"ftrl", Rule::kFtrl, 4, 2, 0},
    {"catch_up", Rule::kCatchUp, 1, 0, 0, true},
    {"catch_up_momentum", Rule::kCatchUpMomentum, 3, 1, 0, true},
    {"catch_up_adam", Rule::kCatchUpAdam, 9, 2, 0, true},
    {"catch_up_rowwise_adam", Rule::kCatchUpRowwiseAdam, 9, 1, 1, true},
};

// Those that take a gradient come first.
constexpr int kNumGradientRules = 8;

// A rule with its numbers and states, all of the type that sums run in.
struct Update {
  Rule rule;
  const void* numbers;
  void* states[2];           // those per element first
  const uint32_t* seed;      // [2] to round to bfloat16 at random; null: to nearest
  int32_t* steps = nullptr;  // [V]: those that a row has been through; null: unknown
  int32_t count = 0;         // the steps that are complete, modulo kStepPeriod
  int64_t columns = 0;       // of the numbers, a power of two, if the rule catches up
};
constexpr int32_t kStepPeriod = 1 << 24;

constexpr RuleShape ShapeOf(Rule rule) {
  for (const RuleShape& shape : kRules) {
    if (shape.rule == rule) return shape;
  }
  return {};
}

// What an operation returns: null, or what went wrong.
using Error = const char*;
constexpr Error kOutOfMemory = "jbag: not enough memory for the kernel's scratch space";
constexpr Error kTooManyRows = "jbag: tables must have fewer than 2^31 rows";

// The loops over features, compiled for one instruction set: simd_loops.h.
struct Loops;

// The widest that this machine can run.
const Loops& BestLoops();

const Loops* BaselineLoops();
#if defined(__x86_64__)
const Loops* Avx2Loops();
const Loops* Avx512Loops();
#endif

// The operations. Outputs are written whole.

// out [B, D] in the table's type or that of sums, rounded once: out[b] = sum of c[i]
// table[ids[i]], averaged.
Error Spmm(const Loops&, Pool&, const Matrix& table, const Bags&, Average,
           const Matrix& out);
// out [V, D]: out[v] = sum of c[i] cotangent[bag of i] where ids[i] = v.
Error SpmmTranspose(const Loops&, Pool&, const Matrix& cotangent, const Bags&,
                    const Matrix& out);
// out [N] in the type of sums: <table[ids[i]], cotangent[bag of i]>.
Error Sddmm(const Loops&, Pool&, const Matrix& table, const Matrix& cotangent,
            const Bags&, void* out);
// values [B, D] in the type of sums, and the slots [B, D] that hold them.
Error Extremum(const Loops&, Pool&, const Matrix& table, const Bags&, bool largest,
               void* values, int32_t* winners);
// indices [U] in the type of the ids: the rows that slots name, in order, each once,
// then `num_rows`; sums [U, D] in the type of sums: those rows of the transposed
// product, then zeros.
Error Coalesce(const Loops&, Pool&, const Matrix& cotangent, const Bags&,
               int64_t num_rows, void* indices, const Matrix& sums);
// Moves the rows of the table that slots name, and those of the states, in place.
Error UpdateRows(const Loops&, Pool&, const Matrix& table, const Update&,
                 const Matrix& cotangent, const Bags&);

// Memory of the kernels' own, on a cache line's bound; null where there is not enough.
// Some that is given back is kept for the next call, as the system takes longer to put
// pages behind new memory than a sort takes to fill them.
void* Borrow(int64_t bytes);
void GiveBack(void* data);

// Asks the system for huge pages behind [data, data + bytes), memory of the process's
// own that is about to be written whole: fewer page faults then, fewer page-table
// misses ever after. Nothing changes where the system refuses.
//
// Returns the part that holds zeros and needs none written, as it is new to the
// process: the system clears a page where it is first written.
struct Zeros {
  const char* first;
  const char* last;
};
Zeros PreferHugePages(void* data, int64_t bytes);

// Has the system back the huge page around `place`, if it lies in the array whole, and
// clear it where it is new. Nothing else is written.
void BackHugePage(void* data, int64_t bytes, const void* place);

// Copies, onto huge pages where the system grants them.
void CopyToHugePages(Pool& pool, const void* from, void* to, int64_t bytes);

}  // namespace jbag

#endif  // JBAG_KERNELS_KERNELS_H_
