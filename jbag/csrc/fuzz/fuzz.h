// Random bags, well formed and not, for the fuzzer of the kernels. Every array has its
// exact size on the heap, so that AddressSanitizer sees an access beside it.

#ifndef JBAG_FUZZ_FUZZ_H_
#define JBAG_FUZZ_FUZZ_H_

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/gathered_rows.h"
#include "kernels/kernels.h"
#include "kernels/simd_loops.h"

namespace jbag {

class ThreadPool final : public Pool {
 public:
  explicit ThreadPool(int64_t num_threads) : num_threads_(num_threads) {
    for (int64_t i = 1; i < num_threads; ++i) {
      threads_.emplace_back([this] { Run(); });
    }
  }
  ~ThreadPool() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  int64_t num_threads() const override { return num_threads_; }
  void Schedule(void (*task)(void*), void* data) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.emplace_back(task, data);
    }
    changed_.notify_one();
  }

 private:
  void Run() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const auto task = tasks_.front();
      tasks_.pop_front();
      lock.unlock();
      task.first(task.second);
    }
  }

  int64_t num_threads_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<void (*)(void*), void*>> tasks_;
  bool stopping_ = false;
};

[[noreturn]] inline void Fail(const char* what, uint64_t seed) {
  fprintf(stderr, "jbag_fuzz: %s, case %llu\n", what,
          static_cast<unsigned long long>(seed));
  exit(1);
}

// Numbers of any of the types, as bytes; small multiples of 1/4, which all types hold
// and which sum without rounding, or now and then NaN or infinity.
class Numbers {
 public:
  Numbers(Type type, int64_t size) : type_(type), bytes_(size * SizeOf(type)) {}

  void* data() { return bytes_.data(); }
  const std::vector<char>& bytes() const { return bytes_; }

  void Set(int64_t i, double value) {
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    memcpy(&bits, &narrow, sizeof(bits));
    if (type_ == Type::kFloat64) memcpy(At(i), &value, sizeof(value));
    if (type_ == Type::kFloat32) memcpy(At(i), &narrow, sizeof(narrow));
    if (type_ == Type::kBFloat16) {
      const uint16_t half = static_cast<uint16_t>(bits >> 16);
      memcpy(At(i), &half, sizeof(half));
    }
    if (type_ == Type::kFloat16) {
      const uint16_t half = HalfBits(narrow);
      memcpy(At(i), &half, sizeof(half));
    }
  }

  double Get(int64_t i) {
    double wide = 0;
    float narrow = 0;
    uint16_t half = 0;
    if (type_ == Type::kFloat64) {
      memcpy(&wide, At(i), sizeof(wide));
      return wide;
    }
    if (type_ == Type::kFloat32) {
      memcpy(&narrow, At(i), sizeof(narrow));
      return narrow;
    }
    memcpy(&half, At(i), sizeof(half));
    if (type_ == Type::kBFloat16) {
      const uint32_t bits = uint32_t{half} << 16;
      memcpy(&narrow, &bits, sizeof(bits));
      return narrow;
    }
    const int exponent = (half >> 10) & 31;
    const double sign = half & 0x8000 ? -1 : 1;
    const double mantissa = half & 1023;
    if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
    return exponent == 0 ? sign * ldexp(mantissa, -24)
                         : sign * ldexp(mantissa + 1024, exponent - 25);
  }

 private:
  char* At(int64_t i) { return bytes_.data() + i * SizeOf(type_); }

  // Of a number that a half holds exactly.
  static uint16_t HalfBits(float value) {
    const uint16_t sign = signbit(value) ? 0x8000 : 0;
    if (isnan(value)) return 0x7e00;
    if (isinf(value)) return static_cast<uint16_t>(sign | 0x7c00);
    if (value == 0) return sign;
    int exponent;
    const double mantissa = frexp(fabs(static_cast<double>(value)), &exponent);
    return static_cast<uint16_t>(sign | ((exponent + 14) << 10) |
                                 (static_cast<int>(ldexp(mantissa, 11)) & 1023));
  }

  Type type_;
  std::vector<char> bytes_;
};

struct Case {
  explicit Case(uint64_t seed) : random(seed) {
    const Type types[] = {Type::kFloat32, Type::kFloat64, Type::kBFloat16,
                          Type::kFloat16};
    type = types[Below(4)];
    const int64_t widths[] = {0,  1,  2,  3,   5,   8,   10,  16,
                              17, 31, 64, 100, 129, 300, 1030};
    width = widths[Below(15)];
    rows = OneIn(20) ? 0 : 1 + Below(OneIn(3) ? 5000 : 40);
    num_bags = OneIn(20) ? 0 : Below(OneIn(4) ? 200 : 12);
    has_empty = OneIn(2);
    ids_64_bit = OneIn(2);
    empty = OneIn(2) ? -1 : OneIn(8) ? Wrapping() : Below(rows + 1);
    rectangular = OneIn(3);
    length = Below(OneIn(6) ? 3000 / (width + 1) : 9);
    const int64_t most = OneIn(4) ? 6000 : 60;
    num_slots = rectangular ? num_bags * length : Below(most);
    hostile = OneIn(3);
    offsets_64_bit = OneIn(2);
    weighted = OneIn(2);
    for (int64_t i = 0; i < num_slots; ++i) ids.push_back(Id());
    if (!rectangular) {
      offsets.push_back(0);
      for (int64_t i = 0; i < num_bags; ++i) {
        const int64_t left = num_slots - offsets.back();
        offsets.push_back(offsets.back() +
                          (OneIn(8)
                               ? Below(left + 1)
                               : Below(2 * num_slots / num_bags + 1) % (left + 1)));
      }
      if (hostile && OneIn(2)) {
        for (int n = 0; n < 3; ++n) offsets[Below(offsets.size())] = Anything();
      }
    }
    const Average averages[] = {Average::kNone, Average::kMean, Average::kSqrtN};
    average = averages[Below(3)];
    out_type = OneIn(2) ? type : SumType(type);
  }

  int64_t Below(int64_t n) {
    return n <= 0 ? 0 : static_cast<int64_t>(random() % static_cast<uint64_t>(n));
  }
  bool OneIn(int64_t n) { return Below(n) == 0; }
  int64_t Anything() {
    const int64_t extremes[] = {-1,   INT32_MIN,     INT32_MAX,
                                rows, num_slots + 1, -num_slots};
    if (OneIn(2)) return extremes[Below(6)];
    const int64_t bits = static_cast<int64_t>(random());
    return ids_64_bit && offsets_64_bit ? bits : static_cast<int32_t>(bits);
  }
  // What 32 bits don't tell from a row, or from no row.
  int64_t Wrapping() {
    const uint64_t low = OneIn(4) ? UINT32_MAX : static_cast<uint64_t>(Below(rows + 1));
    return static_cast<int64_t>(random() << 32 | low);
  }
  int64_t Id() {
    if (hostile && OneIn(10)) return Anything();
    if (hostile && ids_64_bit && OneIn(10)) return Wrapping();
    if (has_empty && OneIn(5)) return empty;
    return rows == 0 ? -2 : OneIn(2) ? Below(rows) : Below(rows < 3 ? rows : 3);
  }
  double Number() {
    if (hostile && OneIn(200)) return OneIn(2) ? NAN : INFINITY;
    return static_cast<double>(Below(17) - 8) / 4;
  }

  std::mt19937_64 random;
  Type type, out_type;
  Average average;
  int64_t width, rows, num_bags, length, num_slots, empty;
  bool has_empty, rectangular, hostile, ids_64_bit, offsets_64_bit, weighted;
  std::vector<int64_t> ids, offsets;
};

inline std::vector<char> Packed(const std::vector<int64_t>& values, bool is_64_bit) {
  std::vector<char> bytes(values.size() * (is_64_bit ? 8 : 4));
  for (size_t i = 0; i < values.size(); ++i) {
    const int32_t narrow = static_cast<int32_t>(values[i]);
    if (is_64_bit) memcpy(bytes.data() + i * 8, &values[i], 8);
    if (!is_64_bit) memcpy(bytes.data() + i * 4, &narrow, 4);
  }
  return bytes;
}

// The bags of a case in memory, and by definition.
struct CaseBags {
  explicit CaseBags(Case& c)
      : ids(Packed(c.ids, c.ids_64_bit)),
        offsets(Packed(c.offsets, c.offsets_64_bit)),
        coefficients(SumType(c.type), c.num_slots),
        bag_of(c.num_slots, -1),
        malformed(c.num_bags, false) {
    for (int64_t i = 0; i < c.num_slots; ++i) coefficients.Set(i, c.Below(5) - 2);
    bags.ids = {ids.data(), c.ids_64_bit, c.num_slots};
    if (!c.rectangular)
      bags.offsets = {offsets.data(), c.offsets_64_bit, c.num_bags + 1};
    bags.num_bags = c.num_bags;
    bags.length = c.length;
    bags.coefficients = c.weighted ? coefficients.data() : nullptr;
    bags.has_empty = c.has_empty;
    bags.empty = c.empty;
    int64_t bound = 0;
    for (int64_t bag = 0; bag < c.num_bags; ++bag) {
      int64_t start = bag * c.length;
      int64_t end = start + c.length;
      if (!c.rectangular) {
        const int64_t wanted_start = Seen(c.offsets[bag], c.offsets_64_bit);
        const int64_t wanted_end = Seen(c.offsets[bag + 1], c.offsets_64_bit);
        start = bound;
        end = bound = std::max(bound, std::min(wanted_end, c.num_slots));
        malformed[bag] = start != wanted_start || end != wanted_end;
      }
      for (int64_t slot = start; slot < end; ++slot) bag_of[slot] = bag;
    }
  }

  // Calls f(slot, bag, id, coefficient) for the slots that aren't empty.
  template <typename F>
  void Visit(const Case& c, F f) {
    for (int64_t slot = 0; slot < c.num_slots; ++slot) {
      const int64_t bag = bag_of[slot];
      const int64_t id = Seen(c.ids[slot], c.ids_64_bit);
      if (bag < 0 || malformed[bag] || (c.has_empty && id == c.empty)) continue;
      f(slot, bag, id, c.weighted ? coefficients.Get(slot) : 1);
    }
  }

  // As the kernels see it.
  static int64_t Seen(int64_t x, bool is_64_bit) {
    return is_64_bit ? x : int64_t{int32_t(x)};
  }

  std::vector<char> ids, offsets;
  Numbers coefficients;
  Bags bags{};
  std::vector<int64_t> bag_of;
  std::vector<bool> malformed;
};

inline bool Same(double a, double b) { return isnan(a) ? isnan(b) : a == b; }

// Compares what the kernels make of a case with the definition.
void CheckBags(const Loops& loops, uint64_t seed);
void CheckUpdates(const Loops& loops, uint64_t seed);
void CheckCatchUps(const Loops& loops, uint64_t seed);
void CheckTexts(uint64_t seed);

}  // namespace jbag

#endif  // JBAG_FUZZ_FUZZ_H_
