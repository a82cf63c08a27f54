// The search for 64-bit ids among their probes: hashes, the division of ids by bucket,
// and the comparison of many probes at once.

#ifndef JBAG_KERNELS_VOCABULARY_SEARCH_H_
#define JBAG_KERNELS_VOCABULARY_SEARCH_H_

#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "kernels/bags.h"
#include "kernels/integer_math.h"
#include "kernels/kernels.h"
#include "kernels/vocabulary.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace jbag {
namespace {

constexpr int64_t kGroup = 32;  // ids whose cache misses overlap
constexpr int32_t kNoRow = -1;

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

// Bit i is set where words[i] == word; of 16 words.
uint64_t Matches(const uint32_t* words, uint32_t word) {
#if defined(__AVX2__)
  const __m256i wanted = _mm256_set1_epi32(static_cast<int32_t>(word));
  const auto equal = [&](int64_t at) {
    const __m256i eight =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + at));
    return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(eight, wanted)));
  };
  return static_cast<uint64_t>(equal(0) | equal(8) << 8);
#elif defined(__SSE2__)
  const __m128i wanted = _mm_set1_epi32(static_cast<int32_t>(word));
  const auto equal = [&](int64_t at) {
    const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + at));
    return _mm_cmpeq_epi32(four, wanted);
  };
  const __m128i bytes = _mm_packs_epi16(_mm_packs_epi32(equal(0), equal(4)),
                                        _mm_packs_epi32(equal(8), equal(12)));
  return static_cast<uint64_t>(_mm_movemask_epi8(bytes));
#else
  uint64_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint64_t>(words[i] == word) << i;
  return mask;
#endif
}

// The first i in [0, size) with words[i] == word; or size.
int64_t FindWord(const uint32_t* words, int64_t size, uint32_t word) {
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    if (const uint64_t mask = Matches(words + i, word))
      return i + __builtin_ctzll(mask);
  }
  while (i < size && words[i] != word) ++i;
  return i;
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
        num_read_((num_probes_ + 15) / 16 * 16),
        mask_(~uint64_t{0} >> (64 - Min(num_probes_, 64))),
        keys_(keys) {}

  // Whether the probes are next to each other, and at most 64. Then 16 words at a time
  // may be read.
  bool IsShort(uint32_t start) const {
    return num_probes_ <= 64 && start + num_read_ <= num_slots_;
  }
  // Bit i is set where the word at probe i is `word`.
  uint64_t Matching(const uint32_t* words, uint32_t start, uint32_t word) const {
    words += row(start);
    uint64_t mask = Matches(words, word);
    for (int64_t i = 16; i < num_read_; i += 16) mask |= Matches(words + i, word) << i;
    return mask & mask_;
  }

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
      if (keys_.high[at] == high && keys_.IsTaken(at, high, low)) return probe;
    }
  }

 private:
  int64_t first_;
  int64_t num_slots_;
  int64_t num_probes_;
  int64_t num_read_;
  uint64_t mask_;
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
      const int64_t end = Min(n, (task + 1) * size);
      uint32_t* const a = buckets.data();
      uint32_t* const b = starts.data();
      for (int64_t i = task * size; i < end; ++i) {  // in vectors
        const Hashes hashes(ids.high[i], ids.low[i]);
        a[i] = hashes.a;
        b[i] = hashes.b;
      }
      for (int64_t i = task * size; i < end; ++i) {
        const int64_t bucket = global.Of(a[i]) - keys.first_bucket;
        if (!ids.is_valid[i] || bucket < 0 || bucket >= num_buckets) {
          buckets[i] = nowhere;
          rows[i] = kNoRow;
          continue;
        }
        buckets[i] = static_cast<uint32_t>(bucket);
        starts[i] = slots.Of(b[i]);
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

// Calls visit(entry, row) for each entry, in order; the row is negative if there is
// none. Cache misses of a group overlap: first those of the lower words, then those of
// the rows. Whether an id has a row can't be predicted, so that nothing branches on it.
template <typename PrefetchRow, typename Visit>
void FindEntries(const Probes& probes, const VocabularyKeys& keys, Entry* entries,
                 int64_t size, PrefetchRow prefetch_row, Visit visit) {
  int64_t rows[kGroup];
  bool is_known[kGroup];
  for (int64_t i = 0; i < Min(size, kGroup); ++i) {
    probes.PrefetchAll(keys.low, entries[i].start);
  }
  for (int64_t from = 0; from < size; from += kGroup) {
    const int64_t count = Min(size - from, kGroup);
    const Entry* group = entries + from;
    int64_t row = probes.row(group[0].start);
    for (int64_t i = 0; i < count; ++i) {
      const Entry& entry = group[i];
      if (from + kGroup + i < size) {
        probes.PrefetchAll(keys.low, group[kGroup + i].start);
      }
      uint64_t mask = 0;
      int64_t probe = 0;
      if (probes.IsShort(entry.start)) {
        mask = probes.Matching(keys.low, entry.start, entry.low);
        probe = __builtin_ctzll(mask | uint64_t{1} << 63);
      }
      is_known[i] = mask != 0;
      // Without a match, the last row takes the place of one: it is in the cache.
      row = mask != 0 ? probes.row(entry.start) + probe : row;
      rows[i] = row;
      prefetch_row(row);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Entry entry = group[i];
      row = rows[i];
      const bool is_it =
          (keys.high[row] == entry.high) & keys.IsTaken(row, entry.high, entry.low);
      if (__builtin_expect((is_known[i] & !is_it) | !probes.IsShort(entry.start), 0)) {
        const int64_t probe = probes.FindId(entry.high, entry.low, entry.start, 0);
        row = probe < probes.num_probes() ? probes.RowOf(entry.start, probe) : -1;
      } else {
        row = is_known[i] ? row : -1;
      }
      visit(entry, row);
    }
  }
}

// A hash table of numbers, in memory of the caller's.
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

}  // namespace
}  // namespace jbag

#endif  // JBAG_KERNELS_VOCABULARY_SEARCH_H_
