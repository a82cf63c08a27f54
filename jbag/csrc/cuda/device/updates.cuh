// Updates of rows by a rule: the functions of jbag/ops/kernels/update_rules.py.
//
// Traffic: the slots of the row as in sums.cuh; the row and its states once in and once
// out. Rules with a state per row sum twice the rows that one group can't hold.

namespace jbag {
namespace cuda {

// Zero where the divisor is zero, as in a row without a gradient so far.
template <typename A>
__device__ inline A Ratio(A a, A b) {
  return b == 0 ? A(0) : a / b;
}

// 0 * w is NaN where w isn't finite.
template <typename A>
__device__ inline A Decayed(A w, A delta, A decay) {
  return w + (decay == 0 ? delta : delta - decay * w);
}

// Each rule has its scalars in order, and Step(w, g, states, divisor), which returns
// the new number and updates the states per element. A rule with a state per row has
// Divisor(mean square, state).
template <typename A>
struct Sgd {
  A rate, decay;
  static constexpr int kPerElement = 0;
  static constexpr bool kPerRow = false;
  __device__ A Step(A w, A g, A*, A) const { return Decayed(w, -rate * g, decay); }
};

template <typename A>
struct Momentum {
  A rate, decay, momentum, gradient_to_trace, gradient_to_step, trace_to_step;
  static constexpr int kPerElement = 1;
  static constexpr bool kPerRow = false;
  __device__ A Step(A w, A g, A* trace, A) const {
    *trace = momentum * *trace + gradient_to_trace * g;
    return Decayed(w, -rate * (gradient_to_step * g + trace_to_step * *trace), decay);
  }
};

template <typename A>
struct Adagrad {
  A rate, decay, eps;
  static constexpr int kPerElement = 1;
  static constexpr bool kPerRow = false;
  __device__ A Step(A w, A g, A* sum_of_squares, A) const {
    *sum_of_squares += g * g;
    return Decayed(w, -rate * Ratio(g, sqrt(*sum_of_squares) + eps), decay);
  }
};

template <typename A>
struct RowwiseAdagrad {
  A rate, decay, eps;
  static constexpr int kPerElement = 0;
  static constexpr bool kPerRow = true;
  __device__ A Divisor(A mean_square, A* sum_of_squares) const {
    *sum_of_squares += mean_square;
    return sqrt(*sum_of_squares) + eps;
  }
  __device__ A Step(A w, A g, A*, A divisor) const {
    return Decayed(w, -rate * Ratio(g, divisor), decay);
  }
};

template <typename A>
struct Adam {
  A rate, decay, eps, b1, b2;
  static constexpr int kPerElement = 2;
  static constexpr bool kPerRow = false;
  __device__ A Step(A w, A g, A* states, A) const {
    A& mu = states[0];
    A& nu = states[1];
    mu = b1 * mu + (1 - b1) * g;
    nu = b2 * nu + (1 - b2) * (g * g);
    return Decayed(w, -rate * Ratio(mu, sqrt(nu) + eps), decay);
  }
};

template <typename A>
struct RowwiseAdam {
  A rate, decay, eps, b1, b2;
  static constexpr int kPerElement = 1;
  static constexpr bool kPerRow = true;
  __device__ A Divisor(A mean_square, A* nu) const {
    *nu = b2 * *nu + (1 - b2) * mean_square;
    return sqrt(*nu) + eps;
  }
  __device__ A Step(A w, A g, A* mu, A divisor) const {
    *mu = b1 * *mu + (1 - b1) * g;
    return Decayed(w, -rate * Ratio(*mu, divisor), decay);
  }
};

template <typename A>
struct RowwiseRmsprop {
  A rate, decay, eps, b2;
  static constexpr int kPerElement = 0;
  static constexpr bool kPerRow = true;
  __device__ A Divisor(A mean_square, A* nu) const {
    *nu = b2 * *nu + (1 - b2) * mean_square;
    return sqrt(*nu) + eps;
  }
  __device__ A Step(A w, A g, A*, A divisor) const {
    return Decayed(w, -rate * Ratio(g, divisor), decay);
  }
};

template <typename A>
struct Ftrl {
  A rate, beta, l1, l2;
  static constexpr int kPerElement = 2;
  static constexpr bool kPerRow = false;
  __device__ A Step(A w, A g, A* states, A) const {
    A& z = states[0];
    A& n = states[1];
    const A before = sqrt(n);
    n += g * g;
    const A root = sqrt(n);
    z = z + rate * g - (root - before) * w;
    const A sign = z > 0 ? A(1) : z < 0 ? A(-1) : z;  // a NaN's is NaN
    const A excess = (z < 0 ? -z : z) - rate * l1;
    const A shrunk = sign * (excess < 0 ? A(0) : excess);
    return w + (-Ratio(shrunk, beta + root + rate * l2) - w);
  }
};

__device__ inline uint32 Hash(uint32 x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Rounds up or down so that the expected value is exact. Infinities and NaNs stay.
__device__ inline BFloat16 RoundStochastically(float x, uint32 noise) {
  const uint32 bits = __float_as_uint(x);
  BFloat16 out;
  if ((bits & 0x7fffffff) < 0x7f800000) {
    out.bits = static_cast<uint16>((bits + noise) >> 16);
  } else {
    Narrow(x, &out);
  }
  return out;
}

// Updates the row of each segment of sorted slots by a rule.
template <typename T, int W, template <typename> class Rule, bool kAtRandom>
__global__ void UpdateRows(Dense cotangent, Slots slots, Partials partials,
                           const int* rows, Table table, Division division) {
  using A = Sum<T>;
  const Part part = PartOf(division);
  if (part.item >= slots.num_bags) return;
  const Range range = RangeOf(slots, part.item);
  if (range.start == range.end) return;
  const int64 row = rows[part.item];
  const int64 width = cotangent.width;
  const int lanes = 1 << division.lanes_log2;
  const Rule<A> rule = *static_cast<const Rule<A>*>(table.scalars);
  Sums<A, W> gradient;

  A divisor = 1;
  if constexpr (Rule<A>::kPerRow) {
    A squares = 0;
    for (int64 vector = part.vector; vector * W < width; vector += lanes) {
      gradient.Fill(0);
      AddBag<A, W, int>(cotangent, slots, partials, range, vector * W, &gradient);
#pragma unroll
      for (int k = 0; k < W; ++k) squares += gradient.x[k] * gradient.x[k];
    }
    const uint32 lane = threadIdx.x % 32;
    const uint32 group = lane >> division.lanes_log2 << division.lanes_log2;
    const uint32 mask = (lanes == 32 ? 0xffffffffu : (1u << lanes) - 1) << group;
    for (int step = lanes / 2; step > 0; step /= 2) {
      squares += __shfl_xor_sync(mask, squares, step);
    }
    A* state = static_cast<A*>(table.states[Rule<A>::kPerElement]) + row;
    A value = *state;
    divisor = rule.Divisor(squares / static_cast<A>(width > 1 ? width : 1), &value);
    __syncwarp(mask);  // all have read the state
    if (part.vector == 0) *state = value;
  }

  uint32 hash = 0;
  if constexpr (kAtRandom) {
    hash = Hash(static_cast<uint32>(row) ^ table.seed[0]) + table.seed[1];
  }
  for (int64 vector = part.vector; vector * W < width; vector += lanes) {
    const int64 column = vector * W;
    if (!Rule<A>::kPerRow || width > lanes * W) {
      gradient.Fill(0);
      AddBag<A, W, int>(cotangent, slots, partials, range, column, &gradient);
    }
    const int64 at = row * width + column;
    T* numbers = static_cast<T*>(table.data) + at;
    Sums<A, W> states[2];
#pragma unroll
    for (int i = 0; i < Rule<A>::kPerElement; ++i) {
      states[i].Load(static_cast<const A*>(table.states[i]) + at);
    }
    using V = Vector<T, W>;
    V moved;
    moved.words = *reinterpret_cast<const typename V::Words::Type*>(numbers);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      A own[2] = {states[0].x[k], states[1].x[k]};
      const A x = rule.Step(Widen(moved.x[k]), gradient.x[k], own, divisor);
      states[0].x[k] = own[0];
      states[1].x[k] = own[1];
      if constexpr (kAtRandom) {
        const uint32 noise =
            Hash(hash + static_cast<uint32>(column + k) * 0x9e3779b9u) >> 16;
        moved.x[k] = RoundStochastically(x, noise);
      } else {
        Narrow(x, &moved.x[k]);
      }
    }
#pragma unroll
    for (int i = 0; i < Rule<A>::kPerElement; ++i) {
      Store(states[i], static_cast<A*>(table.states[i]) + at);
    }
    *reinterpret_cast<typename V::Words::Type*>(numbers) = moved.words;
  }
}

}  // namespace cuda
}  // namespace jbag
