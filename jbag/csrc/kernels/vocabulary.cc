// The assignment of rows to 64-bit ids, and their lookup.
//
// Ids are divided by bucket, and a thread processes a bucket whole: buckets share no
// row, so that nothing is locked, and the part of the state that a bucket needs stays
// in the cache.
//
// Traffic of an assignment: 16 bytes an id for the division; the probes' lower words;
// for an id with a row, a line each of upper words, steps and counts; for another id,
// the probes' steps (and counts for LFU), and a line of the sketch.

#include "kernels/vocabulary.h"

#include <string.h>

#include <algorithm>

#include "kernels/bags.h"
#include "kernels/integer_math.h"
#include "kernels/vocabulary_search.h"

namespace jbag {
namespace {

constexpr int kCells = 16;  // in a line of the sketch, a cache line
constexpr uint32_t kCountBits = 28;
constexpr uint32_t kCountMask = (uint32_t{1} << kCountBits) - 1;
constexpr uint32_t kMostCounted = 1 << 16;
constexpr int32_t kNone = INT32_MAX;

typedef int32_t Four __attribute__((vector_size(16)));

// A distinct id without a row.
struct Newcomer {
  uint32_t high;
  uint32_t low;
  uint32_t start;
  uint32_t spare;
  int32_t occurrences = 0;
  int32_t counted = 0;
  int32_t score = -2;  // of the slot that it wants; below that of any slot for none yet
  int32_t probe = -1;
  int64_t row = -1;  // of that slot, among the local ones; negative for none

  bool IsPreferredTo(const Newcomer& other) const {
    if (counted != other.counted) return counted > other.counted;
    if (high != other.high) return high < other.high;
    return low < other.low;
  }
};

// An assignment in one bucket.
class Bucket {
 public:
  Bucket(const VocabularyOptions& options, const VocabularyArrays& arrays,
         const Modulus& reserved, int64_t bucket, int32_t step, int32_t* rows)
      : options_(options),
        arrays_(arrays),
        reserved_(reserved),
        bucket_(bucket),
        step_(step),
        limit_(step - options.time_to_live),
        first_row_(arrays.first_bucket * options.bucket_size),
        probes_(options, arrays.keys(), bucket),
        rows_(rows) {}

  // `newcomers` has the size of the entries, and `memory` Numbers::Size of it.
  void Assign(Entry* entries, int64_t size, Newcomer* newcomers, uint32_t* memory) {
    newcomers_ = newcomers;
    memset(arrays_.is_new + bucket_ * options_.bucket_size, 0,
           static_cast<size_t>(options_.bucket_size));
    const int64_t num_missed = FindRows(entries, size);
    Distinguish(entries, num_missed, memory);
    if (options_.admission_count > 1) CountInSketch();
    Match(memory);
    Insert();
    for (int64_t i = 0; i < num_missed; ++i) {
      const Newcomer& own = newcomers_[entries[i].start];
      rows_[entries[i].index] =
          own.row >= 0 ? static_cast<int32_t>(first_row_ + own.row)
                       : UnknownRow(options_, reserved_, arrays_.first_bucket + bucket_,
                                    own.spare);
    }
    for (int i = 0; i < kNumCounters; ++i) arrays_.counters[i][bucket_] += events_[i];
  }

 private:
  // Writes the rows of ids that have one, and moves the others to the front.
  int64_t FindRows(Entry* entries, int64_t size) {
    int64_t num_missed = 0;
    int32_t nobody_seen = step_;
    int32_t nobody_counts = 0;
    FindEntries(
        probes_, arrays_.keys(), entries, size,
        [&](int64_t row) {
          __builtin_prefetch(arrays_.high + row);
          __builtin_prefetch(arrays_.last_seen + row, 1);
          __builtin_prefetch(arrays_.counts + row, 1);
        },
        [&](const Entry& entry, int64_t row) {
          const bool is_hit = row >= 0;
          int32_t* seen = is_hit ? arrays_.last_seen + row : &nobody_seen;
          int32_t* counts = is_hit ? arrays_.counts + row : &nobody_counts;
          *seen = std::max(*seen, step_);
          *counts += *counts < INT32_MAX;
          rows_[entry.index] = static_cast<int32_t>(first_row_ + row);
          entries[num_missed] = entry;
          num_missed += !is_hit;
        });
    events_[kHits] += static_cast<uint32_t>(size - num_missed);
    return num_missed;
  }

  // Makes the newcomers, and replaces `start` by their number.
  void Distinguish(Entry* entries, int64_t size, uint32_t* memory) {
    const Numbers numbers(memory, size);
    for (int64_t i = 0; i < size; ++i) {
      Entry& entry = entries[i];
      const Hashes hashes(entry.high, entry.low);
      uint32_t& number = numbers.Find(hashes.b ^ hashes.a, [&](uint32_t other) {
        return newcomers_[other].low == entry.low &&
               newcomers_[other].high == entry.high;
      });
      if (number == Numbers::kFree) {
        number = static_cast<uint32_t>(num_newcomers_++);
        newcomers_[number] = {entry.high, entry.low, entry.start, hashes.spare()};
        probes_.PrefetchAll(arrays_.last_seen, entry.start);
        if (options_.admission_count > 1) {
          __builtin_prefetch(LineOf(newcomers_[number]), 1);
        }
      }
      ++newcomers_[number].occurrences;
      entry.start = number;
    }
    for (int64_t i = 0; i < num_newcomers_; ++i) {
      newcomers_[i].counted = newcomers_[i].occurrences;
    }
  }

  uint32_t* LineOf(const Newcomer& own) const {
    const int64_t cells = options_.cells_per_bucket;
    const int64_t line = own.spare & (cells / kCells - 1);
    return arrays_.sketch + bucket_ * cells + line * kCells;
  }

  template <typename F>
  void VisitCells(F visit) {
    for (int64_t i = 0; i < num_newcomers_; ++i) {
      uint32_t* line = LineOf(newcomers_[i]);
      for (int quarter = 0; quarter < 4; ++quarter) {
        const uint32_t choice = (newcomers_[i].spare >> (24 + 2 * quarter)) & 3;
        visit(newcomers_[i], line[4 * static_cast<uint32_t>(quarter) + choice]);
      }
    }
  }

  void CountInSketch() {
    uint32_t& updates = arrays_.sketch_updates[bucket_];
    const uint32_t period = static_cast<uint32_t>(options_.cells_per_bucket / 4);
    const uint32_t epoch = (updates / period) & 15;
    VisitCells([&](const Newcomer&, uint32_t& cell) {
      const uint32_t age = (epoch - (cell >> kCountBits)) & 15;
      const uint32_t count = (cell & kCountMask) >> age;
      cell = epoch << kCountBits | std::min(count, kMostCounted);
    });
    VisitCells([&](const Newcomer& own, uint32_t& cell) {
      cell += static_cast<uint32_t>(own.occurrences);
    });
    for (int64_t i = 0; i < num_newcomers_; ++i) {
      newcomers_[i].counted = kNone;
      updates += static_cast<uint32_t>(newcomers_[i].occurrences);
    }
    VisitCells([&](Newcomer& own, uint32_t& cell) {
      own.counted = std::min(own.counted, static_cast<int32_t>(cell & kCountMask));
    });
  }

  // The slot that it prefers after the one that it has, if it has one.
  void PreferNext(Newcomer* own) const {
    if (options_.eviction == Eviction::kLfu) return PreferNextByScores(own);
    // The scores are the steps themselves.
    const int32_t* seen = arrays_.last_seen;
    own->row = -1;
    int64_t probe = FindStep(*own, own->score, own->probe + 1);
    if (probe == probes_.num_probes()) {
      const int64_t near = probes_.until_end(own->start);
      int32_t least = LeastAbove(own->score, seen + probes_.row(own->start), near);
      if (near < probes_.num_probes()) {
        least = std::min(least, LeastAbove(own->score, seen + probes_.row(0),
                                           probes_.num_probes() - near));
      }
      const bool may_evict = options_.eviction == Eviction::kLru && least < limit_;
      if (least >= 0 && !may_evict) return;
      own->score = least;
      probe = FindStep(*own, least, 0);
    }
    own->probe = static_cast<int32_t>(probe);
    own->row = probes_.RowOf(own->start, probe);
  }

  // The first probe from `from` on that was last seen in a step.
  int64_t FindStep(const Newcomer& own, int32_t step, int64_t from) const {
    const uint32_t* steps = reinterpret_cast<const uint32_t*>(arrays_.last_seen);
    const uint32_t word = static_cast<uint32_t>(step);
    if (from == probes_.num_probes()) return from;
    if (!probes_.IsShort(own.start)) return probes_.Find(steps, own.start, from, word);
    const uint64_t mask = probes_.Matching(steps, own.start, word) >> from << from;
    return mask != 0 ? __builtin_ctzll(mask) : probes_.num_probes();
  }

  // The least number above a floor; or kNone.
  static int32_t LeastAbove(int32_t floor, const int32_t* numbers, int64_t size) {
    int32_t least = kNone;
    int64_t i = 0;
    if (size >= 4) {
      Four all = {kNone, kNone, kNone, kNone};
      const Four floors = {floor, floor, floor, floor};
      const Four none = all;
      for (; i + 4 <= size; i += 4) {
        Four four;
        memcpy(&four, numbers + i, sizeof(four));
        four = four > floors ? four : none;
        all = four < all ? four : all;
      }
      for (int j = 0; j < 4; ++j) least = std::min(least, all[j]);
    }
    for (; i < size; ++i) {
      if (numbers[i] > floor) least = std::min(least, numbers[i]);
    }
    return least;
  }

  void PreferNextByScores(Newcomer* own) const {
    const int32_t last_score = own->score;
    const int32_t last_probe = own->probe;
    own->score = kNone;
    own->row = -1;
    for (int32_t probe = 0; probe < probes_.num_probes(); ++probe) {
      const int64_t row = probes_.RowOf(own->start, probe);
      const int32_t score = ScoreOf(row);
      const bool is_later =
          score > last_score || (score == last_score && probe > last_probe);
      if (!is_later || score >= own->score) continue;
      own->score = score;
      own->probe = probe;
      own->row = row;
      if (score == -1) return;
    }
  }

  int32_t ScoreOf(int64_t row) const {
    if (arrays_.last_seen[row] < 0) return -1;
    return arrays_.last_seen[row] < limit_ ? arrays_.counts[row] : kNone;
  }

  // Each newcomer gets the slot that it prefers among those that no better one wants.
  void Match(uint32_t* memory) {
    const Numbers owners(memory, num_newcomers_);
    for (int64_t i = 0; i < num_newcomers_; ++i) {
      if (newcomers_[i].counted < options_.admission_count) continue;
      uint32_t number = static_cast<uint32_t>(i);
      Newcomer* own = &newcomers_[number];
      PreferNext(own);
      while (own->row >= 0) {
        uint32_t& owner = owners.Find(
            Mix(static_cast<uint32_t>(own->row)),
            [&](uint32_t other) { return newcomers_[other].row == own->row; });
        if (owner == Numbers::kFree) {
          owner = number;
          __builtin_prefetch(arrays_.high + own->row, 1);
          __builtin_prefetch(arrays_.low + own->row, 1);
          __builtin_prefetch(arrays_.counts + own->row, 1);
          break;
        }
        if (own->IsPreferredTo(newcomers_[owner])) {
          std::swap(owner, number);
          own = &newcomers_[number];
        }
        PreferNext(own);
      }
    }
  }

  void Insert() {
    for (int64_t i = 0; i < num_newcomers_; ++i) {
      const Newcomer& own = newcomers_[i];
      if (own.row < 0) {
        events_[kMisses] += static_cast<uint32_t>(own.occurrences);
        if (own.counted >= options_.admission_count) ++events_[kRejections];
        continue;
      }
      ++events_[kAdmissions];
      ++events_[arrays_.last_seen[own.row] >= 0 ? kEvictions : kSize];
      arrays_.high[own.row] = own.high;
      arrays_.low[own.row] = own.low;
      arrays_.last_seen[own.row] = step_;
      arrays_.counts[own.row] = own.counted;
      arrays_.is_new[own.row] = true;
    }
  }

  const VocabularyOptions& options_;
  const VocabularyArrays& arrays_;
  const Modulus& reserved_;
  const int64_t bucket_;
  const int32_t step_;
  const int64_t limit_;
  const int64_t first_row_;
  const Probes probes_;
  int32_t* const rows_;
  Newcomer* newcomers_ = nullptr;
  int64_t num_newcomers_ = 0;
  uint32_t events_[kNumCounters] = {};
};

}  // namespace

Error AssignIds(Pool& pool, const VocabularyOptions& options,
                const VocabularyArrays& arrays, const WideIds& ids, int32_t step,
                int32_t* rows) {
  DividedIds divided;
  if (Error error = divided.Divide(pool, options, arrays.keys(), ids, rows)) {
    return error;
  }
  Scratch<Newcomer> newcomers;
  Scratch<uint32_t> numbers;
  if (!newcomers.Allocate(ids.size) || !numbers.Allocate(Numbers::Size(ids.size))) {
    return kOutOfMemory;
  }
  const Modulus reserved(options.num_reserved);
  ParallelFor(pool, arrays.num_buckets, [&](int64_t bucket) {
    const int64_t from = divided.begin(bucket);
    Bucket(options, arrays, reserved, bucket, step, rows)
        .Assign(divided.entries() + from, divided.end(bucket) - from,
                newcomers.data() + from, numbers.data() + Numbers::Size(from));
  });
  return nullptr;
}

Error LookUpIds(Pool& pool, const VocabularyOptions& options,
                const VocabularyKeys& keys, const WideIds& ids, int32_t* rows) {
  DividedIds divided;
  if (Error error = divided.Divide(pool, options, keys, ids, rows)) return error;
  const Modulus reserved(options.num_reserved);
  const int64_t first_row = keys.first_bucket * options.bucket_size;
  ParallelFor(pool, keys.num_buckets, [&](int64_t bucket) {
    const int64_t from = divided.begin(bucket);
    const Probes probes(options, keys, bucket);
    FindEntries(
        probes, keys, divided.entries() + from, divided.end(bucket) - from,
        [&](int64_t row) { __builtin_prefetch(keys.high + row); },
        [&](const Entry& entry, int64_t row) {
          int64_t found = first_row + row;
          if (options.hashed_unknown) {
            if (row < 0) {
              const Hashes hashes(entry.high, entry.low);
              found = UnknownRow(options, reserved, keys.first_bucket + bucket,
                                 hashes.spare());
            }
          } else {
            found = row < 0 ? 0 : found;
          }
          rows[entry.index] = static_cast<int32_t>(found);
        });
  });
  return nullptr;
}

void FindNewRows(const bool* is_new, int64_t size, int32_t* rows, int64_t most) {
  int64_t found = 0;
  for (int64_t i = 0; i < size && found < most;) {
    uint64_t eight = 1;
    if (i + 8 <= size) memcpy(&eight, is_new + i, 8);
    const int64_t end = Min(size, i + 8);
    if (eight == 0) {
      i = end;
      continue;
    }
    for (; i < end && found < most; ++i) {
      if (is_new[i]) rows[found++] = static_cast<int32_t>(i);
    }
  }
  std::fill(rows + found, rows + most, static_cast<int32_t>(size));
}

}  // namespace jbag
