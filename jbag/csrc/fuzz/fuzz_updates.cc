// The rows that slots name, summed and moved: the fuzzer's definition of them.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <vector>

#include "fuzz/fuzz.h"
#include "kernels/kernels.h"
#include "kernels/simd_loops.h"

namespace jbag {
namespace {

using Gradient = std::map<int64_t, std::vector<double>>;  // by row

double Ratio(double a, double b) { return b == 0 ? 0 : a / b; }
double Decayed(double w, double delta, double decay) {
  return w + (delta - (decay == 0 ? 0 : decay * w));
}

// Moves one number, given the states of it and of its row, which have moved already.
double Moved(Rule rule, double w, double g, double* s, double row, const double* n) {
  const double rate = n[0], decay = n[1];
  switch (rule) {
    case Rule::kSgd:
      return Decayed(w, -rate * g, decay);
    case Rule::kMomentum:
      s[0] = n[2] * s[0] + n[3] * g;
      return Decayed(w, -rate * (n[4] * g + n[5] * s[0]), decay);
    case Rule::kAdagrad:
      s[0] += g * g;
      return Decayed(w, -rate * Ratio(g, sqrt(s[0]) + n[2]), decay);
    case Rule::kAdam:
      s[0] = n[3] * s[0] + (1 - n[3]) * g;
      s[1] = n[4] * s[1] + (1 - n[4]) * g * g;
      return Decayed(w, -rate * Ratio(s[0], sqrt(s[1]) + n[2]), decay);
    case Rule::kRowwiseAdam:
      s[0] = n[3] * s[0] + (1 - n[3]) * g;
      return Decayed(w, -rate * Ratio(s[0], sqrt(row) + n[2]), decay);
    case Rule::kRowwiseAdagrad:
    case Rule::kRowwiseRmsprop:
      return Decayed(w, -rate * Ratio(g, sqrt(row) + n[2]), decay);
    case Rule::kFtrl: {
      const double grown = s[1] + g * g;
      s[0] += rate * g - (sqrt(grown) - sqrt(s[1])) * w;
      s[1] = grown;
      const double sign = isnan(s[0]) ? s[0] : (s[0] > 0) - (s[0] < 0);
      const double kept = sign * std::max(fabs(s[0]) - rate * n[2], 0.0);
      return w + (-Ratio(kept, n[1] + sqrt(grown) + rate * n[3]) - w);
    }
    default:
      break;
  }
  return NAN;
}

double MovedRow(Rule rule, double state, double mean_square, const double* n) {
  if (rule == Rule::kRowwiseAdagrad) return state + mean_square;
  const double b2 = rule == Rule::kRowwiseAdam ? n[4] : n[3];
  return b2 * state + (1 - b2) * mean_square;
}

uint32_t Mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352d;
  x = (x ^ (x >> 15)) * 0x846ca68b;
  return x ^ (x >> 16);
}

// A finite number, rounded up or down to bfloat16.
double AtRandom(double exact, const uint32_t* seed, int64_t row, int64_t column) {
  float number = static_cast<float>(exact);
  uint32_t bits;
  memcpy(&bits, &number, sizeof(bits));
  const uint32_t hashed = Mix(static_cast<uint32_t>(row) ^ seed[0]);
  const uint32_t place = static_cast<uint32_t>(column) * 0x9e3779b9u + seed[1];
  bits = (bits + (Mix(hashed + place) >> 16)) & 0xffff0000u;
  memcpy(&number, &bits, sizeof(bits));
  return number;
}

// Half a unit of the last place, or all of it if rounded at random, for numbers near 1.
double Unit(Type type, bool at_random) {
  switch (type) {
    case Type::kFloat64:
      return 1e-12;
    case Type::kFloat32:
      return 1e-5;
    case Type::kFloat16:
      return 1.001 / 2048;
    default:
      return at_random ? 1.001 / 128 : 1.001 / 256;
  }
}

void CheckCoalesced(const Loops& loops, Case& c, const Bags& bags, Numbers& cotangent,
                    const Gradient& gradient, uint64_t seed) {
  const Type sums = SumType(c.type);
  const int64_t all = std::min(c.num_slots, c.rows);
  const int64_t capacity = c.OneIn(4) ? c.Below(all + 1) : all;
  const Matrix bag_rows{cotangent.data(), sums, c.num_bags, c.width};
  std::vector<char> first;
  for (const int64_t threads : {int64_t{1}, 2 + c.Below(3)}) {
    ThreadPool pool(threads);
    std::vector<char> indices(capacity * (c.ids_64_bit ? 8 : 4), 77);
    Numbers out(sums, capacity * c.width);
    const Matrix to{out.data(), sums, capacity, c.width};
    if (Coalesce(loops, pool, bag_rows, bags, c.rows, indices.data(), to) != nullptr) {
      Fail("out of memory", seed);
    }
    const Integers found{indices.data(), c.ids_64_bit, capacity};
    auto next = gradient.begin();
    for (int64_t i = 0; i < capacity; ++i) {
      const bool named = next != gradient.end();
      if (found[i] != (named ? next->first : c.rows)) Fail("coalesced rows", seed);
      for (int64_t d = 0; d < c.width; ++d) {
        const double sum = named ? next->second[d] : 0;
        if (!Same(out.Get(i * c.width + d), sum)) Fail("coalesced sums", seed);
      }
      if (named) ++next;
    }
    if (threads == 1) first = out.bytes();
    if (out.bytes() != first) Fail("threads show in coalesced sums", seed);
  }
}

}  // namespace

void CheckUpdates(const Loops& loops, uint64_t seed) {
  Case c(seed);
  CaseBags given(c);
  const Type sums = SumType(c.type);
  Numbers cotangent(sums, c.num_bags * c.width);
  for (int64_t i = 0; i < c.num_bags * c.width; ++i) cotangent.Set(i, c.Below(3) - 1);
  Gradient gradient;
  given.Visit(c, [&](int64_t, int64_t bag, int64_t id, double coefficient) {
    if (id < 0 || id >= c.rows) return;
    std::vector<double>& row = gradient[id];
    row.resize(c.width, 0);
    for (int64_t d = 0; d < c.width; ++d) {
      row[d] += coefficient * cotangent.Get(bag * c.width + d);
    }
  });
  CheckCoalesced(loops, c, given.bags, cotangent, gradient, seed);

  const RuleShape& shape = kRules[c.Below(kNumGradientRules)];
  // Rate and decay or beta; the others lie in [0, 1), and eps, l1 and l2 are often 0.
  double n[6] = {0.25, c.OneIn(2) ? 0 : 0.5};
  for (int i = 2; i < 6; ++i)
    n[i] = c.OneIn(2) ? 0 : static_cast<double>(c.Below(8)) / 8;
  Numbers numbers(sums, shape.numbers);
  for (int i = 0; i < shape.numbers; ++i) numbers.Set(i, n[i]);
  const uint32_t random_seed[] = {static_cast<uint32_t>(c.random()),
                                  static_cast<uint32_t>(c.random())};
  const bool at_random = c.type == Type::kBFloat16 && c.OneIn(2);

  const int64_t size = c.rows * c.width;
  const int64_t sizes[] = {
      size, shape.per_element > 0 ? size : shape.per_row * c.rows,
      shape.per_element > 1 ? size : shape.per_element * shape.per_row * c.rows};
  std::vector<double> before[3], after[3];  // the table and the states
  for (int a = 0; a < 3; ++a) {
    for (int64_t i = 0; i < sizes[a]; ++i) {
      const double number = c.Number();
      before[a].push_back(a == 0 ? number : fabs(number));
    }
    after[a] = before[a];
  }
  std::vector<double> slack(size, 0);  // what the numbers are made of
  for (const auto& [row, g] : gradient) {
    double row_state = 0;
    if (shape.per_row > 0) {
      double squares = 0;
      for (const double x : g) squares += x * x;
      double& state = after[1 + shape.per_element][row];
      squares /= static_cast<double>(std::max<int64_t>(c.width, 1));
      row_state = state = MovedRow(shape.rule, state, squares, n);
    }
    for (int64_t d = 0; d < c.width; ++d) {
      const int64_t at = row * c.width + d;
      double states[2] = {0, 0};
      slack[at] = 1 + fabs(before[0][at]) + fabs(g[d]);
      for (int i = 0; i < shape.per_element; ++i) {
        states[i] = before[1 + i][at];
        slack[at] += states[i];
      }
      after[0][at] = Moved(shape.rule, before[0][at], g[d], states, row_state, n);
      for (int i = 0; i < shape.per_element; ++i) after[1 + i][at] = states[i];
    }
  }

  const Matrix bag_rows{cotangent.data(), sums, c.num_bags, c.width};
  std::vector<char> first;
  for (const int64_t threads : {int64_t{1}, 2 + c.Below(3)}) {
    ThreadPool pool(threads);
    Numbers arrays[] = {{c.type, sizes[0]}, {sums, sizes[1]}, {sums, sizes[2]}};
    for (int a = 0; a < 3; ++a) {
      for (int64_t i = 0; i < sizes[a]; ++i) arrays[a].Set(i, before[a][i]);
    }
    const Matrix table{arrays[0].data(), c.type, c.rows, c.width};
    const Update update{shape.rule,
                        numbers.data(),
                        {arrays[1].data(), arrays[2].data()},
                        at_random ? random_seed : nullptr};
    if (UpdateRows(loops, pool, table, update, bag_rows, given.bags) != nullptr) {
      Fail("out of memory", seed);
    }
    std::vector<char> bytes;
    for (int a = 0; a < 3; ++a) {
      bytes.insert(bytes.end(), arrays[a].bytes().begin(), arrays[a].bytes().end());
      const bool by_row = a > shape.per_element;
      const double unit = Unit(a == 0 ? c.type : sums, a == 0 && at_random);
      for (int64_t i = 0; i < sizes[a]; ++i) {
        const int64_t row = by_row ? i : i / c.width;
        const double exact = after[a][i];
        const double number = arrays[a].Get(i);
        if (gradient.count(row) == 0) {
          if (!Same(number, exact)) Fail("a row that no slot names has moved", seed);
          continue;
        }
        if (Same(number, exact)) continue;
        if (a == 0 && c.type == Type::kFloat16 && fabs(exact) > 65000) continue;
        const double digits = c.type == Type::kFloat64 ? 1e-12 : 1e-5;
        const double magnitude = by_row ? 1 : slack[i];
        if (!(fabs(number - exact) <= unit * fabs(exact) + digits * magnitude)) {
          Fail(a == 0 ? shape.name : "state", seed);
        }
      }
    }
    // Its numbers are exact, so that the very bits can be told.
    for (const auto& [row, g] : gradient) {
      for (int64_t d = 0; at_random && shape.rule == Rule::kSgd && d < c.width; ++d) {
        const double exact = after[0][row * c.width + d];
        const double number = arrays[0].Get(row * c.width + d);
        if (isfinite(exact) && number != AtRandom(exact, random_seed, row, d)) {
          Fail("rounding at random", seed);
        }
      }
    }
    if (threads == 1) first = bytes;
    if (bytes != first) Fail("threads show in the update", seed);
  }
}

}  // namespace jbag
