// Rows that catch up with the steps that they missed: the fuzzer's definition of it.

#include <math.h>
#include <stdint.h>

#include <set>
#include <vector>

#include "fuzz/fuzz.h"
#include "kernels/kernels.h"
#include "kernels/simd_loops.h"

namespace jbag {
namespace {

constexpr int kNumRules = sizeof(kRules) / sizeof(kRules[0]);

double Shrunk(double w, double row) { return row == 1 ? w : w + (row - 1) * w; }

// The sum of the moves of Adam; `magnitude` grows by that of each.
double Moves(double m, double root, const double* n, double* magnitude) {
  double moves = 0;
  for (int i = 0; i < 3; ++i) {
    const double divisor = root + n[6 + i];
    const double move = divisor == 0 ? 0 : n[3 + i] * m / divisor;
    *magnitude += fabs(move);
    moves += move;
  }
  return moves;
}

}  // namespace

void CheckCatchUps(const Loops& loops, uint64_t seed) {
  Case c(seed);
  CaseBags given(c);
  const Type sums = SumType(c.type);
  const RuleShape& shape =
      kRules[kNumGradientRules + c.Below(kNumRules - kNumGradientRules)];
  const int64_t columns = int64_t{1} << c.Below(4);
  std::vector<double> table_of(shape.numbers * columns);
  Numbers numbers(sums, shape.numbers * columns);
  for (int64_t i = 0; i < shape.numbers * columns; ++i) {
    table_of[i] = static_cast<double>(c.Below(9)) / 8;
    numbers.Set(i, table_of[i]);
  }
  const int32_t count = static_cast<int32_t>(c.Below(kStepPeriod));
  std::vector<int32_t> steps(c.rows), lags(c.rows);
  for (int64_t row = 0; row < c.rows; ++row) {
    lags[row] = static_cast<int32_t>(c.Below(columns + 2));
    steps[row] = (count - lags[row] + kStepPeriod) % kStepPeriod;
  }
  std::set<int64_t> named;  // by a slot, in a bag or not
  for (int64_t i = 0; i < given.bags.ids.size; ++i) {
    const int64_t id = given.bags.ids[i];
    if (id < 0 || id >= c.rows) continue;
    if (given.bags.has_empty && id == given.bags.empty) continue;
    named.insert(id);
  }

  const int64_t size = c.rows * c.width;
  const int64_t states[] = {shape.per_element > 0 ? size : 0,
                            shape.per_element > 1 ? size
                            : shape.per_row > 0   ? c.rows
                                                  : 0};
  const int64_t sizes[] = {size, states[0], states[1]};
  std::vector<double> before[3], after[3];
  for (int a = 0; a < 3; ++a) {
    for (int64_t i = 0; i < sizes[a]; ++i) {
      const double number = c.Number();
      before[a].push_back(a == 2 ? fabs(number) : number);
    }
    after[a] = before[a];
  }
  std::vector<double> slack(size, 1);
  for (const int64_t row : named) {
    if (lags[row] == 0) continue;
    double n[9];
    for (int i = 0; i < shape.numbers; ++i) {
      n[i] = lags[row] < columns ? table_of[i * columns + steps[row] % columns] : NAN;
    }
    for (int64_t d = 0; d < c.width; ++d) {
      const int64_t at = row * c.width + d;
      double& w = after[0][at];
      slack[at] += fabs(w);
      w = Shrunk(w, n[0]);
      if (shape.rule == Rule::kCatchUpMomentum) {
        slack[at] += fabs(n[2] * before[1][at]);
        w -= n[2] * before[1][at];
      } else if (shape.rule != Rule::kCatchUp) {
        const double v = before[2][shape.per_row > 0 ? row : at];
        w -= Moves(before[1][at], sqrt(v), n, &slack[at]);
      }
      if (shape.per_element > 0) after[1][at] = n[1] * before[1][at];
      if (shape.per_element > 1) after[2][at] = n[2] * before[2][at];
    }
    if (shape.per_row > 0) after[2][row] = n[2] * before[2][row];
  }

  Numbers cotangent(sums, c.num_bags * c.width);
  const Matrix bag_rows{cotangent.data(), sums, c.num_bags, c.width};
  std::vector<char> first;
  for (const int64_t threads : {int64_t{1}, 2 + c.Below(3)}) {
    ThreadPool pool(threads);
    Numbers arrays[] = {{c.type, sizes[0]}, {sums, sizes[1]}, {sums, sizes[2]}};
    for (int a = 0; a < 3; ++a) {
      for (int64_t i = 0; i < sizes[a]; ++i) arrays[a].Set(i, before[a][i]);
    }
    std::vector<int32_t> own_steps = steps;
    Update update{
        shape.rule, numbers.data(), {arrays[1].data(), arrays[2].data()}, nullptr};
    update.steps = own_steps.data();
    update.count = count;
    update.columns = columns;
    const Matrix table{arrays[0].data(), c.type, c.rows, c.width};
    if (UpdateRows(loops, pool, table, update, bag_rows, given.bags) != nullptr) {
      Fail("out of memory", seed);
    }
    for (int64_t row = 0; row < c.rows; ++row) {
      if (own_steps[row] != (named.count(row) > 0 ? count : steps[row])) {
        Fail("steps of rows", seed);
      }
    }
    std::vector<char> bytes;
    for (int a = 0; a < 3; ++a) {
      bytes.insert(bytes.end(), arrays[a].bytes().begin(), arrays[a].bytes().end());
      const double unit = a > 0                       ? 1e-5
                          : c.type == Type::kBFloat16 ? 1.001 / 256
                          : c.type == Type::kFloat16  ? 1.001 / 2048
                                                      : 1e-5;
      for (int64_t i = 0; i < sizes[a]; ++i) {
        const double exact = after[a][i];
        const double number = arrays[a].Get(i);
        if (Same(number, exact)) continue;
        if (a == 0 && c.type == Type::kFloat16 && fabs(exact) > 65000) continue;
        const double magnitude = a == 0 ? slack[i] : 1;
        if (!(fabs(number - exact) <= unit * fabs(exact) + 1e-5 * magnitude)) {
          Fail(a == 0 ? shape.name : "state of a row that catches up", seed);
        }
      }
    }
    if (threads == 1) first = bytes;
    if (bytes != first) Fail("threads show where rows catch up", seed);
  }
}

}  // namespace jbag
