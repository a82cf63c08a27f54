// The operations on sorted slots as XLA FFI handlers: the keys to sort by and, over the
// sorted keys, the bag of each key's slot and its coefficient, sums and updates of
// rows. The last results are scratch.

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

ffi::Error BindSlotKeys(Device device, ffi::AnyBuffer ids, ffi::AnyBuffer offsets,
                        ffi::AnyBuffer num_rows, bool has_empty, int64_t empty,
                        ffi::Result<ffi::AnyBuffer> keys,
                        ffi::Result<ffi::AnyBuffer> slot_bags,
                        ffi::Result<ffi::AnyBuffer> integers) {
  const ffi::AnyBuffer& counted = IsRagged(ids) ? offsets : ids;
  if (counted.dimensions().size() == 0) return Invalid("offsets must be [B + 1]");
  const int64_t num_bags = counted.dimensions()[0] - (IsRagged(ids) ? 1 : 0);
  Bags read;
  if (const char* wrong = ReadBags(ids, offsets, nullptr, has_empty, empty,
                                   Type::kFloat32, num_bags, &read)) {
    return Invalid(wrong);
  }
  Launcher launcher;
  const BagsOnDevice bags(read, IsRagged(ids), IntegersOf(integers), &launcher);
  if (SizeOf(keys) < read.ids.size || SizeOf(slot_bags) < read.ids.size ||
      SizeOf(integers) < bags.num_integers) {
    return Invalid(kScratch);
  }
  launcher.Launch(Instance("SlotKeys", NameOf(read.ids)),
                  CeilDiv(read.ids.size, kBlock), 1, kBlock, bags.slots,
                  num_rows.untyped_data(), keys->untyped_data(),
                  slot_bags->untyped_data());
  return Ran(launcher, device);
}

// The segments of sorted slots, as bags. Scratch: bounds, counts of chunks and, unless
// the rows go elsewhere, the row of each segment.
struct Segments {
  Slots slots;
  Partials pieces;
  int64_t max_pieces;
  int* rows;
};

// Null, or what is wrong.
const char* ReadSegments(const Matrix& cotangent, const ffi::AnyBuffer& keys,
                         const ffi::AnyBuffer& bags, const ffi::AnyBuffer& coefficients,
                         const ffi::AnyBuffer& num_rows, int64_t capacity,
                         ffi::Result<ffi::AnyBuffer>& integers,
                         ffi::Result<ffi::AnyBuffer>& partials,
                         ffi::AnyBuffer* own_rows, Launcher* launcher, Segments* out) {
  const int64_t size = static_cast<int64_t>(keys.element_count());
  if (keys.element_type() != ffi::S32 || bags.element_type() != ffi::S32 ||
      num_rows.element_type() != ffi::S32 || num_rows.element_count() != 1 ||
      static_cast<int64_t>(bags.element_count()) != size || size > INT32_MAX) {
    return "keys and bags must be [N], and num_embeddings one number, int32";
  }
  if (coefficients.element_count() > 0 &&
      (coefficients.element_type() != SumDataType(cotangent.type) ||
       static_cast<int64_t>(coefficients.element_count()) != size)) {
    return "coefficients must be [N], of the type of sums";
  }
  const int64_t num_chunks = size > kChunk ? CeilDiv(size, kChunk) : 1;
  int* const starts = IntegersOf(integers);
  int* const counts = starts + capacity + 1;
  const int64_t before_rows = capacity + 1 + num_chunks + 1;
  out->max_pieces = MaxPieces(size, size);
  if (SizeOf(integers) < before_rows + (own_rows == nullptr ? capacity : 0) ||
      !HasRoom(*partials, cotangent, out->max_pieces)) {
    return kScratch;
  }
  out->rows = starts + before_rows;
  void* rows = out->rows;
  const char* row = "int";
  if (own_rows != nullptr) {
    rows = own_rows->untyped_data();
    if (own_rows->element_type() == ffi::S64) row = "long long";
  }
  const bool weighted = coefficients.element_count() > 0;
  out->slots = {bags.untyped_data(),
                starts,
                weighted ? coefficients.untyped_data() : nullptr,
                capacity,
                size,
                0,
                0,
                0,
                0};
  out->pieces = {partials->untyped_data(), nullptr};
  const void* const sorted = keys.untyped_data();
  const void* const count = num_rows.untyped_data();
  launcher->Launch("jbag::cuda::CountSegments", num_chunks, 1, 32, sorted, size, count,
                   counts);
  launcher->Launch("jbag::cuda::AccumulateCounts", 1, 1, 32, counts, num_chunks);
  launcher->Launch(Instance("WriteSegments", row), num_chunks, 1, 32, sorted, size,
                   count, counts, capacity, starts, rows);
  return nullptr;
}

// Sums the pieces of the rows that many slots name.
void LaunchPieces(const Segments& segments, const Matrix& cotangent,
                  const Groups& groups, Launcher* launcher) {
  if (segments.max_pieces == 0) return;
  launcher->Launch(
      Instance("SumPieces", NameOf(cotangent.type), groups.vector(), "int"),
      groups.Blocks(segments.max_pieces), groups.parts, kBlock, DenseOf(cotangent),
      segments.slots, segments.pieces, segments.max_pieces, groups.division);
}

void LaunchSums(const Segments& segments, const Matrix& cotangent, const int* rows,
                const Matrix& out, Launcher* launcher) {
  const Groups groups(cotangent, {out});
  LaunchPieces(segments, cotangent, groups, launcher);
  launcher->Launch(Instance("SumBags", NameOf(cotangent.type), groups.vector(), "int",
                            NameOf(out.type)),
                   groups.Blocks(segments.slots.num_bags), groups.parts, kBlock,
                   DenseOf(cotangent), segments.slots, segments.pieces, rows, out.data,
                   groups.division);
}

ffi::Error BindSpmmTranspose(Device device, ffi::AnyBuffer cotangent,
                             ffi::AnyBuffer keys, ffi::AnyBuffer bags,
                             ffi::AnyBuffer coefficients, ffi::AnyBuffer num_embeddings,
                             ffi::Result<ffi::AnyBuffer> out,
                             ffi::Result<ffi::AnyBuffer> integers,
                             ffi::Result<ffi::AnyBuffer> partials) {
  Matrix bag_rows;
  Matrix rows;
  if (!ReadMatrix(cotangent, &bag_rows) || !ReadMatrix(*out, &rows) ||
      rows.width != bag_rows.width || bag_rows.type != SumType(rows.type)) {
    return Invalid("cotangent must be [B, D] of the type of sums, out [V, D]");
  }
  if (IsTooLarge(rows)) return Returned(kTooManyRows);
  const int64_t size = static_cast<int64_t>(keys.element_count());
  Launcher launcher;
  Segments segments;
  if (const char* wrong =
          ReadSegments(bag_rows, keys, bags, coefficients, num_embeddings,
                       size < rows.rows ? size : rows.rows, integers, partials, nullptr,
                       &launcher, &segments)) {
    return Invalid(wrong);
  }
  launcher.Zero(rows.data, static_cast<int64_t>(out->size_bytes()));
  LaunchSums(segments, bag_rows, segments.rows, rows, &launcher);
  return Ran(launcher, device);
}

ffi::Error BindCoalesce(Device device, ffi::AnyBuffer cotangent, ffi::AnyBuffer keys,
                        ffi::AnyBuffer bags, ffi::AnyBuffer coefficients,
                        ffi::AnyBuffer num_embeddings,
                        ffi::Result<ffi::AnyBuffer> indices,
                        ffi::Result<ffi::AnyBuffer> sums,
                        ffi::Result<ffi::AnyBuffer> integers,
                        ffi::Result<ffi::AnyBuffer> partials) {
  Matrix bag_rows;
  Matrix rows;
  if (!ReadMatrix(cotangent, &bag_rows) || !ReadMatrix(*sums, &rows) ||
      rows.width != bag_rows.width || rows.type != bag_rows.type ||
      bag_rows.type != SumType(bag_rows.type)) {
    return Invalid("cotangent must be [B, D] of the type of sums, sums [U, D] like it");
  }
  Integers numbers;
  if (!ReadIntegers(*indices, &numbers) || numbers.size != rows.rows) {
    return Invalid("indices must be [U], int32 or int64");
  }
  ffi::AnyBuffer own_rows = *indices;
  Launcher launcher;
  Segments segments;
  if (const char* wrong =
          ReadSegments(bag_rows, keys, bags, coefficients, num_embeddings, rows.rows,
                       integers, partials, &own_rows, &launcher, &segments)) {
    return Invalid(wrong);
  }
  LaunchSums(segments, bag_rows, nullptr, rows, &launcher);
  return Ran(launcher, device);
}

// The name of a rule's struct in device/updates.cuh: of rowwise_adam, RowwiseAdam.
std::string StructOf(const RuleShape& rule) {
  std::string name = "jbag::cuda::";
  bool starts_word = true;
  for (const char* letter = rule.name; *letter != '\0'; ++letter) {
    const bool is_gap = *letter == '_';
    if (!is_gap) {
      name += static_cast<char>(starts_word ? *letter - 'a' + 'A' : *letter);
    }
    starts_word = is_gap;
  }
  return name;
}

bool SameShape(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b) {
  return a.element_type() == b.element_type() && a.dimensions() == b.dimensions();
}

ffi::Error BindUpdateRows(Device device, ffi::AnyBuffer table, ffi::AnyBuffer scalars,
                          ffi::AnyBuffer seed, ffi::AnyBuffer cotangent,
                          ffi::AnyBuffer keys, ffi::AnyBuffer bags,
                          ffi::AnyBuffer coefficients, ffi::AnyBuffer num_embeddings,
                          ffi::RemainingArgs states, std::string_view rule,
                          ffi::Result<ffi::AnyBuffer> moved_table,
                          ffi::Result<ffi::AnyBuffer> integers,
                          ffi::Result<ffi::AnyBuffer> partials,
                          ffi::RemainingRets moved_states) {
  Matrix rows;
  Matrix bag_rows;
  if (!ReadMatrix(*moved_table, &rows) || !ReadMatrix(cotangent, &bag_rows) ||
      !SameShape(table, *moved_table) || rows.width != bag_rows.width ||
      bag_rows.type != SumType(rows.type)) {
    return Invalid("table must be [V, D], cotangent [B, D] of the type of sums");
  }
  if (IsTooLarge(rows)) return Returned(kTooManyRows);
  const RuleShape* shape = nullptr;
  for (const RuleShape& known : kRules) {
    if (rule == known.name) shape = &known;
  }
  if (shape == nullptr) return Invalid("no rule has that name");
  if (scalars.element_type() != SumDataType(rows.type) ||
      static_cast<int64_t>(scalars.element_count()) != shape->numbers) {
    return Invalid("scalars must be those of the rule, of the type of sums");
  }
  const bool at_random = seed.element_count() > 0;
  if (at_random && (seed.element_type() != ffi::U32 || seed.element_count() != 2 ||
                    rows.type != Type::kBFloat16)) {
    return Invalid("seed must be uint32 [2], for a table in bfloat16");
  }
  const size_t num_states = static_cast<size_t>(shape->per_element + shape->per_row);
  if (states.size() != num_states || moved_states.size() != num_states) {
    return Invalid("states must be those of the rule");
  }
  Table on_device{rows.data,
                  {nullptr, nullptr},
                  scalars.untyped_data(),
                  static_cast<const uint32_t*>(seed.untyped_data())};
  Matrix per_element[2] = {rows, rows};
  // An output is where its operand is, unless XLA could not alias them.
  Launcher launcher;
  launcher.Copy(table.untyped_data(), rows.data,
                static_cast<int64_t>(table.size_bytes()));
  for (size_t i = 0; i < num_states; ++i) {
    const auto state = states.get<ffi::AnyBuffer>(i);
    auto moved = moved_states.get<ffi::AnyBuffer>(i);
    const int64_t width = static_cast<int>(i) < shape->per_element ? rows.width : 1;
    if (!state.has_value() || !moved.has_value() || !SameShape(*state, **moved) ||
        state->element_type() != SumDataType(rows.type) ||
        static_cast<int64_t>(state->element_count()) != rows.rows * width) {
      return Invalid("states must be [V, D] or [V], of the type of sums");
    }
    on_device.states[i] = (*moved)->untyped_data();
    if (width == rows.width) {
      per_element[i] = {on_device.states[i], bag_rows.type, rows.rows, rows.width};
    }
    launcher.Copy(state->untyped_data(), on_device.states[i],
                  static_cast<int64_t>(state->size_bytes()));
  }
  const int64_t size = static_cast<int64_t>(keys.element_count());
  Segments segments;
  if (const char* wrong =
          ReadSegments(bag_rows, keys, bags, coefficients, num_embeddings,
                       size < rows.rows ? size : rows.rows, integers, partials, nullptr,
                       &launcher, &segments)) {
    return Invalid(wrong);
  }
  const Groups groups(bag_rows, {rows, per_element[0], per_element[1]});
  LaunchPieces(segments, bag_rows, groups, &launcher);
  launcher.Launch(Instance("UpdateRows", NameOf(rows.type), groups.vector(),
                           StructOf(*shape), at_random ? "true" : "false"),
                  groups.Blocks(segments.slots.num_bags), 1, kBlock, DenseOf(bag_rows),
                  segments.slots, segments.pieces, segments.rows, on_device,
                  groups.division);
  return Ran(launcher, device);
}

}  // namespace

// The library hides all the rest.
#pragma GCC visibility push(default)
extern "C" {

JBAG_CUDA_HANDLERS(jbag_cuda_slot_keys, BindSlotKeys,
                   .Arg<ffi::AnyBuffer>()      // ids
                       .Arg<ffi::AnyBuffer>()  // offsets
                       .Arg<ffi::AnyBuffer>()  // num_embeddings
                       .Attr<bool>("has_empty")
                       .Attr<int64_t>("empty")
                       .Ret<ffi::AnyBuffer>()    // keys
                       .Ret<ffi::AnyBuffer>()    // bags
                       .Ret<ffi::AnyBuffer>());  // integers

JBAG_CUDA_HANDLERS(jbag_cuda_spmm_transpose, BindSpmmTranspose,
                   .Arg<ffi::AnyBuffer>()        // cotangent
                       .Arg<ffi::AnyBuffer>()    // keys
                       .Arg<ffi::AnyBuffer>()    // bags
                       .Arg<ffi::AnyBuffer>()    // coefficients
                       .Arg<ffi::AnyBuffer>()    // num_embeddings
                       .Ret<ffi::AnyBuffer>()    // out
                       .Ret<ffi::AnyBuffer>()    // integers
                       .Ret<ffi::AnyBuffer>());  // partials

JBAG_CUDA_HANDLERS(jbag_cuda_coalesce, BindCoalesce,
                   .Arg<ffi::AnyBuffer>()        // cotangent
                       .Arg<ffi::AnyBuffer>()    // keys
                       .Arg<ffi::AnyBuffer>()    // bags
                       .Arg<ffi::AnyBuffer>()    // coefficients
                       .Arg<ffi::AnyBuffer>()    // num_embeddings
                       .Ret<ffi::AnyBuffer>()    // indices
                       .Ret<ffi::AnyBuffer>()    // sums
                       .Ret<ffi::AnyBuffer>()    // integers
                       .Ret<ffi::AnyBuffer>());  // partials

JBAG_CUDA_HANDLERS(jbag_cuda_update_rows, BindUpdateRows,
                   .Arg<ffi::AnyBuffer>()      // table
                       .Arg<ffi::AnyBuffer>()  // scalars
                       .Arg<ffi::AnyBuffer>()  // seed, [0] for none
                       .Arg<ffi::AnyBuffer>()  // cotangent
                       .Arg<ffi::AnyBuffer>()  // keys
                       .Arg<ffi::AnyBuffer>()  // bags
                       .Arg<ffi::AnyBuffer>()  // coefficients
                       .Arg<ffi::AnyBuffer>()  // num_embeddings
                       .RemainingArgs()        // states
                       .Attr<std::string_view>("rule")
                       .Ret<ffi::AnyBuffer>()  // table
                       .Ret<ffi::AnyBuffer>()  // integers
                       .Ret<ffi::AnyBuffer>()  // partials
                       .RemainingRets());      // states

}  // extern "C"
#pragma GCC visibility pop

}  // namespace cuda
}  // namespace jbag
