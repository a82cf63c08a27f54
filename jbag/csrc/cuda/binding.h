// What the handlers share: XLA's buffers as the kernels' arguments, and launches.
//
// Each operation has a handler for two stages of XLA's FFI: initialize, which compiles
// its kernels, and execute.

#ifndef JBAG_CUDA_BINDING_H_
#define JBAG_CUDA_BINDING_H_

#include <stdint.h>

#include <exception>
#include <initializer_list>
#include <optional>
#include <string>

#include "cuda/device/arguments.h"
#include "cuda/driver.h"
#include "cuda/launcher.h"
#include "ffi/buffers.h"
#include "kernels/kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jbag {
namespace cuda {

template <bool kLaunches>
struct OnDevice {};

}  // namespace cuda
}  // namespace jbag

namespace xla::ffi {

// The device and the stream; no stream on a CPU, where the tests run.
template <bool kLaunches>
struct CtxDecoding<jbag::cuda::OnDevice<kLaunches>> {
  using Type = jbag::cuda::Device;

  static std::optional<Type> Decode(const XLA_FFI_Api* api,
                                    XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
    const auto ordinal = CtxDecoding<DeviceOrdinal>::Decode(api, context, diagnostic);
    if (!ordinal.has_value()) return std::nullopt;
    XLA_FFI_Stream_Get_Args args;
    args.struct_size = XLA_FFI_Stream_Get_Args_STRUCT_SIZE;
    args.extension_start = nullptr;
    args.ctx = context;
    args.stream = nullptr;
    if (XLA_FFI_Error* error = api->XLA_FFI_Stream_Get(&args)) {
      internal::DestroyError(api, error);
      args.stream = nullptr;
    }
    return Type{*ordinal, static_cast<jbag::cuda::CUstream>(args.stream), kLaunches};
  }
};

}  // namespace xla::ffi

namespace jbag {
namespace cuda {

inline ffi::Error Ran(const Launcher& launcher, const Device& device) {
  const std::string error = launcher.Run(device);
  return error.empty() ? ffi::Error::Success() : ffi::Error::Internal(error);
}

inline const char* NameOf(Type type) {
  switch (type) {
    case Type::kFloat32:
      return "float";
    case Type::kFloat64:
      return "double";
    case Type::kBFloat16:
      return "jbag::cuda::BFloat16";
    case Type::kFloat16:
      return "jbag::cuda::Half";
  }
  return "";
}
inline const char* NameOf(const Integers& integers) {
  return integers.is_64_bit ? "long long" : "int";
}
inline int64_t SizeOf(Type type) {
  return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2;
}

// The C++ name of an instance of a kernel.
template <typename... Arguments>
std::string Instance(const char* kernel, const Arguments&... arguments) {
  std::string list;
  ((list += list.empty() ? "" : ", ", list += arguments), ...);
  return std::string("jbag::cuda::") + kernel + "<" + list + ">";
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether vectors of `width` numbers, read by up to 16 bytes, are whole and aligned in
// all rows; XLA's buffers are aligned.
inline bool HasVectors(const Matrix& matrix, int64_t width) {
  const int64_t bytes = width * SizeOf(matrix.type);
  const auto address = reinterpret_cast<uintptr_t>(matrix.data);
  return matrix.width % width == 0 &&
         address % static_cast<uintptr_t>(bytes < 16 ? bytes : 16) == 0;
}

// Groups of threads, one for each item, that divide a row in vectors.
struct Groups {
  int64_t width;  // of a vector
  Division division;
  int64_t parts;  // of a row

  // For the rows that ids name, and matrices of the same width beside them.
  explicit Groups(const Matrix& rows, std::initializer_list<Matrix> others = {})
      : width(16 / SizeOf(rows.type)), division{0} {
    while (!HasVectors(rows, width)) width /= 2;
    for (const Matrix& other : others) {
      while (!HasVectors(other, width)) width /= 2;
    }
    const int64_t vectors = rows.width / width;
    while (division.lanes_log2 < 5 && (1 << division.lanes_log2) < vectors) {
      ++division.lanes_log2;
    }
    parts = CeilDiv(vectors, 1 << division.lanes_log2);
  }
  int64_t Blocks(int64_t items) const {
    return CeilDiv(items, kBlock >> division.lanes_log2);
  }
  std::string vector() const { return std::to_string(width); }
};

inline int* IntegersOf(ffi::Result<ffi::AnyBuffer>& buffer) {
  return static_cast<int*>(buffer->untyped_data());
}
inline int64_t SizeOf(ffi::Result<ffi::AnyBuffer>& buffer) {
  return static_cast<int64_t>(buffer->element_count());
}

// The kernels number rows and columns in 32 bits.
inline bool IsTooLarge(const Matrix& matrix) {
  return matrix.rows > INT32_MAX || matrix.width > INT32_MAX;
}

inline Dense DenseOf(const Matrix& matrix) {
  return {matrix.data, matrix.rows, static_cast<int>(matrix.width)};
}

// The pieces that slots may have, of bags of up to `longest` slots.
inline int64_t MaxPieces(int64_t num_slots, int64_t longest) {
  return longest > kPiece ? 2 * CeilDiv(num_slots, kPiece) : 0;
}

// Bags for the kernels. The bounds of ragged ones are B + 2 integers of scratch.
struct BagsOnDevice {
  Slots slots;
  int64_t max_pieces;
  int64_t num_integers;

  BagsOnDevice(const Bags& bags, bool ragged, int* integers, Launcher* launcher) {
    slots = {bags.ids.data, nullptr,        bags.coefficients,
             bags.num_bags, bags.ids.size,  bags.length,
             bags.empty,    bags.has_empty, 0};
    num_integers = 0;
    max_pieces = MaxPieces(bags.ids.size, bags.length);
    if (!ragged) return;
    max_pieces = MaxPieces(bags.ids.size, bags.ids.size);
    slots.bounds = integers;
    num_integers = bags.num_bags + 2;
    const int64_t count = bags.num_bags + 1;
    int* flag = integers + count;
    const char* offset = NameOf(bags.offsets);
    launcher->Zero(flag, sizeof(int));
    launcher->Launch(Instance("CheckBounds", offset), CeilDiv(count, kBlock), 1, kBlock,
                     bags.offsets.data, count, bags.ids.size, integers, flag);
    launcher->Launch(Instance("RepairBounds", offset), 1, 1, 32, bags.offsets.data,
                     count, bags.ids.size, integers, flag);
  }
};

inline bool IsRagged(const ffi::AnyBuffer& ids) { return ids.dimensions().size() == 1; }

constexpr const char* kScratch = "scratch is too small";

// Whether scratch has room for partial sums of the type of sums over `matrix`.
inline bool HasRoom(const ffi::AnyBuffer& partials, const Matrix& matrix,
                    int64_t pieces) {
  return partials.element_type() == SumDataType(matrix.type) &&
         static_cast<int64_t>(partials.element_count()) >= pieces * matrix.width;
}

// A handler's function that returns an error where memory for its strings runs out.
template <auto kFunction>
struct Guarded;
template <typename... Arguments, ffi::Error (*kFunction)(Arguments...)>
struct Guarded<kFunction> {
  static ffi::Error Call(Arguments... arguments) {
    try {
      return kFunction(arguments...);
    } catch (const std::exception& error) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, error.what());
    }
  }
};

// Defines the handlers of an operation for both stages.
#define JBAG_CUDA_HANDLERS(name, function, operands)                             \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                 \
      name##_initialize, Guarded<function>::Call,                                \
      ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().Ctx<OnDevice<false>>()  \
          operands);                                                             \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, Guarded<function>::Call,                   \
                                ffi::Ffi::Bind().Ctx<OnDevice<true>>() operands, \
                                {ffi::Traits::kCmdBufferCompatible})

}  // namespace cuda
}  // namespace jbag

#endif  // JBAG_CUDA_BINDING_H_
