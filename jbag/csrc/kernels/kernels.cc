// The kernels for one instruction set: this file is compiled once for each, with the
// compiler's flags for it and JBAG_KERNELS, the name of the function that returns them.
//
// No header of the C++ library with inline functions may come in here: the linker keeps
// one copy of such a function, and it could be the one that this machine can't run.

#include <stdint.h>

#include "kernels/pooling.h"
#include "kernels/transposing.h"
#include "kernels/updating.h"

namespace jbag {
namespace {

// Calls f with a value of the type that the numbers of a matrix have.
template <typename F>
Error WithType(Type type, F f) {
  switch (type) {
    case Type::kFloat32:
      return f(float{});
    case Type::kFloat64:
      return f(double{});
    case Type::kBFloat16:
      return f(BFloat16{});
    case Type::kFloat16:
      return f(Float16{});
  }
  return "jbag: unknown type";
}

Error DoSpmm(Pool& pool, const Matrix& table, const Bags& bags, Average average,
             const Matrix& out) {
  return WithType(table.type, [&](auto number) {
    using Row = decltype(number);
    if (out.type == table.type) {
      return Spmm<Row>(pool, table, bags, average, static_cast<Row*>(out.data));
    }
    return Spmm<Row>(pool, table, bags, average, static_cast<Sum<Row>*>(out.data));
  });
}

Error DoSpmmTranspose(Pool& pool, const Matrix& cotangent, const Bags& bags,
                      const Matrix& out) {
  return WithType(out.type, [&](auto number) {
    return SpmmTranspose<decltype(number)>(pool, cotangent, bags, out);
  });
}

Error DoSddmm(Pool& pool, const Matrix& table, const Matrix& cotangent,
              const Bags& bags, void* out) {
  return WithType(table.type, [&](auto number) {
    return Sddmm<decltype(number)>(pool, table, cotangent, bags, out);
  });
}

Error DoExtremum(Pool& pool, const Matrix& table, const Bags& bags, bool largest,
                 void* values, int32_t* winners) {
  return WithType(table.type, [&](auto number) {
    return Extremum<decltype(number)>(pool, table, bags, largest, values, winners);
  });
}

template <typename A>
Error CoalesceAs(Pool& pool, const Matrix& cotangent, const Bags& bags,
                 int64_t num_rows, void* indices, const Matrix& sums) {
  if (bags.ids.is_64_bit) {
    return Coalesce<A>(pool, cotangent, bags, num_rows, static_cast<int64_t*>(indices),
                       sums);
  }
  return Coalesce<A>(pool, cotangent, bags, num_rows, static_cast<int32_t*>(indices),
                     sums);
}

Error DoCoalesce(Pool& pool, const Matrix& cotangent, const Bags& bags,
                 int64_t num_rows, void* indices, const Matrix& sums) {
  if (sums.type == Type::kFloat64) {
    return CoalesceAs<double>(pool, cotangent, bags, num_rows, indices, sums);
  }
  return CoalesceAs<float>(pool, cotangent, bags, num_rows, indices, sums);
}

Error DoUpdateRows(Pool& pool, const Matrix& table, const Update& update,
                   const Matrix& cotangent, const Bags& bags) {
  return WithType(table.type, [&](auto number) {
    return UpdateRows<decltype(number)>(pool, table, update, cotangent, bags);
  });
}

constexpr char kInstructionSet[] =
#if defined(__AVX512F__)
    "AVX-512";
#elif defined(__AVX2__)
    "AVX2";
#else
    "baseline";
#endif

constexpr Kernels kKernels = {kInstructionSet, DoSpmm,     DoSpmmTranspose, DoSddmm,
                              DoExtremum,      DoCoalesce, DoUpdateRows};

}  // namespace

const Kernels* JBAG_KERNELS() { return &kKernels; }

}  // namespace jbag
