// The operations of a vocabulary as XLA FFI handlers.

#include <stdint.h>
#include <string.h>

#include <string_view>

#include "ffi/buffers.h"
#include "kernels/vocabulary.h"
#include "xla/ffi/api/ffi.h"

namespace jbag {
namespace {

template <ffi::DataType type>
using Vector = ffi::BufferR1<type>;
template <ffi::DataType type>
using VectorOut = ffi::Result<ffi::BufferR1<type>>;
using Scalar = ffi::BufferR0<ffi::S32>;

// Reads the options; null, or what is wrong.
const char* ReadOptions(int64_t bucket_size, int64_t num_buckets, int64_t num_reserved,
                        bool hashed_unknown, int64_t num_probes,
                        int64_t admission_count, std::string_view eviction,
                        int64_t time_to_live, int64_t num_rows,
                        VocabularyOptions* out) {
  *out = {bucket_size,     num_buckets,  num_reserved,
          hashed_unknown,  num_probes,   admission_count,
          Eviction::kNone, time_to_live, 0};
  if (eviction == "lru") {
    out->eviction = Eviction::kLru;
  } else if (eviction == "lfu") {
    out->eviction = Eviction::kLfu;
  } else if (eviction != "none") {
    return "eviction must be lru, lfu or none";
  }
  if (num_reserved < 1 || num_reserved >= bucket_size || num_probes < 1 ||
      num_probes > bucket_size - num_reserved || num_buckets < 1 || time_to_live < 0 ||
      num_buckets > INT32_MAX || bucket_size > INT32_MAX || num_rows > INT32_MAX ||
      num_rows % bucket_size != 0) {
    return "the options of a vocabulary must be valid";
  }
  return nullptr;
}

bool ReadIds(const Vector<ffi::U32>& high, const Vector<ffi::U32>& low,
             const Vector<ffi::PRED>& is_valid, size_t num_rows, WideIds* out) {
  const size_t size = low.element_count();
  *out = {high.typed_data(), low.typed_data(), is_valid.typed_data(),
          static_cast<int64_t>(size)};
  return high.element_count() == size && is_valid.element_count() == size &&
         num_rows == size && size <= INT32_MAX;
}

// Copies an operand to its result, unless XLA lets them share memory.
void CopyUnlessSame(const void* from, void* to, size_t bytes) {
  if (from != to && bytes > 0) memcpy(to, from, bytes);
}

// Returns whether the result has `size` elements, and copies the operand to it.
template <ffi::DataType type>
bool Continue(const Vector<type>& from, VectorOut<type>& to, size_t size) {
  if (from.element_count() != size || to->element_count() != size) return false;
  CopyUnlessSame(from.untyped_data(), to->untyped_data(), to->size_bytes());
  return true;
}

ffi::Error BindAssign(
    ffi::ThreadPool threads, Vector<ffi::U32> old_high, Vector<ffi::U32> old_low,
    Vector<ffi::S32> old_last_seen, Vector<ffi::S32> old_counts,
    [[maybe_unused]] Vector<ffi::PRED> old_is_new, Vector<ffi::U32> old_sketch,
    Vector<ffi::U32> old_updates, Vector<ffi::U32> id_high, Vector<ffi::U32> id_low,
    Vector<ffi::PRED> is_valid, Scalar step, Scalar first_bucket,
    ffi::RemainingArgs old_counters, int64_t bucket_size, int64_t num_buckets,
    int64_t num_reserved, bool hashed_unknown, int64_t num_probes,
    int64_t admission_count, std::string_view eviction, int64_t time_to_live,
    VectorOut<ffi::S32> rows, VectorOut<ffi::U32> high, VectorOut<ffi::U32> low,
    VectorOut<ffi::S32> last_seen, VectorOut<ffi::S32> counts,
    VectorOut<ffi::PRED> is_new, VectorOut<ffi::U32> sketch,
    VectorOut<ffi::U32> updates, ffi::RemainingRets counters) {
  XlaPool pool(threads);
  const size_t num_rows = high->element_count();
  VocabularyOptions options;
  if (const char* wrong =
          ReadOptions(bucket_size, num_buckets, num_reserved, hashed_unknown,
                      num_probes, admission_count, eviction, time_to_live,
                      static_cast<int64_t>(num_rows), &options)) {
    return Invalid(wrong);
  }
  const size_t num_local = num_rows / static_cast<size_t>(bucket_size);
  const size_t cells = num_local > 0 ? sketch->element_count() / num_local : 0;
  if (admission_count > 1 && (cells < 16 || (cells & (cells - 1)) != 0)) {
    return Invalid("a bucket's sketch must have a power of two of cells");
  }
  options.cells_per_bucket = static_cast<int64_t>(cells);
  WideIds ids;
  if (!ReadIds(id_high, id_low, is_valid, rows->element_count(), &ids)) {
    return Invalid("ids and rows must be [N]");
  }
  if (is_new->element_count() != num_rows || !Continue(old_high, high, num_rows) ||
      !Continue(old_low, low, num_rows) ||
      !Continue(old_last_seen, last_seen, num_rows) ||
      !Continue(old_counts, counts, num_rows) ||
      !Continue(old_sketch, sketch, cells * num_local) ||
      !Continue(old_updates, updates, num_local)) {
    return Invalid("the arrays of a state must be [V] or [G]");
  }
  VocabularyArrays arrays{high->typed_data(),
                          low->typed_data(),
                          last_seen->typed_data(),
                          counts->typed_data(),
                          is_new->typed_data(),
                          sketch->typed_data(),
                          updates->typed_data(),
                          {},
                          static_cast<int64_t>(num_local),
                          first_bucket.typed_data()[0]};
  if (old_counters.size() != kNumCounters || counters.size() != kNumCounters) {
    return Invalid("a state must have all counters");
  }
  for (size_t i = 0; i < kNumCounters; ++i) {
    auto from = old_counters.get<Vector<ffi::U32>>(i);
    auto to = counters.get<Vector<ffi::U32>>(i);
    if (!from.has_value() || !to.has_value() || !Continue(*from, *to, num_local)) {
      return Invalid("counters must be [G]");
    }
    arrays.counters[i] = (*to)->typed_data();
  }
  return Returned(
      AssignIds(pool, options, arrays, ids, step.typed_data()[0], rows->typed_data()));
}

ffi::Error BindLookup(ffi::ThreadPool threads, Vector<ffi::U32> high,
                      Vector<ffi::U32> low, Vector<ffi::S32> last_seen,
                      Vector<ffi::U32> id_high, Vector<ffi::U32> id_low,
                      Vector<ffi::PRED> is_valid, Scalar first_bucket,
                      int64_t bucket_size, int64_t num_buckets, int64_t num_reserved,
                      bool hashed_unknown, int64_t num_probes, int64_t admission_count,
                      std::string_view eviction, int64_t time_to_live,
                      VectorOut<ffi::S32> rows) {
  XlaPool pool(threads);
  const size_t num_rows = high.element_count();
  VocabularyOptions options;
  if (const char* wrong =
          ReadOptions(bucket_size, num_buckets, num_reserved, hashed_unknown,
                      num_probes, admission_count, eviction, time_to_live,
                      static_cast<int64_t>(num_rows), &options)) {
    return Invalid(wrong);
  }
  if (low.element_count() != num_rows || last_seen.element_count() != num_rows) {
    return Invalid("the arrays of a state must be [V]");
  }
  WideIds ids;
  if (!ReadIds(id_high, id_low, is_valid, rows->element_count(), &ids)) {
    return Invalid("ids and rows must be [N]");
  }
  const VocabularyKeys keys{high.typed_data(), low.typed_data(), last_seen.typed_data(),
                            static_cast<int64_t>(num_rows) / bucket_size,
                            first_bucket.typed_data()[0]};
  return Returned(LookUpIds(pool, options, keys, ids, rows->typed_data()));
}

ffi::Error BindNewRows(Vector<ffi::PRED> is_new, VectorOut<ffi::S32> rows) {
  FindNewRows(is_new.typed_data(), static_cast<int64_t>(is_new.element_count()),
              rows->typed_data(), static_cast<int64_t>(rows->element_count()));
  return ffi::Error::Success();
}

}  // namespace

// The library hides all the rest.
#pragma GCC visibility push(default)
extern "C" {

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_vocabulary_assign, BindAssign,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Vector<ffi::U32>>()   // high
                                  .Arg<Vector<ffi::U32>>()   // low
                                  .Arg<Vector<ffi::S32>>()   // last_seen
                                  .Arg<Vector<ffi::S32>>()   // counts
                                  .Arg<Vector<ffi::PRED>>()  // is_new
                                  .Arg<Vector<ffi::U32>>()   // sketch
                                  .Arg<Vector<ffi::U32>>()   // sketch_updates
                                  .Arg<Vector<ffi::U32>>()   // ids' high
                                  .Arg<Vector<ffi::U32>>()   // ids' low
                                  .Arg<Vector<ffi::PRED>>()  // is_valid
                                  .Arg<Scalar>()             // step
                                  .Arg<Scalar>()             // first_bucket
                                  .RemainingArgs()           // counters
                                  .Attr<int64_t>("bucket_size")
                                  .Attr<int64_t>("num_buckets")
                                  .Attr<int64_t>("num_reserved")
                                  .Attr<bool>("hashed_unknown")
                                  .Attr<int64_t>("num_probes")
                                  .Attr<int64_t>("admission_count")
                                  .Attr<std::string_view>("eviction")
                                  .Attr<int64_t>("time_to_live")
                                  .Ret<Vector<ffi::S32>>()   // rows
                                  .Ret<Vector<ffi::U32>>()   // high
                                  .Ret<Vector<ffi::U32>>()   // low
                                  .Ret<Vector<ffi::S32>>()   // last_seen
                                  .Ret<Vector<ffi::S32>>()   // counts
                                  .Ret<Vector<ffi::PRED>>()  // is_new
                                  .Ret<Vector<ffi::U32>>()   // sketch
                                  .Ret<Vector<ffi::U32>>()   // sketch_updates
                                  .RemainingRets());         // counters

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_vocabulary_lookup, BindLookup,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Vector<ffi::U32>>()   // high
                                  .Arg<Vector<ffi::U32>>()   // low
                                  .Arg<Vector<ffi::S32>>()   // last_seen
                                  .Arg<Vector<ffi::U32>>()   // ids' high
                                  .Arg<Vector<ffi::U32>>()   // ids' low
                                  .Arg<Vector<ffi::PRED>>()  // is_valid
                                  .Arg<Scalar>()             // first_bucket
                                  .Attr<int64_t>("bucket_size")
                                  .Attr<int64_t>("num_buckets")
                                  .Attr<int64_t>("num_reserved")
                                  .Attr<bool>("hashed_unknown")
                                  .Attr<int64_t>("num_probes")
                                  .Attr<int64_t>("admission_count")
                                  .Attr<std::string_view>("eviction")
                                  .Attr<int64_t>("time_to_live")
                                  .Ret<Vector<ffi::S32>>());  // rows

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_vocabulary_new_rows, BindNewRows,
                              ffi::Ffi::Bind()
                                  .Arg<Vector<ffi::PRED>>()   // is_new
                                  .Ret<Vector<ffi::S32>>());  // rows

}  // extern "C"
#pragma GCC visibility pop

}  // namespace jbag
