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

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace jbag {
namespace {

constexpr int64_t kGroup = 32;  // ids whose cache misses overlap
constexpr int kCells = 16;      // in a line of the sketch, a cache line
constexpr uint32_t kCountBits = 28;
constexpr uint32_t kCountMask = (uint32_t{1} << kCountBits) - 1;
constexpr uint32_t kMostCounted = 1 << 16;
constexpr int32_t kNoRow = -1;
constexpr int32_t kNone = INT32_MAX;

// x % divisor by two products (Lemire et al., Faster Remainder by Direct Computation,
// 2019).
class Modulus {
 public:
  explicit Modulus(int64_t divisor)
      : inverse_(UINT64_MAX / static_cast<uint64_t>(divisor) + 1),
        divisor_(static_cast<uint64_t>(divisor)) {}
  uint32_t Of(uint32_t x) const {
    const uint64_t fraction = inverse_ * x;
    return static_cast<uint32_t>(
        (static_cast<unsigned __int128>(fraction) * divisor_) >> 64);
  }

 private:
  uint64_t inverse_;
  uint64_t divisor_;
};

uint32_t Mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

struct Hashes {
  Hashes(uint32_t high, uint32_t low)
      : a(Mix(low ^ Mix(high + 0x9E3779B9u))),
        b(Mix(a + high * 0x85EBCA6Bu + 0xC2B2AE35u)) {}
  uint32_t spare() const { return Mix(a ^ (b << 16) ^ (b >> 16)); }
  uint32_t a;
  uint32_t b;
};

// The first i in [0, size) with words[i] == word; or size.
int64_t FindWord(const uint32_t* words, int64_t size, uint32_t word) {
  int64_t i = 0;
#if defined(__SSE2__)
  const __m128i wanted = _mm_set1_epi32(static_cast<int32_t>(word));
  for (; i + 16 <= size; i += 16) {
    const auto equal = [&](int64_t at) {
      const __m128i four =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + i + at));
      return _mm_cmpeq_epi32(four, wanted);
    };
    const __m128i halves[] = {_mm_packs_epi32(equal(0), equal(4)),
                              _mm_packs_epi32(equal(8), equal(12))};
    const int mask = _mm_movemask_epi8(_mm_packs_epi16(halves[0], halves[1]));
    if (mask != 0) return i + __builtin_ctz(static_cast<unsigned>(mask));
  }
#endif
  for (; i < size; ++i) {
    if (words[i] == word) return i;
  }
  return size;
}

void Prefetch(const void* data, int64_t bytes) {
  const char* first = static_cast<const char*>(data);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i);
  __builtin_prefetch(first + bytes - 1);
}

// An id in a bucket.
struct Entry {
  uint32_t high;
  uint32_t low;
  uint32_t start;  // its first slot; of an id without a row then its number
  uint32_t index;  // in the batch
};

// The probes of ids in a bucket.
class Probes {
 public:
  Probes(const VocabularyOptions& options, const VocabularyKeys& keys, int64_t bucket)
      : first_(bucket * options.bucket_size + options.num_reserved),
        num_slots_(options.num_slots()),
        num_probes_(options.num_probes),
        keys_(keys) {}

  // The rows are [row(start), row(start) + until_end), and the rest from row(0) on.
  int64_t row(uint32_t slot) const { return first_ + slot; }
  int64_t until_end(uint32_t start) const {
    return Min(num_probes_, num_slots_ - start);
  }
  int64_t num_probes() const { return num_probes_; }
  int64_t RowOf(uint32_t start, int64_t probe) const {
    const int64_t slot = start + probe;
    return first_ + (slot < num_slots_ ? slot : slot - num_slots_);
  }

  template <typename T>
  void PrefetchAll(const T* array, uint32_t start) const {
    const int64_t near = until_end(start);
    Prefetch(array + row(start), near * static_cast<int64_t>(sizeof(T)));
    if (near < num_probes_) {
      Prefetch(array + row(0), (num_probes_ - near) * static_cast<int64_t>(sizeof(T)));
    }
  }

  // The first probe from `probe` on whose word is `word`; or the number of probes.
  int64_t Find(const uint32_t* words, uint32_t start, int64_t probe,
               uint32_t word) const {
    const int64_t near = until_end(start);
    if (probe < near) {
      probe += FindWord(words + row(start) + probe, near - probe, word);
      if (probe < near) return probe;
    }
    return probe + FindWord(words + row(0) + (probe - near), num_probes_ - probe, word);
  }

  // The probe of the id's row from `probe` on; or the number of probes.
  int64_t FindId(uint32_t high, uint32_t low, uint32_t start, int64_t probe) const {
    for (;; ++probe) {
      probe = Find(keys_.low, start, probe, low);
      if (probe == num_probes_) return probe;
      const int64_t at = RowOf(start, probe);
      if (keys_.high[at] == high && keys_.last_seen[at] >= 0) return probe;
    }
  }

 private:
  int64_t first_;
  int64_t num_slots_;
  int64_t num_probes_;
  VocabularyKeys keys_;
};

// The row of an unknown id in the whole vocabulary.
int32_t UnknownRow(const VocabularyOptions& options, const Modulus& reserved,
                   int64_t global_bucket, uint32_t spare) {
  if (!options.hashed_unknown) return 0;
  return static_cast<int32_t>(global_bucket * options.bucket_size + reserved.Of(spare));
}

// The valid ids of the local buckets, by bucket.
class DividedIds {
 public:
  // Writes kNoRow to the rows of all others.
  Error Divide(Pool& pool, const VocabularyOptions& options, const VocabularyKeys& keys,
               const WideIds& ids, int32_t* rows) {
    const int64_t n = ids.size;
    const int64_t num_buckets = keys.num_buckets;
    const int64_t size = Max(CeilDiv(n, Max(1, 2 * pool.num_threads())), 1 << 13);
    const int64_t tasks = CeilDiv(n, size);
    Scratch<uint32_t> buckets;
    Scratch<uint32_t> starts;
    Scratch<int64_t> places;
    if (!buckets.Allocate(n) || !starts.Allocate(n) || !entries_.Allocate(n) ||
        !places.Allocate(tasks * num_buckets) || !ends_.Allocate(num_buckets)) {
      return kOutOfMemory;
    }
    const Modulus global(options.num_buckets);
    const Modulus slots(options.num_slots());
    const uint32_t nowhere = static_cast<uint32_t>(num_buckets);
    ParallelFor(pool, tasks, [&](int64_t task) {
      int64_t* counts = &places[task * num_buckets];
      std::fill(counts, counts + num_buckets, 0);
      for (int64_t i = task * size; i < Min(n, (task + 1) * size); ++i) {
        const Hashes hashes(ids.high[i], ids.low[i]);
        const int64_t bucket = global.Of(hashes.a) - keys.first_bucket;
        if (!ids.is_valid[i] || bucket < 0 || bucket >= num_buckets) {
          buckets[i] = nowhere;
          rows[i] = kNoRow;
          continue;
        }
        buckets[i] = static_cast<uint32_t>(bucket);
        starts[i] = slots.Of(hashes.b);
        ++counts[bucket];
      }
    });
    int64_t total = 0;
    for (int64_t bucket = 0; bucket < num_buckets; ++bucket) {
      for (int64_t task = 0; task < tasks; ++task) {
        int64_t& place = places[task * num_buckets + bucket];
        total += place;
        place = total - place;
      }
      ends_[bucket] = total;
    }
    ParallelFor(pool, tasks, [&](int64_t task) {
      int64_t* next = &places[task * num_buckets];
      for (int64_t i = task * size; i < Min(n, (task + 1) * size); ++i) {
        if (buckets[i] == nowhere) continue;
        entries_[next[buckets[i]]++] = {ids.high[i], ids.low[i], starts[i],
                                        static_cast<uint32_t>(i)};
      }
    });
    return nullptr;
  }

  int64_t begin(int64_t bucket) const { return bucket == 0 ? 0 : ends_[bucket - 1]; }
  int64_t end(int64_t bucket) const { return ends_[bucket]; }
  Entry* entries() const { return entries_.data(); }

 private:
  Scratch<Entry> entries_;
  Scratch<int64_t> ends_;
};

// Calls found(entry, row) or missed(entry) for each entry, in order. Cache misses of a
// group overlap: first those of the lower words, then those of the row.
template <typename PrefetchRow, typename Found, typename Missed>
void FindEntries(const Probes& probes, const VocabularyKeys& keys, Entry* entries,
                 int64_t size, PrefetchRow prefetch_row, Found found, Missed missed) {
  int64_t probe[kGroup];
  for (int64_t i = 0; i < Min(size, kGroup); ++i) {
    probes.PrefetchAll(keys.low, entries[i].start);
  }
  for (int64_t from = 0; from < size; from += kGroup) {
    const int64_t count = Min(size - from, kGroup);
    Entry* group = entries + from;
    for (int64_t i = 0; i < count; ++i) {
      if (from + kGroup + i < size) {
        probes.PrefetchAll(keys.low, group[kGroup + i].start);
      }
      const Entry& entry = group[i];
      probe[i] = probes.Find(keys.low, entry.start, 0, entry.low);
      if (probe[i] < probes.num_probes()) {
        prefetch_row(probes.RowOf(entry.start, probe[i]));
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Entry& entry = group[i];
      const int64_t at =
          probe[i] == probes.num_probes()
              ? probe[i]
              : probes.FindId(entry.high, entry.low, entry.start, probe[i]);
      if (at < probes.num_probes()) {
        found(entry, probes.RowOf(entry.start, at));
      } else {
        missed(entry);
      }
    }
  }
}

// A distinct id without a row.
struct Newcomer {
  uint32_t high;
  uint32_t low;
  uint32_t start;
  uint32_t spare;
  int32_t occurrences;
  int32_t counted;
  int32_t score;  // of the slot that it wants
  int32_t probe;
  int64_t row;  // of that slot, among the local ones; negative for none

  bool IsPreferredTo(const Newcomer& other) const {
    if (counted != other.counted) return counted > other.counted;
    if (high != other.high) return high < other.high;
    return low < other.low;
  }
};

// A hash table of the numbers of newcomers, in memory of the caller's.
class Numbers {
 public:
  // The memory that the table of so many numbers takes, at most.
  static int64_t Size(int64_t count) { return 4 * count; }

  Numbers(uint32_t* memory, int64_t count) : numbers_(memory) {
    while (mask_ + 1 < 2 * count) mask_ = 2 * mask_ + 1;
    if (count > 0) memset(numbers_, 0xff, static_cast<size_t>(mask_ + 1) * 4);
  }
  // The number for which `is_it` holds, or a place for it, which is kFree.
  template <typename Predicate>
  uint32_t& Find(uint32_t hash, Predicate is_it) const {
    int64_t at = hash & mask_;
    while (numbers_[at] != kFree && !is_it(numbers_[at])) at = (at + 1) & mask_;
    return numbers_[at];
  }

  static constexpr uint32_t kFree = UINT32_MAX;

 private:
  uint32_t* numbers_;
  int64_t mask_ = 0;
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
    FindEntries(
        probes_, arrays_.keys(), entries, size,
        [&](int64_t row) {
          __builtin_prefetch(arrays_.high + row);
          __builtin_prefetch(arrays_.last_seen + row, 1);
          __builtin_prefetch(arrays_.counts + row, 1);
        },
        [&](const Entry& entry, int64_t row) {
          rows_[entry.index] = static_cast<int32_t>(first_row_ + row);
          if (arrays_.last_seen[row] < step_) arrays_.last_seen[row] = step_;
          if (arrays_.counts[row] < INT32_MAX) ++arrays_.counts[row];
          ++events_[kHits];
        },
        [&](const Entry& entry) { entries[num_missed++] = entry; });
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
        newcomers_[number] = {entry.high, entry.low, entry.start, hashes.spare(), 0, 0,
                              0,          0,         -1};
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

  int32_t ScoreOf(int64_t row) const {
    const int32_t seen = arrays_.last_seen[row];
    if (seen < 0) return -1;
    if (options_.eviction == Eviction::kNone || seen >= limit_) return kNone;
    return options_.eviction == Eviction::kLfu ? arrays_.counts[row] : seen;
  }

  // The slot that it prefers to all others.
  void Prefer(Newcomer* own) const {
    own->score = -2;
    own->probe = 0;
    if (options_.eviction == Eviction::kLfu) return PreferNext(own);
    const int32_t* seen = arrays_.last_seen;
    int32_t least = -1;
    if (options_.eviction == Eviction::kLru) {
      const int64_t near = probes_.until_end(own->start);
      least = Least(seen + probes_.row(own->start), near);
      if (near < probes_.num_probes()) {
        least =
            std::min(least, Least(seen + probes_.row(0), probes_.num_probes() - near));
      }
    }
    own->row = -1;
    if (least >= 0 && least >= limit_) return;
    const int64_t probe = probes_.Find(reinterpret_cast<const uint32_t*>(seen),
                                       own->start, 0, static_cast<uint32_t>(least));
    if (probe == probes_.num_probes()) return;
    own->score = least;
    own->probe = static_cast<int32_t>(probe);
    own->row = probes_.RowOf(own->start, probe);
  }

  static int32_t Least(const int32_t* numbers, int64_t size) {
    int32_t least = kNone;
    for (int64_t i = 0; i < size; ++i) least = std::min(least, numbers[i]);
    return least;
  }

  // The slot that it prefers after the one that it has.
  void PreferNext(Newcomer* own) const {
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

  // Each newcomer gets the slot that it prefers among those that no better one wants.
  void Match(uint32_t* memory) {
    const Numbers owners(memory, num_newcomers_);
    for (int64_t i = 0; i < num_newcomers_; ++i) {
      if (newcomers_[i].counted < options_.admission_count) continue;
      uint32_t number = static_cast<uint32_t>(i);
      Newcomer* own = &newcomers_[number];
      Prefer(own);
      while (own->row >= 0) {
        uint32_t& owner = owners.Find(
            Mix(static_cast<uint32_t>(own->row)),
            [&](uint32_t other) { return newcomers_[other].row == own->row; });
        if (owner == Numbers::kFree) {
          owner = number;
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
        [&](int64_t row) {
          __builtin_prefetch(keys.high + row);
          __builtin_prefetch(keys.last_seen + row);
        },
        [&](const Entry& entry, int64_t row) {
          rows[entry.index] = static_cast<int32_t>(first_row + row);
        },
        [&](const Entry& entry) {
          const Hashes hashes(entry.high, entry.low);
          rows[entry.index] =
              UnknownRow(options, reserved, keys.first_bucket + bucket, hashes.spare());
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
