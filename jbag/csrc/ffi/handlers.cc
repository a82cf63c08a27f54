// The kernels as XLA FFI handlers.
//
// Operands: the dense arrays, ids [N] or [B, L], offsets [B + 1] ([0] with ids [B, L])
// and, where the operation takes them, coefficients of the shape of ids ([0]: ones).

#include <stdint.h>
#include <string.h>

#include <string_view>

#include "ffi/buffers.h"
#include "kernels/kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jbag {
namespace {

ffi::Error BindSpmm(ffi::ThreadPool threads, ffi::AnyBuffer table, ffi::AnyBuffer ids,
                    ffi::AnyBuffer offsets, ffi::AnyBuffer coefficients, bool has_empty,
                    int64_t empty, std::string_view average,
                    ffi::Result<ffi::AnyBuffer> out) {
  XlaPool pool(threads);
  Matrix rows;
  Matrix sums;
  Average kind;
  if (!ReadMatrix(table, &rows)) return Invalid("table must be [V, D], floating");
  if (!ReadMatrix(*out, &sums) || sums.width != rows.width ||
      (sums.type != rows.type && sums.type != SumType(rows.type))) {
    return Invalid("out must be [B, D] of the table's type or that of sums");
  }
  if (!ReadAverage(average, &kind)) {
    return Invalid("average must be none, mean or sqrtn");
  }
  Bags bags;
  if (const char* wrong = ReadBags(ids, offsets, &coefficients, has_empty, empty,
                                   rows.type, sums.rows, &bags)) {
    return Invalid(wrong);
  }
  return Returned(Spmm(BestLoops(), pool, rows, bags, kind, sums));
}

ffi::Error BindSpmmTranspose(ffi::ThreadPool threads, ffi::AnyBuffer cotangent,
                             ffi::AnyBuffer ids, ffi::AnyBuffer offsets,
                             ffi::AnyBuffer coefficients, bool has_empty, int64_t empty,
                             ffi::Result<ffi::AnyBuffer> out) {
  XlaPool pool(threads);
  Matrix bag_rows;
  Matrix rows;
  if (!ReadMatrix(cotangent, &bag_rows) || !ReadMatrix(*out, &rows) ||
      rows.width != bag_rows.width || bag_rows.type != SumType(rows.type)) {
    return Invalid("cotangent must be [B, D] of the type of sums, out [V, D]");
  }
  Bags bags;
  if (const char* wrong = ReadBags(ids, offsets, &coefficients, has_empty, empty,
                                   rows.type, bag_rows.rows, &bags)) {
    return Invalid(wrong);
  }
  return Returned(SpmmTranspose(BestLoops(), pool, bag_rows, bags, rows));
}

ffi::Error BindSddmm(ffi::ThreadPool threads, ffi::AnyBuffer table,
                     ffi::AnyBuffer cotangent, ffi::AnyBuffer ids,
                     ffi::AnyBuffer offsets, bool has_empty, int64_t empty,
                     ffi::Result<ffi::AnyBuffer> out) {
  XlaPool pool(threads);
  Matrix rows;
  Matrix bag_rows;
  if (!ReadMatrix(table, &rows) || !ReadMatrix(cotangent, &bag_rows) ||
      rows.width != bag_rows.width || bag_rows.type != SumType(rows.type)) {
    return Invalid("table must be [V, D], cotangent [B, D] of the type of sums");
  }
  Bags bags;
  if (const char* wrong = ReadBags(ids, offsets, nullptr, has_empty, empty, rows.type,
                                   bag_rows.rows, &bags)) {
    return Invalid(wrong);
  }
  if (out->element_type() != SumDataType(rows.type) ||
      static_cast<int64_t>(out->element_count()) != bags.ids.size) {
    return Invalid("out must have the shape of ids and the type of sums");
  }
  return Returned(Sddmm(BestLoops(), pool, rows, bag_rows, bags, out->untyped_data()));
}

ffi::Error BindExtremum(ffi::ThreadPool threads, ffi::AnyBuffer table,
                        ffi::AnyBuffer ids, ffi::AnyBuffer offsets,
                        ffi::AnyBuffer coefficients, bool has_empty, int64_t empty,
                        bool largest, ffi::Result<ffi::AnyBuffer> values,
                        ffi::Result<ffi::BufferR2<ffi::S32>> winners) {
  XlaPool pool(threads);
  Matrix rows;
  Matrix best;
  if (!ReadMatrix(table, &rows)) return Invalid("table must be [V, D], floating");
  if (!ReadMatrix(*values, &best) || best.width != rows.width ||
      best.type != SumType(rows.type) ||
      winners->element_count() != values->element_count()) {
    return Invalid("values and winners must be [B, D], of the type of sums and int32");
  }
  Bags bags;
  if (const char* wrong = ReadBags(ids, offsets, &coefficients, has_empty, empty,
                                   rows.type, best.rows, &bags)) {
    return Invalid(wrong);
  }
  return Returned(Extremum(BestLoops(), pool, rows, bags, largest, best.data,
                           winners->typed_data()));
}

ffi::Error BindCoalesce(ffi::ThreadPool threads, ffi::AnyBuffer cotangent,
                        ffi::AnyBuffer ids, ffi::AnyBuffer offsets,
                        ffi::AnyBuffer coefficients, bool has_empty, int64_t empty,
                        ffi::AnyBuffer num_embeddings,
                        ffi::Result<ffi::AnyBuffer> indices,
                        ffi::Result<ffi::AnyBuffer> sums) {
  XlaPool pool(threads);
  Matrix bag_rows;
  Matrix rows;
  Integers num_rows;
  if (!ReadMatrix(cotangent, &bag_rows) || !ReadMatrix(*sums, &rows) ||
      rows.width != bag_rows.width || rows.type != bag_rows.type ||
      bag_rows.type != SumType(bag_rows.type)) {
    return Invalid("cotangent must be [B, D] of the type of sums, sums [U, D] like it");
  }
  if (indices->element_type() != ids.element_type() ||
      static_cast<int64_t>(indices->element_count()) != rows.rows) {
    return Invalid("indices must be [U] of the type of ids");
  }
  if (!ReadIntegers(num_embeddings, &num_rows) || num_rows.size != 1 ||
      num_rows[0] < 0) {
    return Invalid("num_embeddings must be one integer, not negative");
  }
  Bags bags;
  if (const char* wrong = ReadBags(ids, offsets, &coefficients, has_empty, empty,
                                   bag_rows.type, bag_rows.rows, &bags)) {
    return Invalid(wrong);
  }
  return Returned(Coalesce(BestLoops(), pool, bag_rows, bags, num_rows[0],
                           indices->untyped_data(), rows));
}

// What an operand becomes is where it was, unless XLA had no leave to write there.
void CopyUnlessSame(const ffi::AnyBuffer& from, const ffi::AnyBuffer& to) {
  if (from.untyped_data() == to.untyped_data() || to.size_bytes() == 0) return;
  memcpy(to.untyped_data(), from.untyped_data(), to.size_bytes());
}

bool SameShape(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b) {
  return a.element_type() == b.element_type() && a.dimensions() == b.dimensions();
}

ffi::Error BindUpdateRows(ffi::ThreadPool threads, ffi::AnyBuffer table,
                          ffi::AnyBuffer scalars, ffi::AnyBuffer seed,
                          ffi::AnyBuffer cotangent, ffi::AnyBuffer ids,
                          ffi::AnyBuffer offsets, ffi::AnyBuffer coefficients,
                          ffi::RemainingArgs states, std::string_view rule,
                          bool has_empty, int64_t empty,
                          ffi::Result<ffi::AnyBuffer> moved_table,
                          ffi::RemainingRets moved_states) {
  XlaPool pool(threads);
  Matrix rows;
  Matrix bag_rows;
  if (!ReadMatrix(*moved_table, &rows) || !ReadMatrix(cotangent, &bag_rows) ||
      !SameShape(table, *moved_table) || rows.width != bag_rows.width ||
      bag_rows.type != SumType(rows.type)) {
    return Invalid("table must be [V, D], cotangent [B, D] of the type of sums");
  }
  constexpr std::string_view kChecked = "checked_";
  bool has_steps = rule.substr(0, kChecked.size()) == kChecked;
  if (has_steps) rule.remove_prefix(kChecked.size());
  const RuleShape* shape = nullptr;
  for (const RuleShape& known : kRules) {
    if (rule == known.name) shape = &known;
  }
  if (shape == nullptr || (has_steps && shape->catches_up)) {
    return Invalid("no rule has that name");
  }
  has_steps = has_steps || shape->catches_up;
  Update update{shape->rule, scalars.untyped_data(), {nullptr, nullptr}, nullptr};
  int64_t numbers = static_cast<int64_t>(scalars.element_count());
  if (scalars.element_type() != SumDataType(rows.type) || (has_steps && numbers < 1)) {
    return Invalid("scalars must be those of the rule, of the type of sums");
  }
  if (has_steps) {  // the first is their number
    const bool is_double = rows.type == Type::kFloat64;
    const double count = is_double ? *static_cast<const double*>(update.numbers)
                                   : *static_cast<const float*>(update.numbers);
    if (!(count >= 0 && count < kStepPeriod)) {
      return Invalid("the number of steps must be in [0, 2^24)");
    }
    update.count = static_cast<int32_t>(count);
    update.numbers = static_cast<const char*>(update.numbers) + (is_double ? 8 : 4);
    --numbers;
  }
  if (shape->catches_up) {
    update.columns = numbers / shape->numbers;
    const bool is_power = (update.columns & (update.columns - 1)) == 0;
    if (update.columns == 0 || !is_power) {
      return Invalid("what rows have missed must be [H, R], R a power of two");
    }
    numbers -= (update.columns - 1) * shape->numbers;
  }
  if (numbers != shape->numbers) {
    return Invalid("scalars must be those of the rule, of the type of sums");
  }
  if (seed.element_count() > 0) {
    if (seed.element_type() != ffi::U32 || seed.element_count() != 2 ||
        rows.type != Type::kBFloat16) {
      return Invalid("seed must be uint32 [2], for a table in bfloat16");
    }
    update.seed = static_cast<const uint32_t*>(seed.untyped_data());
  }
  Bags bags;
  if (const char* wrong = ReadBags(ids, offsets, &coefficients, has_empty, empty,
                                   rows.type, bag_rows.rows, &bags)) {
    return Invalid(wrong);
  }
  const size_t num_states = static_cast<size_t>(shape->per_element + shape->per_row);
  const size_t num_buffers = num_states + (has_steps ? 1 : 0);
  if (states.size() != num_buffers || moved_states.size() != num_buffers) {
    return Invalid("states must be those of the rule");
  }
  CopyUnlessSame(table, *moved_table);
  for (size_t i = 0; i < num_buffers; ++i) {
    const auto state = states.get<ffi::AnyBuffer>(i);
    auto moved = moved_states.get<ffi::AnyBuffer>(i);
    const int64_t width = static_cast<int>(i) < shape->per_element ? rows.width : 1;
    const bool is_steps = i == num_states;
    const ffi::DataType type = is_steps ? ffi::S32 : SumDataType(rows.type);
    if (!state.has_value() || !moved.has_value() || !SameShape(*state, **moved) ||
        state->element_type() != type ||
        static_cast<int64_t>(state->element_count()) != rows.rows * width) {
      return Invalid("states must be [V, D] or [V], of the type of sums; steps int32");
    }
    CopyUnlessSame(*state, **moved);
    if (is_steps) {
      update.steps = static_cast<int32_t*>((*moved)->untyped_data());
    } else {
      update.states[i] = (*moved)->untyped_data();
    }
  }
  return Returned(UpdateRows(BestLoops(), pool, rows, update, bag_rows, bags));
}

ffi::Error BindToHugePages(ffi::ThreadPool threads, ffi::AnyBuffer from,
                           ffi::Result<ffi::AnyBuffer> to) {
  XlaPool pool(threads);
  if (from.size_bytes() != to->size_bytes()) return Invalid("sizes must be equal");
  CopyToHugePages(pool, from.untyped_data(), to->untyped_data(),
                  static_cast<int64_t>(from.size_bytes()));
  return ffi::Error::Success();
}

}  // namespace

// The library hides all the rest.
#pragma GCC visibility push(default)
extern "C" {

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_spmm, BindSpmm,
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_spmm_transpose, BindSpmmTranspose,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // cotangent
                                  .Arg<ffi::AnyBuffer>()  // ids
                                  .Arg<ffi::AnyBuffer>()  // offsets
                                  .Arg<ffi::AnyBuffer>()  // coefficients
                                  .Attr<bool>("has_empty")
                                  .Attr<int64_t>("empty")
                                  .Ret<ffi::AnyBuffer>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_sddmm, BindSddmm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // table
                                  .Arg<ffi::AnyBuffer>()  // cotangent
                                  .Arg<ffi::AnyBuffer>()  // ids
                                  .Arg<ffi::AnyBuffer>()  // offsets
                                  .Attr<bool>("has_empty")
                                  .Attr<int64_t>("empty")
                                  .Ret<ffi::AnyBuffer>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_extremum, BindExtremum,
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_coalesce, BindCoalesce,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // cotangent
                                  .Arg<ffi::AnyBuffer>()  // ids
                                  .Arg<ffi::AnyBuffer>()  // offsets
                                  .Arg<ffi::AnyBuffer>()  // coefficients
                                  .Attr<bool>("has_empty")
                                  .Attr<int64_t>("empty")
                                  .Arg<ffi::AnyBuffer>()    // num_embeddings
                                  .Ret<ffi::AnyBuffer>()    // indices
                                  .Ret<ffi::AnyBuffer>());  // sums

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_update_rows, BindUpdateRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // table
                                  .Arg<ffi::AnyBuffer>()  // scalars
                                  .Arg<ffi::AnyBuffer>()  // seed, [0] for none
                                  .Arg<ffi::AnyBuffer>()  // cotangent
                                  .Arg<ffi::AnyBuffer>()  // ids
                                  .Arg<ffi::AnyBuffer>()  // offsets
                                  .Arg<ffi::AnyBuffer>()  // coefficients
                                  .RemainingArgs()        // states
                                  .Attr<std::string_view>("rule")
                                  .Attr<bool>("has_empty")
                                  .Attr<int64_t>("empty")
                                  .Ret<ffi::AnyBuffer>()  // table
                                  .RemainingRets());      // states

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbag_cpu_to_huge_pages, BindToHugePages,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()    // from
                                  .Ret<ffi::AnyBuffer>());  // to

}  // extern "C"
#pragma GCC visibility pop

}  // namespace jbag
