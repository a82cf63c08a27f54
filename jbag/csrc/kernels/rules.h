// The rules of jbag/ops/kernels/update_rules.py, by the vector. Each is a struct of its
// numbers, in order; the rule's name there is the struct's here.
//
// Moved(w, g, states, divisor) returns the row's new numbers and updates the states per
// element. A rule with a state per row first computes, from it and from the mean square
// of the row's gradient, the row's divisor.

#ifndef JBAG_KERNELS_RULES_H_
#define JBAG_KERNELS_RULES_H_

#include <stdint.h>

#include "kernels/vectors.h"

namespace jbag {
namespace {

// The square root of each lane.
template <typename V>
inline V SquareRoots(const V& v) {
  using A = decltype(V{}[0] + 0);
  constexpr bool kDouble = sizeof(A) == sizeof(double);
  (void)kDouble;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    if constexpr (kDouble) return Bits<V>(_mm512_sqrt_pd(Bits<__m512d>(v)));
    if constexpr (!kDouble) return Bits<V>(_mm512_sqrt_ps(Bits<__m512>(v)));
  }
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) {
    if constexpr (kDouble) return Bits<V>(_mm256_sqrt_pd(Bits<__m256d>(v)));
    if constexpr (!kDouble) return Bits<V>(_mm256_sqrt_ps(Bits<__m256>(v)));
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) {
    if constexpr (kDouble) return Bits<V>(_mm_sqrt_pd(Bits<__m128d>(v)));
    if constexpr (!kDouble) return Bits<V>(_mm_sqrt_ps(Bits<__m128>(v)));
  }
#endif
  V roots = v;
  for (int lane = 0; lane < static_cast<int>(sizeof(V) / sizeof(A)); ++lane) {
    roots[lane] = SquareRoot(static_cast<A>(v[lane]));
  }
  return roots;
}

// By zero, as where a row had no gradient yet, nothing moves.
template <typename V>
inline V Ratio(const V& a, const V& b) {
  return Choose(b == V{}, V{}, a / b);
}

// Without a decay, what isn't finite in a row stays what it is.
template <typename V, typename A>
inline V Decayed(const V& w, const V& delta, A decay) {
  return w + (decay == 0 ? delta : delta - decay * w);
}

template <typename A>
struct Sgd {
  A rate, decay;

  static constexpr Rule kRule = Rule::kSgd;
  template <typename V>
  V Moved(const V& w, const V& g, V*, A) const {
    return Decayed(w, -rate * g, decay);
  }
};

template <typename A>
struct Momentum {
  A rate, decay, momentum, fresh, direct, through;

  static constexpr Rule kRule = Rule::kMomentum;
  template <typename V>
  V Moved(const V& w, const V& g, V* m, A) const {
    *m = momentum * *m + fresh * g;
    return Decayed(w, -rate * (direct * g + through * *m), decay);
  }
};

template <typename A>
struct Adagrad {
  A rate, decay, eps;

  static constexpr Rule kRule = Rule::kAdagrad;
  template <typename V>
  V Moved(const V& w, const V& g, V* total, A) const {
    *total += g * g;
    return Decayed(w, -rate * Ratio(g, SquareRoots(*total) + eps), decay);
  }
};

template <typename A>
struct RowwiseAdagrad {
  A rate, decay, eps;

  static constexpr Rule kRule = Rule::kRowwiseAdagrad;
  A Divisor(A mean_square, A* total) const {
    *total += mean_square;
    return SquareRoot(*total) + eps;
  }
  template <typename V>
  V Moved(const V& w, const V& g, V*, A divisor) const {
    return Decayed(w, -rate * Ratio(g, divisor + V{}), decay);
  }
};

template <typename A>
struct Adam {
  A rate, decay, eps, b1, b2;

  static constexpr Rule kRule = Rule::kAdam;
  template <typename V>
  V Moved(const V& w, const V& g, V* states, A) const {
    V& m = states[0];
    V& v = states[1];
    m = b1 * m + (1 - b1) * g;
    v = b2 * v + (1 - b2) * (g * g);
    return Decayed(w, -rate * Ratio(m, SquareRoots(v) + eps), decay);
  }
};

template <typename A>
struct RowwiseAdam {
  A rate, decay, eps, b1, b2;

  static constexpr Rule kRule = Rule::kRowwiseAdam;
  A Divisor(A mean_square, A* v) const {
    *v = b2 * *v + (1 - b2) * mean_square;
    return SquareRoot(*v) + eps;
  }
  template <typename V>
  V Moved(const V& w, const V& g, V* m, A divisor) const {
    *m = b1 * *m + (1 - b1) * g;
    return Decayed(w, -rate * Ratio(*m, divisor + V{}), decay);
  }
};

template <typename A>
struct RowwiseRmsprop {
  A rate, decay, eps, b2;

  static constexpr Rule kRule = Rule::kRowwiseRmsprop;
  A Divisor(A mean_square, A* v) const {
    *v = b2 * *v + (1 - b2) * mean_square;
    return SquareRoot(*v) + eps;
  }
  template <typename V>
  V Moved(const V& w, const V& g, V*, A divisor) const {
    return Decayed(w, -rate * Ratio(g, divisor + V{}), decay);
  }
};

template <typename A>
struct Ftrl {
  A rate, beta, l1, l2;

  static constexpr Rule kRule = Rule::kFtrl;
  template <typename V>
  V Moved(const V& w, const V& g, V* states, A) const {
    V& z = states[0];
    V& n = states[1];
    const V before = SquareRoots(n);
    n += g * g;
    const V root = SquareRoots(n);
    z = z + rate * g - (root - before) * w;
    const V one = V{} + 1;
    const V sign = Choose(z > V{}, one, Choose(z < V{}, -one, z));  // a NaN's is NaN
    const V excess = Choose(z < V{}, -z, z) - rate * l1;
    const V kept = sign * Choose(excess < V{}, V{}, excess);
    return w + (-Ratio(kept, beta + root + rate * l2) - w);
  }
};

// Rules that catch up take no gradient. Their numbers are what a row has missed.

// Where a row has shrunk by nothing, what isn't finite in it stays what it is.
template <typename V, typename A>
inline V Shrunk(const V& w, const V& moved, A row) {
  return w + (row == 1 ? -moved : (row - 1) * w - moved);
}

template <typename A>
struct CatchUp {
  A row;

  static constexpr Rule kRule = Rule::kCatchUp;
  template <typename V>
  V Moved(const V& w, const V&, V*, A) const {
    return Shrunk(w, V{}, row);
  }
};

template <typename A>
struct CatchUpMomentum {
  A row, trace, move;

  static constexpr Rule kRule = Rule::kCatchUpMomentum;
  template <typename V>
  V Moved(const V& w, const V&, V* m, A) const {
    const V moved = move * *m;
    *m = trace * *m;
    return Shrunk(w, moved, row);
  }
};

// The nodes of a quadrature: see jbag/optim/_missed_steps.py.
template <typename A>
struct Nodes {
  A weights[3], eps[3];

  template <typename V>
  V Moves(const V& m, const V& root) const {
    V moves = Ratio(weights[0] * m, root + eps[0]);
    moves += Ratio(weights[1] * m, root + eps[1]);
    return moves + Ratio(weights[2] * m, root + eps[2]);
  }
};

template <typename A>
struct CatchUpAdam {
  A row, b1, b2;
  Nodes<A> nodes;

  static constexpr Rule kRule = Rule::kCatchUpAdam;
  template <typename V>
  V Moved(const V& w, const V&, V* states, A) const {
    V& m = states[0];
    V& v = states[1];
    const V moves = nodes.Moves(m, SquareRoots(v));
    m = b1 * m;
    v = b2 * v;
    return Shrunk(w, moves, row);
  }
};

template <typename A>
struct CatchUpRowwiseAdam {
  A row, b1, b2;
  Nodes<A> nodes;

  static constexpr Rule kRule = Rule::kCatchUpRowwiseAdam;
  A Divisor(A, A* v) const {
    const A root = SquareRoot(*v);
    *v = b2 * *v;
    return root;
  }
  template <typename V>
  V Moved(const V& w, const V&, V* m, A root) const {
    const V moves = nodes.Moves(*m, root + V{});
    *m = b1 * *m;
    return Shrunk(w, moves, row);
  }
};

}  // namespace
}  // namespace jbag

#endif  // JBAG_KERNELS_RULES_H_
