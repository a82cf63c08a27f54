// The operations on bags as XLA FFI handlers. Operands: as those of ffi/handlers.cc.
// The last results are scratch.

#include <stdint.h>

#include <string>
#include <string_view>

#include "cuda/binding.h"
#include "cuda/device/arguments.h"
#include "cuda/launcher.h"
#include "ffi/buffers.h"
#include "kernels/kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jbag {
namespace cuda {
namespace {

ffi::Error BindSpmm(Device device, ffi::AnyBuffer table, ffi::AnyBuffer ids,
                    ffi::AnyBuffer offsets, ffi::AnyBuffer coefficients, bool has_empty,
                    int64_t empty, std::string_view average,
                    ffi::Result<ffi::AnyBuffer> out,
                    ffi::Result<ffi::AnyBuffer> integers,
                    ffi::Result<ffi::AnyBuffer> partials) {
  Matrix rows;
  Matrix sums;
  Average kind;
  if (!ReadMatrix(table, &rows)) return Invalid("table must be [V, D], floating");
  if (IsTooLarge(rows)) return Returned(kTooManyRows);
  if (!ReadMatrix(*out, &sums) || sums.width != rows.width ||
      (sums.type != rows.type && sums.type != SumType(rows.type))) {
    return Invalid("out must be [B, D] of the table's type or that of sums");
  }
  if (!ReadAverage(average, &kind)) {
    return Invalid("average must be none, mean or sqrtn");
  }
  Bags read;
  if (const char* wrong = ReadBags(ids, offsets, &coefficients, has_empty, empty,
                                   rows.type, sums.rows, &read)) {
    return Invalid(wrong);
  }
  Launcher launcher;
  BagsOnDevice bags(read, IsRagged(ids), IntegersOf(integers), &launcher);
  bags.slots.average = static_cast<int>(kind);
  if (!HasRoom(*partials, rows, bags.max_pieces) ||
      SizeOf(integers) < bags.num_integers + bags.max_pieces) {
    return Invalid(kScratch);
  }
  const Partials pieces{partials->untyped_data(),
                        IntegersOf(integers) + bags.num_integers};
  const Groups groups(rows, {sums});
  const std::string types =
      std::string(NameOf(rows.type)) + ", " + groups.vector() + ", " + NameOf(read.ids);
  if (bags.max_pieces > 0) {
    launcher.Launch(Instance("SumPieces", types), groups.Blocks(bags.max_pieces),
                    groups.parts, kBlock, DenseOf(rows), bags.slots, pieces,
                    bags.max_pieces, groups.division);
  }
  const int* const no_rows = nullptr;
  launcher.Launch(Instance("SumBags", types, NameOf(sums.type)),
                  groups.Blocks(read.num_bags), groups.parts, kBlock, DenseOf(rows),
                  bags.slots, pieces, no_rows, sums.data, groups.division);
  return Ran(launcher, device);
}

ffi::Error BindExtremum(Device device, ffi::AnyBuffer table, ffi::AnyBuffer ids,
                        ffi::AnyBuffer offsets, ffi::AnyBuffer coefficients,
                        bool has_empty, int64_t empty, bool largest,
                        ffi::Result<ffi::AnyBuffer> values,
                        ffi::Result<ffi::BufferR2<ffi::S32>> winners,
                        ffi::Result<ffi::AnyBuffer> integers,
                        ffi::Result<ffi::AnyBuffer> partials,
                        ffi::Result<ffi::AnyBuffer> partial_winners) {
  Matrix rows;
  Matrix best;
  if (!ReadMatrix(table, &rows)) return Invalid("table must be [V, D], floating");
  if (IsTooLarge(rows)) return Returned(kTooManyRows);
  if (!ReadMatrix(*values, &best) || best.width != rows.width ||
      best.type != SumType(rows.type) ||
      winners->element_count() != values->element_count()) {
    return Invalid("values and winners must be [B, D], of the type of sums and int32");
  }
  Bags read;
  if (const char* wrong = ReadBags(ids, offsets, &coefficients, has_empty, empty,
                                   rows.type, best.rows, &read)) {
    return Invalid(wrong);
  }
  Launcher launcher;
  const BagsOnDevice bags(read, IsRagged(ids), IntegersOf(integers), &launcher);
  if (!HasRoom(*partials, rows, bags.max_pieces) ||
      SizeOf(integers) < bags.num_integers ||
      SizeOf(partial_winners) < bags.max_pieces * rows.width) {
    return Invalid(kScratch);
  }
  const Partials pieces{partials->untyped_data(), IntegersOf(partial_winners)};
  const Groups groups(rows, {best});
  const std::string types = std::string(NameOf(rows.type)) + ", " + groups.vector() +
                            ", " + NameOf(read.ids) + ", " +
                            (largest ? "true" : "false");
  if (bags.max_pieces > 0) {
    launcher.Launch(Instance("ExtremumOfPieces", types), groups.Blocks(bags.max_pieces),
                    groups.parts, kBlock, DenseOf(rows), bags.slots, pieces,
                    bags.max_pieces, groups.division);
  }
  launcher.Launch(Instance("ExtremumOfBags", types), groups.Blocks(read.num_bags),
                  groups.parts, kBlock, DenseOf(rows), bags.slots, pieces, best.data,
                  winners->untyped_data(), groups.division);
  return Ran(launcher, device);
}

ffi::Error BindSddmm(Device device, ffi::AnyBuffer table, ffi::AnyBuffer cotangent,
                     ffi::AnyBuffer ids, ffi::AnyBuffer offsets, bool has_empty,
                     int64_t empty, ffi::Result<ffi::AnyBuffer> out,
                     ffi::Result<ffi::AnyBuffer> integers) {
  Matrix rows;
  Matrix bag_rows;
  if (!ReadMatrix(table, &rows) || !ReadMatrix(cotangent, &bag_rows) ||
      rows.width != bag_rows.width || bag_rows.type != SumType(rows.type)) {
    return Invalid("table must be [V, D], cotangent [B, D] of the type of sums");
  }
  if (IsTooLarge(rows)) return Returned(kTooManyRows);
  Bags read;
  if (const char* wrong = ReadBags(ids, offsets, nullptr, has_empty, empty, rows.type,
                                   bag_rows.rows, &read)) {
    return Invalid(wrong);
  }
  if (out->element_type() != SumDataType(rows.type) ||
      static_cast<int64_t>(out->element_count()) != read.ids.size) {
    return Invalid("out must have the shape of ids and the type of sums");
  }
  Launcher launcher;
  const BagsOnDevice bags(read, IsRagged(ids), IntegersOf(integers), &launcher);
  if (SizeOf(integers) < bags.num_integers) return Invalid(kScratch);
  const Groups groups(rows, {bag_rows});
  launcher.Launch(
      Instance("Dots", NameOf(rows.type), groups.vector(), NameOf(read.ids)),
      groups.Blocks(CeilDiv(read.ids.size, kInFlight)), 1, kBlock, DenseOf(rows),
      bags.slots, bag_rows.data, out->untyped_data(), groups.division);
  return Ran(launcher, device);
}

}  // namespace

// The library hides all the rest.
#pragma GCC visibility push(default)
extern "C" {

JBAG_CUDA_HANDLERS(jbag_cuda_spmm, BindSpmm,
                   .Arg<ffi::AnyBuffer>()      // table
                       .Arg<ffi::AnyBuffer>()  // ids
                       .Arg<ffi::AnyBuffer>()  // offsets
                       .Arg<ffi::AnyBuffer>()  // coefficients
                       .Attr<bool>("has_empty")
                       .Attr<int64_t>("empty")
                       .Attr<std::string_view>("average")
                       .Ret<ffi::AnyBuffer>()    // out
                       .Ret<ffi::AnyBuffer>()    // integers
                       .Ret<ffi::AnyBuffer>());  // partials

JBAG_CUDA_HANDLERS(jbag_cuda_extremum, BindExtremum,
                   .Arg<ffi::AnyBuffer>()      // table
                       .Arg<ffi::AnyBuffer>()  // ids
                       .Arg<ffi::AnyBuffer>()  // offsets
                       .Arg<ffi::AnyBuffer>()  // coefficients
                       .Attr<bool>("has_empty")
                       .Attr<int64_t>("empty")
                       .Attr<bool>("largest")
                       .Ret<ffi::AnyBuffer>()           // values
                       .Ret<ffi::BufferR2<ffi::S32>>()  // winners
                       .Ret<ffi::AnyBuffer>()           // integers
                       .Ret<ffi::AnyBuffer>()           // partials
                       .Ret<ffi::AnyBuffer>());         // partial winners

JBAG_CUDA_HANDLERS(jbag_cuda_sddmm, BindSddmm,
                   .Arg<ffi::AnyBuffer>()      // table
                       .Arg<ffi::AnyBuffer>()  // cotangent
                       .Arg<ffi::AnyBuffer>()  // ids
                       .Arg<ffi::AnyBuffer>()  // offsets
                       .Attr<bool>("has_empty")
                       .Attr<int64_t>("empty")
                       .Ret<ffi::AnyBuffer>()    // out
                       .Ret<ffi::AnyBuffer>());  // integers

}  // extern "C"
#pragma GCC visibility pop

}  // namespace cuda
}  // namespace jbag
