// Feeds the kernels with random bags and compares them with the definition.
//
//   jbag_fuzz [seconds [seed]]

#include "fuzz/fuzz.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/simd_loops.h"

namespace jbag {
namespace {

// Whether a number is `exact` divided and rounded, or rounded alone.
bool Rounded(double number, double exact, Type type) {
  const int bits = type == Type::kFloat64    ? 52
                   : type == Type::kFloat32  ? 23
                   : type == Type::kBFloat16 ? 7
                                             : 10;
  // The root, the quotient and their rounding to 16 bits each err by half a unit.
  const double halves = bits > 10 ? 2 : 1.001;
  const double error = ldexp(fabs(exact), -bits) / 2 * halves + ldexp(1, -25);
  return Same(number, exact) || fabs(number - exact) <= error;
}

}  // namespace

void CheckBags(const Loops& loops, uint64_t seed) {
  Case c(seed);
  CaseBags given(c);
  const Bags& bags = given.bags;
  const Type sums = SumType(c.type);
  Numbers table(c.type, c.rows * c.width);
  Numbers cotangent(sums, c.num_bags * c.width);
  for (int64_t i = 0; i < c.rows * c.width; ++i) table.Set(i, c.Number());
  for (int64_t i = 0; i < c.num_bags * c.width; ++i) {
    // Small enough that a 16-bit table's gradient is exact.
    cotangent.Set(i, static_cast<double>(c.Below(3)) - 1);
  }
  const Matrix rows{table.data(), c.type, c.rows, c.width};
  const Matrix bag_rows{cotangent.data(), sums, c.num_bags, c.width};

  // The definition.
  std::vector<double> pooled_rows(c.num_bags * c.width, 0);
  std::vector<int64_t> filled(c.num_bags, 0);
  std::vector<double> best(c.num_bags * c.width, 0);
  std::vector<int64_t> winners(c.num_bags * c.width, c.num_slots);
  std::vector<double> transposed(c.rows * c.width, 0);
  std::vector<double> dots(c.num_slots, 0);
  const bool largest = c.OneIn(2);
  given.Visit(c, [&](int64_t slot, int64_t bag, int64_t id, double coefficient) {
    ++filled[bag];
    const bool known = id >= 0 && id < c.rows;
    for (int64_t d = 0; d < c.width; ++d) {
      const int64_t at = bag * c.width + d;
      const double e = known ? table.Get(id * c.width + d) : NAN;
      pooled_rows[at] += coefficient * e;
      dots[slot] += e * cotangent.Get(at);
      if (known) transposed[id * c.width + d] += coefficient * cotangent.Get(at);
      const double x = coefficient * e;
      const bool worse = largest ? x <= best[at] : x >= best[at];
      if (winners[at] == c.num_slots || (!worse && !isnan(best[at]))) {
        best[at] = x;
        winners[at] = slot;
      }
    }
  });
  for (int64_t i = 0; i < c.num_bags * c.width; ++i) {
    if (given.malformed[i / c.width]) pooled_rows[i] = best[i] = NAN;
    const double count = std::max<double>(1, filled[i / c.width]);
    if (c.average == Average::kMean) pooled_rows[i] /= count;
    if (c.average == Average::kSqrtN) pooled_rows[i] /= sqrt(count);
  }

  std::vector<char> first_bytes;
  for (const int64_t threads : {int64_t{1}, 2 + c.Below(3)}) {
    ThreadPool pool(threads);
    Numbers out(c.out_type, c.num_bags * c.width);
    Numbers values(sums, c.num_bags * c.width);
    std::vector<int32_t> slots(c.num_bags * c.width);
    Numbers gradient(c.type, c.rows * c.width);
    Numbers slot_dots(sums, c.num_slots);
    const Matrix pooled{out.data(), c.out_type, c.num_bags, c.width};
    const Matrix to{gradient.data(), c.type, c.rows, c.width};
    if (Spmm(loops, pool, rows, bags, c.average, pooled) != nullptr ||
        Extremum(loops, pool, rows, bags, largest, values.data(), slots.data()) !=
            nullptr ||
        SpmmTranspose(loops, pool, bag_rows, bags, to) != nullptr ||
        Sddmm(loops, pool, rows, bag_rows, bags, slot_dots.data()) != nullptr) {
      Fail("out of memory", seed);
    }
    for (int64_t i = 0; i < c.num_bags * c.width; ++i) {
      if (!Rounded(out.Get(i), pooled_rows[i], c.out_type)) Fail("spmm", seed);
      if (!Same(values.Get(i), best[i])) Fail("extremum", seed);
      if (slots[i] != winners[i]) Fail("winners", seed);
    }
    for (int64_t i = 0; i < c.rows * c.width; ++i) {
      if (fabs(transposed[i]) > 200) continue;  // rounded
      if (!Same(gradient.Get(i), transposed[i])) Fail("transposed pooled_rows", seed);
    }
    for (int64_t i = 0; i < c.num_slots; ++i) {
      if (!Same(slot_dots.Get(i), dots[i])) Fail("sddmm", seed);
    }
    std::vector<char> bytes = out.bytes();
    bytes.insert(bytes.end(), gradient.bytes().begin(), gradient.bytes().end());
    if (threads == 1) first_bytes = bytes;
    if (bytes != first_bytes) Fail("threads show in the result", seed);
  }
}

}  // namespace jbag

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? atof(argv[1]) : 10;
  uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : 0;
  std::vector<const jbag::Loops*> all = {jbag::BaselineLoops()};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) all.push_back(jbag::Avx2Loops());
#endif
  if (&jbag::BestLoops() != all.back()) all.push_back(&jbag::BestLoops());
  const auto start = std::chrono::steady_clock::now();
  uint64_t cases = 0;
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start)
        .count();
  };
  for (; elapsed() < seconds; ++cases, ++seed) {
    jbag::CheckTexts(seed);
    for (const jbag::Loops* loops : all) {
      jbag::CheckBags(*loops, seed);
      jbag::CheckUpdates(*loops, seed);
      jbag::CheckCatchUps(*loops, seed);
    }
  }
  printf("jbag_fuzz: %llu cases over", static_cast<unsigned long long>(cases));
  for (const jbag::Loops* loops : all) printf(" %s", loops->instruction_set);
  printf(": passed\n");
  return 0;
}
