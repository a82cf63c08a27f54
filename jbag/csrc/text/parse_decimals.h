// Numbers in decimal notation, as text, read as float.
//
// Traffic: each byte once.

#ifndef JBAG_TEXT_PARSE_DECIMALS_H_
#define JBAG_TEXT_PARSE_DECIMALS_H_

#include <algorithm>
#include <cstdint>

namespace jbag::text {

inline bool IsDigit(char c) { return c >= '0' && c <= '9'; }
inline bool IsSpace(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// Reads "-1.5e-3" and its like at `p`, and returns its end: null where there is none.
// 19 digits count; the rounding is to double first, and from there to float.
inline const char* ReadDecimal(const char* p, const char* end, float* out) {
  static constexpr double kPowers[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                       1e8,  1e9,  1e10, 1e11, 1e12, 1e13, 1e14, 1e15,
                                       1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
  constexpr int64_t kLargest = 22;  // up to which powers of ten are exact in double
  const bool negative = p != end && *p == '-';
  if (p != end && (*p == '-' || *p == '+')) ++p;
  uint64_t digits = 0;
  int64_t exponent = 0;
  int kept = 0;
  bool any = false;
  const auto read_digits = [&](bool behind_point) {
    for (; p != end && IsDigit(*p); ++p) {
      any = true;
      if (kept == 19) {
        exponent += !behind_point;
        continue;
      }
      digits = 10 * digits + static_cast<uint64_t>(*p - '0');
      kept += digits != 0;
      exponent -= behind_point;
    }
  };
  read_digits(false);
  if (p != end && *p == '.') {
    ++p;
    read_digits(true);
  }
  if (!any) return nullptr;
  if (p != end && (*p == 'e' || *p == 'E')) {
    ++p;
    const bool down = p != end && *p == '-';
    if (p != end && (*p == '-' || *p == '+')) ++p;
    if (p == end || !IsDigit(*p)) return nullptr;
    int64_t power = 0;
    // Past this it is zero or infinite, whatever the digits.
    for (; p != end && IsDigit(*p); ++p) {
      power = std::min<int64_t>(10 * power + (*p - '0'), 1 << 20);
    }
    exponent += down ? -power : power;
  }
  double value = static_cast<double>(digits);
  if (digits == 0) exponent = 0;
  for (; exponent < -kLargest && value > 0; exponent += kLargest) value /= 1e22;
  for (; exponent > kLargest && value < 1e300; exponent -= kLargest) value *= 1e22;
  exponent = std::clamp(exponent, -kLargest, kLargest);
  value = exponent < 0 ? value / kPowers[-exponent] : value * kPowers[exponent];
  *out = static_cast<float>(negative ? -value : value);
  return p;
}

// Reads numbers with spaces between them, and returns how many there are: -1 where
// there is something else, or more of them than `num`.
inline int64_t ReadDecimals(const char* p, const char* end, float* out, int64_t num) {
  for (int64_t count = 0;; ++count) {
    while (p != end && IsSpace(*p)) ++p;
    if (p == end) return count;
    if (count == num) return -1;
    p = ReadDecimal(p, end, out + count);
    if (!p || (p != end && !IsSpace(*p))) return -1;
  }
}

}  // namespace jbag::text

#endif  // JBAG_TEXT_PARSE_DECIMALS_H_
