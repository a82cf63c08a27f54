// XLA's buffers as the kernels' matrices, integers and bags: shapes and types are
// checked, nothing else is done.

#ifndef JBAG_FFI_BUFFERS_H_
#define JBAG_FFI_BUFFERS_H_

#include <stdint.h>

#include <string>
#include <string_view>

#include "kernels/kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jbag {

namespace ffi = xla::ffi;

class XlaPool final : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool pool) : pool_(pool) {}
  int64_t num_threads() const override { return pool_.num_threads(); }
  void Schedule(void (*task)(void*), void* data) override {
    pool_.Schedule([task, data] { task(data); });
  }

 private:
  ffi::ThreadPool pool_;
};

inline ffi::Error Invalid(const std::string& what) {
  return ffi::Error::InvalidArgument("jbag: " + what);
}

inline ffi::Error Returned(Error error) {
  if (error == nullptr) return ffi::Error::Success();
  return ffi::Error(error == kOutOfMemory ? ffi::ErrorCode::kResourceExhausted
                                          : ffi::ErrorCode::kInvalidArgument,
                    error);
}

inline bool ReadMatrix(const ffi::AnyBuffer& buffer, Matrix* out) {
  if (buffer.dimensions().size() != 2) return false;
  switch (buffer.element_type()) {
    case ffi::F32:
      out->type = Type::kFloat32;
      break;
    case ffi::F64:
      out->type = Type::kFloat64;
      break;
    case ffi::BF16:
      out->type = Type::kBFloat16;
      break;
    case ffi::F16:
      out->type = Type::kFloat16;
      break;
    default:
      return false;
  }
  out->data = buffer.untyped_data();
  out->rows = buffer.dimensions()[0];
  out->width = buffer.dimensions()[1];
  return true;
}

inline bool ReadIntegers(const ffi::AnyBuffer& buffer, Integers* out) {
  const ffi::DataType type = buffer.element_type();
  if (type != ffi::S32 && type != ffi::S64) return false;
  out->data = buffer.untyped_data();
  out->is_64_bit = type == ffi::S64;
  out->size = static_cast<int64_t>(buffer.element_count());
  return true;
}

inline bool ReadAverage(std::string_view average, Average* out) {
  if (average == "none") {
    *out = Average::kNone;
  } else if (average == "mean") {
    *out = Average::kMean;
  } else if (average == "sqrtn") {
    *out = Average::kSqrtN;
  } else {
    return false;
  }
  return true;
}

// The type that sums over a table of `type` run in.
inline Type SumType(Type type) {
  return type == Type::kFloat64 ? type : Type::kFloat32;
}
inline ffi::DataType SumDataType(Type type) {
  return type == Type::kFloat64 ? ffi::F64 : ffi::F32;
}

// Reads the bags, of which there are `num_bags`; null, or what is wrong.
inline const char* ReadBags(const ffi::AnyBuffer& ids, const ffi::AnyBuffer& offsets,
                            const ffi::AnyBuffer* coefficients, bool has_empty,
                            int64_t empty, Type type, int64_t num_bags, Bags* out) {
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

}  // namespace jbag

#endif  // JBAG_FFI_BUFFERS_H_
