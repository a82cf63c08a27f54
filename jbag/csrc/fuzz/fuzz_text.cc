// Feeds the reader of texts with random bytes, and compares what it makes of them with
// any number of threads, and with words counted or known. (Python's tests hold the
// definition.)

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fuzz/fuzz.h"
#include "text/parse_decimals.h"
#include "text/tokenizer.h"

namespace jbag {
namespace {

using text::Corpus;
using text::Plan;
using text::Split;
using text::Vocabulary;
using text::Word;

std::vector<int32_t> Rows(const Corpus& corpus, const Plan& plan, int64_t num_texts,
                          std::vector<int64_t>* lengths) {
  lengths->resize(num_texts);
  corpus.Measure(nullptr, plan, lengths->data());
  std::vector<int64_t> offsets(num_texts + 1, 0);
  for (int64_t i = 0; i < num_texts; ++i) offsets[i + 1] = offsets[i] + (*lengths)[i];
  std::vector<int32_t> rows(offsets.back());
  corpus.Write(nullptr, plan, offsets.data(), rows.data());
  return rows;
}

}  // namespace

void CheckTexts(uint64_t seed) {
  Case c(seed);
  const int64_t num_texts = c.Below(c.OneIn(8) ? 2000 : 5);
  // Few letters, so that words come back; now and then any byte, whole UTF-8 or not.
  const std::string letters = "ab 1.e-\n<_\xC3\xA9\xE0\xB8\x81\xF0\x9F\x98\x80";
  std::string data;
  std::vector<int64_t> starts(1, 0);
  for (int64_t i = 0; i < num_texts; ++i) {
    for (int64_t left = c.Below(100); left > 0; --left) {
      const bool any = c.OneIn(20);
      data += any ? static_cast<char>(c.Below(256)) : letters[c.Below(letters.size())];
    }
    starts.push_back(static_cast<int64_t>(data.size()));
  }
  const std::vector<char> exact(data.begin(), data.end());
  std::vector<float> numbers(c.Below(100));
  const int64_t read = text::ReadDecimals(exact.data(), exact.data() + exact.size(),
                                          numbers.data(), numbers.size());
  if (read > static_cast<int64_t>(numbers.size())) Fail("numbers of a text", seed);
  std::vector<uint8_t> classes(c.OneIn(8) ? text::kCodePoints : 256);
  for (uint8_t& kind : classes) kind = c.OneIn(3) ? c.Below(3) : 0;
  const Split split{classes.data(), static_cast<int64_t>(classes.size()),
                    c.OneIn(2) ? "_" : "", c.OneIn(2) ? "a" : ""};
  std::vector<int32_t> bucket_rows(1 + c.Below(50));
  for (int32_t& row : bucket_rows) row = static_cast<int32_t>(c.Below(9)) - 1;
  const int64_t longest = c.Below(5);
  Plan plan{1 + static_cast<int64_t>(c.Below(4)),
            static_cast<int64_t>(bucket_rows.size()),
            1000000,
            std::min<int64_t>(longest, 1 + c.Below(4)),
            longest,
            c.OneIn(2) ? bucket_rows.data() : nullptr};

  const Corpus one(nullptr, exact.data(), starts.data(), num_texts, split, 1);
  std::vector<int64_t> lengths;
  const std::vector<int32_t> rows = Rows(one, plan, num_texts, &lengths);
  for (int32_t row : rows) {
    const bool word = row >= 0 && row < one.vocabulary().size();
    if (!word && (row < plan.first_bucket || row >= plan.first_bucket + 50)) {
      Fail("rows of texts", seed);
    }
  }
  std::vector<int64_t> counts(one.vocabulary().size(), 0);
  for (int32_t row : rows) {
    if (row < plan.first_bucket) ++counts[row];
  }
  if (counts != one.counts()) Fail("counts of words", seed);

  const Corpus three(nullptr, exact.data(), starts.data(), num_texts, split, 3);
  std::vector<int64_t> other_lengths;
  if (Rows(three, plan, num_texts, &other_lengths) != rows ||
      lengths != other_lengths || three.counts() != one.counts()) {
    Fail("threads show in the texts", seed);
  }

  // Half of the words known; the others are strangers, who have subwords and n-grams.
  Vocabulary known;
  for (int32_t id = 0; id < one.vocabulary().size() / 2; ++id) {
    known.Add(one.vocabulary().word(id), one.vocabulary().hash(id));
  }
  const Corpus looked_up(&known, exact.data(), starts.data(), num_texts, split, 2);
  std::vector<int32_t> expected;
  for (int32_t row : rows) {
    if (row < known.size() || row >= plan.first_bucket) expected.push_back(row);
  }
  if (Rows(looked_up, plan, num_texts, &lengths) != expected) {
    Fail("strangers among the words", seed);
  }
}

}  // namespace jbag
