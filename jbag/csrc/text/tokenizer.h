// From UTF-8 texts to rows of a table: tokens, a vocabulary, hashed n-grams.
//
// Traffic: a text is read twice, by the tokeniser and (from the cache) by the hash, and
// a token costs one probe of the vocabulary's table. Tokens are kept as numbers, so
// that texts that a vocabulary is made from are read once.

#ifndef JBAG_TEXT_TOKENIZER_H_
#define JBAG_TEXT_TOKENIZER_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string_view>
#include <thread>
#include <vector>

namespace jbag::text {

using Word = std::string_view;

// fastText's hash: FNV-1a, but for bytes being signed.
constexpr uint32_t kNoLetters = 2166136261u;
inline uint32_t Hash(uint32_t hash, char next) {
  return (hash ^ static_cast<uint32_t>(static_cast<int8_t>(next))) * 16777619u;
}
inline uint32_t Hash(Word word) {
  uint32_t hash = kNoLetters;
  for (char c : word) hash = Hash(hash, c);
  return hash;
}

// What a code point is to the tokeniser.
enum Class : uint8_t { kPart = 0, kSpace = 1, kAlone = 2 };
constexpr int64_t kCodePoints = 0x110000;

struct Split {
  const uint8_t* classes;  // [kCodePoints], or [256] for bytes
  int64_t num_classes;
  Word skip;  // tokens that begin with it are left out, unless it is empty
  Word end;   // follows each text, and ends it where it stands within; or empty
};

struct Plan {
  int64_t ngrams;
  int64_t buckets;
  int64_t first_bucket;
  int64_t min_subword;         // characters
  int64_t max_subword;         // 0: none
  const int32_t* bucket_rows;  // [buckets], negative where a bucket has none; or null
};

// Decodes the code point at `p` and moves past it. Broken bytes stand for themselves.
inline uint32_t NextCodePoint(const char*& p, const char* end) {
  const auto byte = [&](int i) { return static_cast<uint8_t>(p[i]); };
  const uint8_t lead = byte(0);
  const int length = lead < 0xC0 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  uint32_t point = lead;
  if (length > 1 && end - p >= length) {
    point = lead & (0x7F >> length);
    for (int i = 1; i < length; ++i) point = point << 6 | (byte(i) & 0x3F);
    p += length;
    return std::min<uint32_t>(point, kCodePoints - 1);
  }
  ++p;
  return point;
}

// Calls f(token, hash) for each token that isn't skipped.
template <typename F>
void ForEachToken(Word text, const Split& split, F&& f) {
  const bool bytes = split.num_classes < kCodePoints;
  const char* p = text.data();
  const char* const end = p + text.size();
  bool ended = false;
  const auto finish = [&](const char* start, const char* until, uint32_t hash) {
    const Word token(start, until - start);
    if (!split.skip.empty() && token.substr(0, split.skip.size()) == split.skip) return;
    ended = !split.end.empty() && token == split.end;
    f(token, hash);
  };
  while (p != end && !ended) {
    // A token's length can't be predicted: it is hashed in the loop that finds its end.
    const char* const start = p;
    const char* at = p;
    uint32_t hash = kNoLetters;
    uint8_t kind = kPart;
    while (p != end) {
      const auto byte = static_cast<uint8_t>(*p);
      if (bytes || byte < 0x80) {
        kind = split.classes[byte];
        ++p;
        if (kind != kPart) break;
        hash = Hash(hash, *at);
      } else {
        kind = split.classes[NextCodePoint(p, end)];
        if (kind != kPart) break;
        for (const char* q = at; q != p; ++q) hash = Hash(hash, *q);
      }
      at = p;
    }
    if (at != start) finish(start, at, hash);
    if (kind == kAlone && !ended) finish(at, p, Hash(Word(at, p - at)));
  }
  if (!ended && !split.end.empty()) f(split.end, Hash(split.end));
}

// Words and their numbers, in the order in which they were added.
class Vocabulary {
 public:
  Vocabulary() : slots_(1 << 10) {}

  int64_t size() const { return static_cast<int64_t>(hashes_.size()); }
  uint32_t hash(int32_t id) const { return hashes_[id]; }
  Word word(int32_t id) const {
    return {letters_.data() + starts_[id], starts_[id + 1] - starts_[id]};
  }

  int32_t Find(Word word, uint32_t hash) const { return slots_[Probe(word, hash)].id; }

  // Of equal words the first counts.
  int32_t Add(Word word, uint32_t hash) {
    size_t at = Probe(word, hash);
    if (slots_[at].id >= 0) return slots_[at].id;
    if (2 * hashes_.size() >= slots_.size()) {
      Grow();
      at = Probe(word, hash);
    }
    const auto id = static_cast<int32_t>(hashes_.size());
    slots_[at] = {Key(word), hash, id};
    Append(word, hash);
    return id;
  }

  // Takes a number without a place in the table.
  void Append(Word word, uint32_t hash) {
    hashes_.push_back(hash);
    letters_.insert(letters_.end(), word.begin(), word.end());
    starts_.push_back(letters_.size());
  }

 private:
  struct Slot {
    uint64_t key = 0;
    uint32_t hash = 0;
    int32_t id = -1;
  };

  // The first letters of a word, and its length where these are all: then equal keys
  // are equal words, and their letters needn't be fetched.
  static constexpr size_t kShort = 7;
  static uint64_t Key(Word word) {
    uint64_t key = 0;
    const size_t size = std::min(word.size(), kShort);
    // Byte by byte: a copy of unknown length would be a call.
    for (size_t i = 0; i < size; ++i) {
      key |= uint64_t{static_cast<uint8_t>(word[i])} << 8 * i;
    }
    return key | uint64_t{word.size() <= kShort ? size : 0xFF} << 56;
  }

  // Where the word is, or would be.
  size_t Probe(Word word, uint32_t hash) const {
    const size_t mask = slots_.size() - 1;
    const uint64_t key = Key(word);
    // The low bits of FNV-1a are its good ones.
    for (size_t at = hash & mask;; at = (at + 1) & mask) {
      const Slot& slot = slots_[at];
      if (slot.id < 0) return at;
      if (slot.key == key && slot.hash == hash &&
          (word.size() <= kShort || this->word(slot.id) == word)) {
        return at;
      }
    }
  }

  void Grow() {
    std::vector<Slot> old(4 * slots_.size());
    old.swap(slots_);
    const size_t mask = slots_.size() - 1;
    for (const Slot& slot : old) {
      if (slot.id < 0) continue;
      size_t at = slot.hash & mask;
      while (slots_[at].id >= 0) at = (at + 1) & mask;
      slots_[at] = slot;
    }
  }

  std::vector<Slot> slots_;  // a power of two of them
  std::vector<uint32_t> hashes_;
  std::vector<char> letters_;
  std::vector<size_t> starts_{0};
};

// Calls f(i) for i in [0, n) in as many threads; an exception of any is thrown here.
template <typename F>
void InParallel(int64_t n, F&& f) {
  std::vector<std::exception_ptr> failures(n);
  const auto run = [&](int64_t i) {
    try {
      f(i);
    } catch (...) {
      failures[i] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(n);
  int64_t started = 1;
  try {
    for (; started < n; ++started) threads.emplace_back(run, started);
  } catch (...) {  // No more threads are to be had: this one does the rest.
  }
  for (int64_t i = started; i < n; ++i) run(i);
  if (n > 0) run(0);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

// Texts as numbers of words.
class Corpus {
 public:
  // Looks words up, where a vocabulary is given; else makes one of all words. The texts
  // [starts[i], starts[i + 1]) of `data`, and the vocabulary, must outlive the corpus.
  Corpus(const Vocabulary* known, const char* data, const int64_t* starts, int64_t num,
         const Split& split, int64_t threads)
      : known_(known) {
    // A thread takes longer to start than a few kilobytes to read.
    const int64_t bytes = starts[num] - starts[0];
    threads = std::max<int64_t>(1, std::min(threads, bytes >> 15));
    shards_.resize(threads);
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t* const from =
          std::lower_bound(starts, starts + num, starts[0] + bytes / threads * i);
      shards_[i].first = i == 0 ? 0 : from - starts;
    }
    for (int64_t i = 0; i < threads; ++i) {
      shards_[i].last = i + 1 < threads ? shards_[i + 1].first : num;
    }
    std::vector<Vocabulary> own(known ? 0 : threads);
    InParallel(threads, [&](int64_t i) {
      Read(data, starts, split, known ? nullptr : &own[i], &shards_[i]);
    });
    if (known) return;
    own_ = std::move(own[0]);
    counts_ = std::move(shards_[0].counts);
    // In the order of the texts, so that the numbers don't depend on the threads.
    for (int64_t i = 1; i < threads; ++i) Merge(own[i], &shards_[i]);
  }

  const Vocabulary& vocabulary() const { return known_ ? *known_ : own_; }
  const std::vector<int64_t>& counts() const { return counts_; }

  // Writes how many rows each text has. `rows` are those of the words, or null: their
  // numbers.
  void Measure(const int32_t* rows, const Plan& plan, int64_t* lengths) const {
    ForEachText([&](const Shard& shard, int64_t text, int64_t from, int64_t to) {
      int64_t length = 0;
      Emit(shard, from, to, rows, plan, [&](int32_t) { ++length; });
      lengths[text] = length;
    });
  }

  // Writes the rows of text i at offsets[i].
  void Write(const int32_t* rows, const Plan& plan, const int64_t* offsets,
             int32_t* out) const {
    ForEachText([&](const Shard& shard, int64_t text, int64_t from, int64_t to) {
      int32_t* next = out + offsets[text];
      Emit(shard, from, to, rows, plan, [&](int32_t row) { *next++ = row; });
    });
  }

 private:
  struct Stranger {
    Word word;
    uint32_t hash;
  };

  struct Shard {
    int64_t first = 0, last = 0;  // texts
    std::vector<int32_t> ids;     // of tokens; ~i for stranger i
    std::vector<int64_t> ends;    // of texts, among the tokens
    std::vector<Stranger> strangers;
    std::vector<int64_t> counts;  // of the shard's own words
  };

  static Word Text(const char* data, const int64_t* starts, int64_t i) {
    return {data + starts[i], static_cast<size_t>(starts[i + 1] - starts[i])};
  }

  void Read(const char* data, const int64_t* starts, const Split& split,
            Vocabulary* own, Shard* shard) const {
    shard->ids.reserve((starts[shard->last] - starts[shard->first]) / 5);
    shard->ends.reserve(shard->last - shard->first);
    for (int64_t i = shard->first; i < shard->last; ++i) {
      ForEachToken(Text(data, starts, i), split, [&](Word token, uint32_t hash) {
        int32_t id;
        if (own) {
          id = own->Add(token, hash);
          if (id == static_cast<int64_t>(shard->counts.size())) {
            shard->counts.push_back(0);
          }
          ++shard->counts[id];
        } else {
          id = known_->Find(token, hash);
          if (id < 0) {
            id = ~static_cast<int32_t>(shard->strangers.size());
            shard->strangers.push_back({token, hash});
          }
        }
        shard->ids.push_back(id);
      });
      shard->ends.push_back(static_cast<int64_t>(shard->ids.size()));
    }
  }

  void Merge(const Vocabulary& own, Shard* shard) {
    std::vector<int32_t> numbers(own.size());
    for (int32_t id = 0; id < own.size(); ++id) {
      numbers[id] = own_.Add(own.word(id), own.hash(id));
      counts_.resize(own_.size());
      counts_[numbers[id]] += shard->counts[id];
    }
    for (int32_t& id : shard->ids) id = numbers[id];
  }

  template <typename F>
  void ForEachText(F&& f) const {
    InParallel(shards_.size(), [&](int64_t i) {
      const Shard& shard = shards_[i];
      int64_t from = 0;
      for (int64_t text = shard.first; text < shard.last; ++text) {
        const int64_t to = shard.ends[text - shard.first];
        f(shard, text, from, to);
        from = to;
      }
    });
  }

  // Calls push(row) for the rows of the tokens [from, to), in fastText's order.
  template <typename F>
  void Emit(const Shard& shard, int64_t from, int64_t to, const int32_t* rows,
            const Plan& plan, F&& push) const {
    const auto hash_of = [&](int64_t at) {
      const int32_t id = shard.ids[at];
      return id < 0 ? shard.strangers[~id].hash : vocabulary().hash(id);
    };
    const uint64_t buckets = plan.buckets;
    const bool power = (buckets & (buckets - 1)) == 0;
    const auto push_bucket = [&](uint64_t hash) {
      const uint64_t bucket = power ? hash & (buckets - 1) : hash % buckets;
      const int64_t row =
          plan.bucket_rows ? plan.bucket_rows[bucket] : static_cast<int64_t>(bucket);
      if (row >= 0) push(static_cast<int32_t>(plan.first_bucket + row));
    };
    for (int64_t at = from; at < to; ++at) {
      const int32_t id = shard.ids[at];
      const int32_t row = id < 0 ? -1 : rows ? rows[id] : id;
      if (row >= 0) push(row);
      if (plan.max_subword > 0) {
        const Word word = id < 0 ? shard.strangers[~id].word : vocabulary().word(id);
        ForEachSubword(word, plan, push_bucket);
      }
    }
    if (plan.ngrams < 2) return;
    for (int64_t at = from; at < to; ++at) {
      const int64_t last = std::min(to, at + plan.ngrams);
      // Sign and all, as in fastText.
      uint64_t hash = static_cast<int32_t>(hash_of(at));
      for (int64_t next = at + 1; next < last; ++next) {
        hash = hash * 116049371u + static_cast<int32_t>(hash_of(next));
        push_bucket(hash);
      }
    }
  }

  // Calls push(hash) for the character n-grams of "<word>", but for "<" and ">" alone.
  template <typename F>
  static void ForEachSubword(Word word, const Plan& plan, F&& push) {
    if (word == "</s>") return;  // fastText's end of a text
    thread_local std::vector<char> letters;
    letters.assign(1, '<');
    letters.insert(letters.end(), word.begin(), word.end());
    letters.push_back('>');
    const size_t size = letters.size();
    const auto continues = [&](size_t i) { return (letters[i] & 0xC0) == 0x80; };
    for (size_t i = 0; i < size; ++i) {
      if (continues(i)) continue;
      uint32_t hash = kNoLetters;
      size_t j = i;
      for (int64_t n = 1; j < size && n <= plan.max_subword; ++n) {
        do {
          hash = Hash(hash, letters[j++]);
        } while (j < size && continues(j));
        if (n >= plan.min_subword && !(n == 1 && (i == 0 || j == size))) push(hash);
      }
    }
  }

  const Vocabulary* known_;
  Vocabulary own_;
  std::vector<int64_t> counts_;  // of own_
  std::vector<Shard> shards_;
};

}  // namespace jbag::text

#endif  // JBAG_TEXT_TOKENIZER_H_
