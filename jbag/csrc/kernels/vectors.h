// Vectors of W numbers of a table's type, read as (and rounded from) the type that sums
// run in: float for float, bfloat16 and float16, double for double.
//
// W is 1, 2, 4, ... up to kWidth, the machine's. The compiler's vector extension spells
// the arithmetic, so that one source serves every instruction set.

#ifndef JBAG_KERNELS_VECTORS_H_
#define JBAG_KERNELS_VECTORS_H_

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "kernels/kernels.h"

namespace jbag {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

// The storage of a table's 16-bit numbers.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
constexpr Type kType = Type::kFloat32;
template <>
constexpr Type kType<double> = Type::kFloat64;
template <>
constexpr Type kType<BFloat16> = Type::kBFloat16;
template <>
constexpr Type kType<Float16> = Type::kFloat16;

// The type that sums run in.
template <typename T>
struct Sums {
  using Type = float;
};
template <>
struct Sums<double> {
  using Type = double;
};
template <typename T>
using Sum = typename Sums<T>::Type;

template <typename A>
constexpr A kNaN = __builtin_nan("");

inline float SquareRoot(float x) { return __builtin_sqrtf(x); }
inline double SquareRoot(double x) { return __builtin_sqrt(x); }

template <typename A>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(A));

// Rows start anywhere: vectors are read and written by memcpy, and so by one unaligned
// instruction.
template <typename A, int W>
struct Vectors {
  typedef A Type __attribute__((vector_size(W * sizeof(A))));
};
template <typename A, int W>
using Vector = typename Vectors<A, W>::Type;

template <typename To, typename From>
inline To Bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <int W>
inline Vector<uint32_t, W> Widened(const uint16_t* from) {
  // GCC converts whole vectors by halves.
#if defined(__AVX512F__)
  if constexpr (W == 16) {
    __m256i narrow;
    memcpy(&narrow, from, sizeof(narrow));
    return Bits<Vector<uint32_t, W>>(_mm512_cvtepu16_epi32(narrow));
  }
#endif
#if defined(__AVX2__)
  if constexpr (W == 8) {
    __m128i narrow;
    memcpy(&narrow, from, sizeof(narrow));
    return Bits<Vector<uint32_t, W>>(_mm256_cvtepu16_epi32(narrow));
  }
#endif
  Vector<uint16_t, W> narrow;
  memcpy(&narrow, from, sizeof(narrow));
  return __builtin_convertvector(narrow, Vector<uint32_t, W>);
}

// Choose(mask, a, b): a where the comparison held.
template <typename V, typename M>
inline V Choose(const M& mask, const V& a, const V& b) {
  return mask ? a : b;
}

template <int W>
inline Vector<float, W> Load(const float* from) {
  Vector<float, W> v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <int W>
inline Vector<double, W> Load(const double* from) {
  Vector<double, W> v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <int W>
inline Vector<float, W> Load(const BFloat16* from) {
  return Bits<Vector<float, W>>(Widened<W>(&from->bits) << 16);
}

template <int W>
inline Vector<float, W> Load(const Float16* from) {
#if defined(__AVX512F__)
  if constexpr (W == 16) {
    __m256i half;
    memcpy(&half, from, sizeof(half));
    return Bits<Vector<float, W>>(_mm512_cvtph_ps(half));
  }
#endif
#if defined(__F16C__)
  if constexpr (W == 8) {
    __m128i half;
    memcpy(&half, from, sizeof(half));
    return Bits<Vector<float, W>>(_mm256_cvtph_ps(half));
  }
  if constexpr (W < 8) {
    __m128i half = {};
    memcpy(&half, from, W * sizeof(*from));
    const __m128 values = _mm_cvtph_ps(half);
    Vector<float, W> v;
    memcpy(&v, &values, sizeof(v));
    return v;
  }
#endif
  // By integers, and by no number that is subnormal as a float: XLA's threads flush
  // those to zero. 113 and 15 are exponents of the smallest normal half.
  using U = Vector<uint32_t, W>;
  using F = Vector<float, W>;
  const U half = Widened<W>(&from->bits);
  const U magnitude = (half & 0x7fff) << 13;
  const U exponent = magnitude & (0x7c00u << 13);
  const U normal = magnitude + (112u << 23);
  const U special = normal + (112u << 23);
  const F smallest = Bits<F>(U{} + (113u << 23));
  const U subnormal = Bits<U>(Bits<F>(normal + (1u << 23)) - smallest);
  const U out = Choose(exponent == U{}, subnormal,
                       Choose(exponent == U{} + (0x7c00u << 13), special, normal));
  return Bits<F>(out | ((half & 0x8000) << 16));
}

template <int W>
inline void Store(float* to, const Vector<float, W>& v) {
  memcpy(to, &v, sizeof(v));
}

template <int W>
inline void Store(double* to, const Vector<double, W>& v) {
  memcpy(to, &v, sizeof(v));
}

// Rounded to nearest, ties to even; a NaN stays one.
template <int W>
inline void Store(BFloat16* to, const Vector<float, W>& v) {
  using U = Vector<uint32_t, W>;
  const U bits = Bits<U>(v);
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U nan = (bits >> 16) | 0x40;
  const auto narrow = __builtin_convertvector(
      Choose((bits & 0x7fffffff) > U{} + 0x7f800000, nan, rounded),
      Vector<uint16_t, W>);
  memcpy(to, &narrow, sizeof(narrow));
}

// Not inlined: a vector whose lanes are taken one by one is in memory.
template <int W>
__attribute__((noinline)) void StoreByIntegers(Float16* to, Vector<float, W> v) {
  for (int lane = 0; lane < W; ++lane) {
    const uint32_t bits = Bits<uint32_t>(static_cast<float>(v[lane]));
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00 | ((magnitude >> 13) & 0x3ff);
    } else if (magnitude >= 0x477ff000) {  // rounds past the largest half, 65504
      half = 0x7c00;
    } else if (magnitude >= 113u << 23) {
      half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    } else {
      // Below the smallest normal half: units of 2^-24.
      const int exponent = static_cast<int>(magnitude >> 23);
      const int shift = 126 - exponent;
      const uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000;
      half = 0;
      if (shift <= 24) {
        const uint32_t rest = mantissa & ((1u << shift) - 1);
        const uint32_t tie = 1u << (shift - 1);
        half = mantissa >> shift;
        half += rest > tie || (rest == tie && (half & 1));
      }
    }
    to[lane].bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000));
  }
}

template <int W>
inline void Store(Float16* to, const Vector<float, W>& v) {
#if defined(__AVX512F__)
  if constexpr (W == 16) {
    const __m256i half = _mm512_cvtps_ph(Bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    memcpy(to, &half, sizeof(half));
    return;
  }
#endif
#if defined(__F16C__)
  if constexpr (W == 8) {
    const __m128i half = _mm256_cvtps_ph(Bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    memcpy(to, &half, sizeof(half));
    return;
  }
  if constexpr (W < 8) {
    __m128 values = {};
    memcpy(&values, &v, sizeof(v));
    const __m128i half = _mm_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
    memcpy(to, &half, W * sizeof(*to));
    return;
  }
#endif
  StoreByIntegers<W>(to, v);
}

}  // namespace
}  // namespace jbag

#endif  // JBAG_KERNELS_VECTORS_H_
