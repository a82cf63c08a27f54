// Numbers of tables and sums, read and written by vectors of up to 16 bytes.

namespace jbag {
namespace cuda {

using int64 = long long;
using uint16 = unsigned short;
using uint32 = unsigned int;

struct Half {
  uint16 bits;
};
struct BFloat16 {
  uint16 bits;
};

// The type that sums over a table of T run in.
template <typename T>
struct SumOf {
  using Type = T;
};
template <>
struct SumOf<Half> {
  using Type = float;
};
template <>
struct SumOf<BFloat16> {
  using Type = float;
};
template <typename T>
using Sum = typename SumOf<T>::Type;

#ifdef __CUDACC__
__device__ inline float HalfToFloat(uint16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ inline uint16 FloatToHalf(float x) {
  uint16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

__device__ inline float Widen(float x) { return x; }
__device__ inline double Widen(double x) { return x; }
__device__ inline float Widen(BFloat16 x) {
  return __uint_as_float(static_cast<uint32>(x.bits) << 16);
}
__device__ inline float Widen(Half x) { return HalfToFloat(x.bits); }

__device__ inline void Narrow(float x, float* out) { *out = x; }
__device__ inline void Narrow(double x, double* out) { *out = x; }
__device__ inline void Narrow(float x, Half* out) { out->bits = FloatToHalf(x); }
__device__ inline void Narrow(float x, BFloat16* out) {
  const uint32 bits = __float_as_uint(x);
  const uint32 to_even = bits + 0x7fff + (bits >> 16 & 1);
  out->bits = static_cast<uint16>((x != x ? bits | 0x400000 : to_even) >> 16);
}

template <typename A>
__device__ inline A NaN() {
  return static_cast<A>(__uint_as_float(0x7fc00000));
}

template <int kBytes>
struct WordsOf;
template <>
struct WordsOf<16> {
  using Type = uint4;
  static __device__ Type Zeros() { return make_uint4(0, 0, 0, 0); }
};
template <>
struct WordsOf<8> {
  using Type = uint2;
  static __device__ Type Zeros() { return make_uint2(0, 0); }
};
template <>
struct WordsOf<4> {
  using Type = uint32;
  static __device__ Type Zeros() { return 0; }
};
template <>
struct WordsOf<2> {
  using Type = uint16;
  static __device__ Type Zeros() { return 0; }
};

// W numbers that one instruction reads.
template <typename T, int W>
union Vector {
  using Words = WordsOf<sizeof(T) * W>;
  typename Words::Type words;
  T x[W];
};

// A row's vector in the type of sums may take several loads.
template <typename A, int W>
struct Sums {
  static constexpr int kWidth = W * sizeof(A) > 16 ? 16 / sizeof(A) : W;
  A x[W];

  __device__ void Fill(A value) {
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] = value;
  }
  __device__ void Load(const A* from) {
#pragma unroll
    for (int i = 0; i < W; i += kWidth) {
      using V = Vector<A, kWidth>;
      V v;
      v.words = *reinterpret_cast<const typename V::Words::Type*>(from + i);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) x[i + k] = v.x[k];
    }
  }
};

// Rounds W sums to the type of `to` and writes them.
template <typename T, typename A, int W>
__device__ inline void Store(const Sums<A, W>& sums, T* to) {
  constexpr int kWidth = W * sizeof(T) > 16 ? 16 / sizeof(T) : W;
  using V = Vector<T, kWidth>;
#pragma unroll
  for (int i = 0; i < W; i += kWidth) {
    V v;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) Narrow(sums.x[i + k], &v.x[k]);
    *reinterpret_cast<typename V::Words::Type*>(to + i) = v.words;
  }
}

template <int W>
__device__ inline void StoreIntegers(const int (&from)[W], int* to) {
#pragma unroll
  for (int i = 0; i < W; ++i) to[i] = from[i];
}

}  // namespace cuda
}  // namespace jbag
