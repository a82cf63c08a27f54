// A vocabulary of 64-bit ids: jbag/vocabulary/_reference.py has the meaning.

#ifndef JBAG_KERNELS_VOCABULARY_H_
#define JBAG_KERNELS_VOCABULARY_H_

#include <stdint.h>

#include "kernels/kernels.h"

namespace jbag {

enum class Eviction { kNone, kLru, kLfu };

struct VocabularyOptions {
  int64_t bucket_size;
  int64_t num_buckets;  // of the whole vocabulary
  int64_t num_reserved;
  bool hashed_unknown;
  int64_t num_probes;
  int64_t admission_count;
  Eviction eviction;
  int64_t time_to_live;
  int64_t cells_per_bucket;  // of the sketch

  int64_t num_slots() const { return bucket_size - num_reserved; }
};

// The counters of each bucket.
constexpr int kNumCounters = 6;
enum Counter { kHits, kMisses, kAdmissions, kEvictions, kRejections, kSize };

// The ids of rows [V], of `num_buckets` buckets from `first_bucket` on.
struct VocabularyKeys {
  const uint32_t* high;
  const uint32_t* low;
  const int32_t* last_seen;
  int64_t num_buckets;
  int64_t first_bucket;

  // Whether a row with this id is not free. Free rows have the id 0: for other ids a
  // read of `last_seen` is saved.
  bool IsTaken(int64_t row, uint32_t own_high, uint32_t own_low) const {
    return (own_high | own_low) != 0 || last_seen[row] >= 0;
  }
};

// The arrays of a state, changed in place.
struct VocabularyArrays {
  uint32_t* high;
  uint32_t* low;
  int32_t* last_seen;
  int32_t* counts;
  bool* is_new;
  uint32_t* sketch;
  uint32_t* sketch_updates;
  uint32_t* counters[kNumCounters];
  int64_t num_buckets;
  int64_t first_bucket;

  VocabularyKeys keys() const {
    return {high, low, last_seen, num_buckets, first_bucket};
  }
};

// Ids as two words [size].
struct WideIds {
  const uint32_t* high;
  const uint32_t* low;
  const bool* is_valid;
  int64_t size;
};

// rows [N].
Error AssignIds(Pool&, const VocabularyOptions&, const VocabularyArrays&,
                const WideIds&, int32_t step, int32_t* rows);
Error LookUpIds(Pool&, const VocabularyOptions&, const VocabularyKeys&, const WideIds&,
                int32_t* rows);
// The positions of true in `is_new` [size], in order, then `size`; at most `most`.
void FindNewRows(const bool* is_new, int64_t size, int32_t* rows, int64_t most);

}  // namespace jbag

#endif  // JBAG_KERNELS_VOCABULARY_H_
