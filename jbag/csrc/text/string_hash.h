// FNV-1a of 64 bits over the UTF-8 bytes of strings.

#ifndef JBAG_TEXT_STRING_HASH_H_
#define JBAG_TEXT_STRING_HASH_H_

#include <stdint.h>

namespace jbag {
namespace text {

class StringHash {
 public:
  void Add(uint32_t byte) { value_ = (value_ ^ byte) * 0x100000001B3u; }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xCBF29CE484222325u;
};

inline void AddCharacter(uint8_t byte, StringHash* hash) { hash->Add(byte); }

// A surrogate is encoded as any other code point, as by Python's "surrogatepass".
inline void AddCharacter(uint32_t point, StringHash* hash) {
  if (point < 0x80) {
    hash->Add(point);
    return;
  }
  if (point < 0x800) {
    hash->Add(0xC0 | point >> 6);
  } else {
    if (point < 0x10000) {
      hash->Add(0xE0 | point >> 12);
    } else {
      hash->Add(0xF0 | (point >> 18 & 7));
      hash->Add(0x80 | (point >> 12 & 63));
    }
    hash->Add(0x80 | (point >> 6 & 63));
  }
  hash->Add(0x80 | (point & 63));
}

// The hash of a string that zeros fill up to `width` characters.
template <typename Character>
uint64_t HashFixed(const Character* string, int64_t width) {
  while (width > 0 && string[width - 1] == 0) --width;
  StringHash hash;
  for (int64_t i = 0; i < width; ++i) AddCharacter(string[i], &hash);
  return hash.value();
}

}  // namespace text
}  // namespace jbag

#endif  // JBAG_TEXT_STRING_HASH_H_
