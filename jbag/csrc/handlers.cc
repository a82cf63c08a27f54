// The kernels as XLA FFI handlers: shapes and types are checked, nothing else is done.
//
// Operands: the dense arrays, ids [N] or [B, L], offsets [B + 1] ([0] with ids [B, L])
// and, where the operation takes them, coefficients of the shape of ids ([0]: ones).

#include <stdint.h>

#include <string>
#include <string_view>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

class XlaPool final : public jbag::Pool {
 public:
  explicit XlaPool(ffi::ThreadPool pool) : pool_(pool) {}
  int64_t num_threads() const override { return pool_.num_threads(); }
  void Schedule(void (*task)(void*), void* data) override {
    pool_.Schedule([task, data] { task(data); });
  }

 private:
  ffi::ThreadPool pool_;
};

ffi::Error Invalid(const std::string& what) {
  return ffi::Error::InvalidArgument("jbag: " + what);
}

ffi::Error Returned(jbag::Error error) {
  if (error == nullptr) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, error);
}

bool ReadMatrix(const ffi::AnyBuffer& buffer, jbag::Matrix* out) {
  if (buffer.dimensions().size() != 2) return false;
  switch (buffer.element_type()) {
    case ffi::F32:
      out->type = jbag::Type::kFloat32;
      break;
    case ffi::F64:
      out->type = jbag::Type::kFloat64;
      break;
    case ffi::BF16:
      out->type = jbag::Type::kBFloat16;
      break;
    case ffi::F16:
      out->type = jbag::Type::kFloat16;
      break;
    default:
      return false;
  }
  out->data = buffer.untyped_data();
  out->rows = buffer.dimensions()[0];
  out->width = buffer.dimensions()[1];
  return true;
}

bool ReadIntegers(const ffi::AnyBuffer& buffer, jbag::Integers* out) {
  const ffi::DataType type = buffer.element_type();
  if (type != ffi::S32 && type != ffi::S64) return false;
  out->data = buffer.untyped_data();
  out->wide = type == ffi::S64;
  out->size = static_cast<int64_t>(buffer.element_count());
  return true;
}

bool ReadAverage(std::string_view average, jbag::Average* out) {
  if (average == "none") {
    *out = jbag::Average::kNone;
  } else if (average == "mean") {
    *out = jbag::Average::kMean;
  } else if (average == "sqrtn") {
    *out = jbag::Average::kSqrtN;
  } else {
    return false;
  }
  return true;
}

// The type that sums over a table of `type` run in.
jbag::Type SumType(jbag::Type type) {
  return type == jbag::Type::kFloat64 ? type : jbag::Type::kFloat32;
}
ffi::DataType SumDataType(jbag::Type type) {
  return type == jbag::Type::kFloat64 ? ffi::F64 : ffi::F32;
}

// Reads the bags, of which there are `num_bags`; null, or what is wrong.
const char* ReadBags(const ffi::AnyBuffer& ids, const ffi::AnyBuffer& offsets,
                     const ffi::AnyBuffer* coefficients, bool has_empty, int64_t empty,
                     jbag::Type type, int64_t num_bags, jbag::Bags* out) {
  const auto dimensions = ids.dimensions();
  if (!ReadIntegers(ids, &out->ids) || !ReadIntegers(offsets, &out->offsets)) {
    return "ids and offsets must be int32 or int64";
  }
  // The kernels number slots and bags in 32 bits.
  if (out->ids.size > INT32_MAX || num_bags > INT32_MAX) {
    return "ids and bags must be fewer than 2^31";
  }
  out->has_empty = has_empty;
  out->empty = empty;
  out->num_bags = num_bags;
  out->length = 0;
  if (dimensions.size() == 2) {
    if (dimensions[0] != num_bags) return "ids [B, L] must have one row a bag";
    out->length = dimensions[1];
    out->offsets.data = nullptr;
  } else if (dimensions.size() != 1 || out->offsets.size != num_bags + 1) {
    return "offsets must be [B + 1]";
  }
  out->coefficients = nullptr;
  if (coefficients != nullptr && coefficients->element_count() > 0) {
    if (coefficients->element_type() != SumDataType(type) ||
        static_cast<int64_t>(coefficients->element_count()) != out->ids.size) {
      return "coefficients must have the shape of ids and the type of sums";
    }
    out->coefficients = coefficients->untyped_data();
  }
  return nullptr;
}

ffi::Error Product(ffi::ThreadPool threads, ffi::AnyBuffer table, ffi::AnyBuffer ids,
                   ffi::AnyBuffer offsets, ffi::AnyBuffer coefficients, bool has_empty,
                   int64_t empty, std::string_view average,
                   ffi::Result<ffi::AnyBuffer> out) {
  XlaPool pool(threads);
  jbag::Matrix rows;
  jbag::Matrix sums;
  jbag::Average kind;
  if (!ReadMatrix(table, &rows)) return Invalid("table must be [V, D], floating");
  if (!ReadMatrix(*out, &sums) || sums.width != rows.width ||
      (sums.type != rows.type && sums.type != SumType(rows.type))) {
    return Invalid("out must be [B, D] of the table's type or that of sums");
  }
  if (!ReadAverage(average, &kind)) {
    return Invalid("average must be none, mean or sqrtn");
  }
  jbag::Bags bags;
  if (const char* wrong = ReadBags(ids, offsets, &coefficients, has_empty, empty,
                                   rows.type, sums.rows, &bags)) {
    return Invalid(wrong);
  }
  return Returned(jbag::BestKernels().product(pool, rows, bags, kind, sums));
}

ffi::Error TransposedProduct(ffi::ThreadPool threads, ffi::AnyBuffer cotangent,
                             ffi::AnyBuffer ids, ffi::AnyBuffer offsets,
                             ffi::AnyBuffer coefficients, bool has_empty, int64_t empty,
                             ffi::Result<ffi::AnyBuffer> out) {
  XlaPool pool(threads);
  jbag::Matrix bag_rows;
  jbag::Matrix rows;
  if (!ReadMatrix(cotangent, &bag_rows) || !ReadMatrix(*out, &rows) ||
      rows.width != bag_rows.width || bag_rows.type != SumType(rows.type)) {
    return Invalid("cotangent must be [B, D] of the type of sums, out [V, D]");
  }
  jbag::Bags bags;
  if (const char* wrong = ReadBags(ids, offsets, &coefficients, has_empty, empty,
                                   rows.type, bag_rows.rows, &bags)) {
    return Invalid(wrong);
  }
  return Returned(jbag::BestKernels().transposed_product(pool, bag_rows, bags, rows));
}

ffi::Error SampledDots(ffi::ThreadPool threads, ffi::AnyBuffer table,
                       ffi::AnyBuffer cotangent, ffi::AnyBuffer ids,
                       ffi::AnyBuffer offsets, bool has_empty, int64_t empty,
                       ffi::Result<ffi::AnyBuffer> out) {
  XlaPool pool(threads);
  jbag::Matrix rows;
  jbag::Matrix bag_rows;
  if (!ReadMatrix(table, &rows) || !ReadMatrix(cotangent, &bag_rows) ||
      rows.width != bag_rows.width || bag_rows.type != SumType(rows.type)) {
    return Invalid("table must be [V, D], cotangent [B, D] of the type of sums");
  }
  jbag::Bags bags;
  if (const char* wrong = ReadBags(ids, offsets, nullptr, has_empty, empty, rows.type,
                                   bag_rows.rows, &bags)) {
    return Invalid(wrong);
  }
  if (out->element_type() != SumDataType(rows.type) ||
      static_cast<int64_t>(out->element_count()) != bags.ids.size) {
    return Invalid("out must have the shape of ids and the type of sums");
  }
  return Returned(jbag::BestKernels().sampled_dots(pool, rows, bag_rows, bags,
                                                   out->untyped_data()));
}

ffi::Error Extremum(ffi::ThreadPool threads, ffi::AnyBuffer table, ffi::AnyBuffer ids,
                    ffi::AnyBuffer offsets, ffi::AnyBuffer coefficients, bool has_empty,
                    int64_t empty, bool largest, ffi::Result<ffi::AnyBuffer> values,
                    ffi::Result<ffi::BufferR2<ffi::S32>> winners) {
  XlaPool pool(threads);
  jbag::Matrix rows;
  jbag::Matrix best;
  if (!ReadMatrix(table, &rows)) return Invalid("table must be [V, D], floating");
  if (!ReadMatrix(*values, &best) || best.width != rows.width ||
      best.type != SumType(rows.type) ||
      winners->element_count() != values->element_count()) {
    return Invalid("values and winners must be [B, D], of the type of sums and int32");
  }
  jbag::Bags bags;
  if (const char* wrong = ReadBags(ids, offsets, &coefficients, has_empty, empty,
                                   rows.type, best.rows, &bags)) {
    return Invalid(wrong);
  }
  return Returned(jbag::BestKernels().extremum(pool, rows, bags, largest, best.data,
                                               winners->typed_data()));
}

ffi::Error ToHugePages(ffi::ThreadPool threads, ffi::AnyBuffer from,
                       ffi::Result<ffi::AnyBuffer> to) {
  XlaPool pool(threads);
  if (from.size_bytes() != to->size_bytes()) return Invalid("sizes must be equal");
  jbag::CopyToHugePages(pool, from.untyped_data(), to->untyped_data(),
                        static_cast<int64_t>(from.size_bytes()));
  return ffi::Error::Success();
}

}  // namespace

// The library hides all the rest.
#pragma GCC visibility push(default)
extern "C" {

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // table
                                  .Arg<ffi::AnyBuffer>()  // ids
                                  .Arg<ffi::AnyBuffer>()  // offsets
                                  .Arg<ffi::AnyBuffer>()  // coefficients
                                  .Attr<bool>("has_empty")
                                  .Attr<int64_t>("empty")
                                  .Attr<std::string_view>("average")
                                  .Ret<ffi::AnyBuffer>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_transposed_product, TransposedProduct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // cotangent
                                  .Arg<ffi::AnyBuffer>()  // ids
                                  .Arg<ffi::AnyBuffer>()  // offsets
                                  .Arg<ffi::AnyBuffer>()  // coefficients
                                  .Attr<bool>("has_empty")
                                  .Attr<int64_t>("empty")
                                  .Ret<ffi::AnyBuffer>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_sampled_dots, SampledDots,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // table
                                  .Arg<ffi::AnyBuffer>()  // cotangent
                                  .Arg<ffi::AnyBuffer>()  // ids
                                  .Arg<ffi::AnyBuffer>()  // offsets
                                  .Attr<bool>("has_empty")
                                  .Attr<int64_t>("empty")
                                  .Ret<ffi::AnyBuffer>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_extremum, Extremum,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // table
                                  .Arg<ffi::AnyBuffer>()  // ids
                                  .Arg<ffi::AnyBuffer>()  // offsets
                                  .Arg<ffi::AnyBuffer>()  // coefficients
                                  .Attr<bool>("has_empty")
                                  .Attr<int64_t>("empty")
                                  .Attr<bool>("largest")
                                  .Ret<ffi::AnyBuffer>()             // values
                                  .Ret<ffi::BufferR2<ffi::S32>>());  // winners

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_to_huge_pages, ToHugePages,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()    // from
                                  .Ret<ffi::AnyBuffer>());  // to

}  // extern "C"
#pragma GCC visibility pop
