// What Python calls of tokenizer.h, by a C interface. A null pointer or a negative
// number says that there was no memory.

#include <memory>

#include "text/parse_decimals.h"
#include "text/string_hash.h"
#include "text/tokenizer.h"

namespace {

using jbag::text::Corpus;
using jbag::text::Plan;
using jbag::text::Split;
using jbag::text::Vocabulary;
using jbag::text::Word;

struct Texts {
  const char* data;
  const int64_t* starts;  // [num + 1]
  int64_t num;
};

struct Splitting {
  const uint8_t* classes;
  int64_t num_classes;
  const char* skip;
  int64_t skip_size;
  const char* end;
  int64_t end_size;
};

template <typename F>
auto OrNull(F&& make) -> decltype(make().release()) {
  try {
    return make().release();
  } catch (...) {
    return nullptr;
  }
}

template <typename F>
int OrFail(F&& f) {
  try {
    f();
    return 0;
  } catch (...) {
    return -1;
  }
}

}  // namespace

#define JBAG_EXPORT extern "C" __attribute__((visibility("default")))

JBAG_EXPORT Vocabulary* jbag_text_vocabulary(const Texts* words) {
  return OrNull([&] {
    auto vocabulary = std::make_unique<Vocabulary>();
    for (int64_t i = 0; i < words->num; ++i) {
      const Word word(words->data + words->starts[i],
                      words->starts[i + 1] - words->starts[i]);
      const uint32_t hash = jbag::text::Hash(word);
      // A word that was there before keeps its number, and this one is never found.
      if (vocabulary->Add(word, hash) != i) vocabulary->Append(word, hash);
    }
    return vocabulary;
  });
}

JBAG_EXPORT void jbag_text_free_vocabulary(Vocabulary* vocabulary) {
  delete vocabulary;
}

JBAG_EXPORT Corpus* jbag_text_read(const Vocabulary* known, const Texts* texts,
                                   const Splitting* how, int64_t threads) {
  return OrNull([&] {
    const Split split{how->classes, how->num_classes, Word(how->skip, how->skip_size),
                      Word(how->end, how->end_size)};
    return std::make_unique<Corpus>(known, texts->data, texts->starts, texts->num,
                                    split, threads);
  });
}

JBAG_EXPORT void jbag_text_free_corpus(Corpus* corpus) { delete corpus; }

JBAG_EXPORT int64_t jbag_text_num_words(const Corpus* corpus) {
  return corpus->vocabulary().size();
}

JBAG_EXPORT void jbag_text_counts(const Corpus* corpus, int64_t* counts) {
  std::copy(corpus->counts().begin(), corpus->counts().end(), counts);
}

// Writes words, each with a line feed behind it, where `out` isn't null; returns the
// size.
JBAG_EXPORT int64_t jbag_text_words(const Corpus* corpus, const int64_t* ids,
                                    int64_t num, char* out) {
  int64_t size = 0;
  for (int64_t i = 0; i < num; ++i) {
    const Word word = corpus->vocabulary().word(static_cast<int32_t>(ids[i]));
    if (out) {
      std::copy(word.begin(), word.end(), out + size);
      out[size + word.size()] = '\n';
    }
    size += static_cast<int64_t>(word.size()) + 1;
  }
  return size;
}

JBAG_EXPORT int jbag_text_measure(const Corpus* corpus, const int32_t* rows,
                                  const Plan* plan, int64_t* lengths) {
  return OrFail([&] { corpus->Measure(rows, *plan, lengths); });
}

JBAG_EXPORT int jbag_text_write(const Corpus* corpus, const int32_t* rows,
                                const Plan* plan, const int64_t* offsets,
                                int32_t* out) {
  return OrFail([&] { corpus->Write(rows, *plan, offsets, out); });
}

// Writes the numbers of a text, and returns how many they are: -1 where it holds
// something else, or more than `num`.
JBAG_EXPORT int64_t jbag_text_numbers(const char* data, int64_t size, float* out,
                                      int64_t num) {
  return jbag::text::ReadDecimals(data, data + size, out, num);
}

JBAG_EXPORT void jbag_text_hash(const Texts* strings, uint64_t* hashes) {
  for (int64_t i = 0; i < strings->num; ++i) {
    jbag::text::StringHash hash;
    for (int64_t at = strings->starts[i]; at < strings->starts[i + 1]; ++at) {
      hash.Add(static_cast<uint8_t>(strings->data[at]));
    }
    hashes[i] = hash.value();
  }
}

// Hashes strings of `width` characters, which zeros fill up: bytes, or code points of
// 32 bits.
JBAG_EXPORT void jbag_text_hash_fixed(const void* data, int64_t width, int64_t num,
                                      uint64_t* hashes, int is_utf32) {
  for (int64_t i = 0; i < num; ++i) {
    hashes[i] = is_utf32 ? jbag::text::HashFixed(
                               static_cast<const uint32_t*>(data) + i * width, width)
                         : jbag::text::HashFixed(
                               static_cast<const uint8_t*>(data) + i * width, width);
  }
}
