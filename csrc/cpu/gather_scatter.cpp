// gather and scatter_: checks and CPU registrations.
#include "gather_scatter.h"

#include "../common.h"
#include "../units.h"
#include "positions.h"
#include "scratch.h"

namespace sk {
namespace {

constexpr int64_t kGrain = 1 << 14;  // bytes that are worth a thread

// Calls lines(positions, bytes, line, begin, end) for positions [begin, end) of each line, where a position is the
// number of a run of so many bytes in it; or blocks(positions, begin, end). In parallel.
//
// Elements and rows make one line. Columns make m: line i has one element of each, and a pitch of n elements.
template <typename I, typename Lines, typename Blocks>
void for_units(
    const Units& units, const I* index, int64_t count, int64_t item, const Lines& lines, const Blocks& blocks) {
  if (product(units.size(), item) == 0) return;
  const int64_t grain = kGrain / (units.size() * item + 1) + 1;
  if (units.one_run()) {
    const int64_t bytes = units.width * item;
    parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { lines(index, bytes, 0, begin, end); });
  } else if (!units.side_by_side()) {
    parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { blocks(index, begin, end); });
  } else if (count != 0) {
    const auto begins = scratch<int64_t>(count);
    for (int64_t k = 0; k < count; ++k) begins[k] = units.tile(index[k]).begin;
    parallel_for(0, units.m * count, kGrain / (item + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t line = i / count, first = i - line * count, last = std::min(count, first + end - i);
        lines(static_cast<const int64_t*>(begins.get()), item, line, first, last);
        i += last - first;
      }
    });
  }
}

Tensor gather(const Tensor& source, const Tensor& positions, std::vector<int64_t> tile) {
  const Units units = units_of(source, tile);
  const int64_t count = positions.numel(), item = source.element_size();
  Tensor out = torch::stable::new_empty(source, {product(count, units.size())});
  with_positions(positions, [&](const auto* index) {
    check_positions(index, count, units.limit);
    const auto* from = static_cast<const char*>(source.const_data_ptr());
    check_memory(source, from, source.numel(), item, 1, "source");
    auto* to = static_cast<char*>(out.mutable_data_ptr());
    for_units(
        units, index, count, item,
        [&](const auto* at, int64_t bytes, int64_t line, int64_t begin, int64_t end) {
          cpu::gather(from + line * units.n * item, at, to + line * count * item, bytes, begin, end);
        },
        [&](const auto* at, int64_t begin, int64_t end) { cpu::gather_blocks(from, at, to, units, item, begin, end); });
  });
  return out;
}

void scatter_(Tensor target, const Tensor& positions, const Tensor& values, std::vector<int64_t> tile) {
  const Units units = units_of(target, tile);
  const int64_t count = positions.numel(), item = target.element_size(), numel = product(count, units.size());
  STD_TORCH_CHECK(
      values.is_contiguous() && values.scalar_type() == target.scalar_type() && values.numel() == numel,
      "values do not fit positions and target");
  with_positions(positions, [&](const auto* index) {
    check_positions(index, count, units.limit);
    const auto* from = static_cast<const char*>(values.const_data_ptr());
    auto* to = static_cast<char*>(target.mutable_data_ptr());
    check_memory(values, from, numel, item, 1, "values");
    check_memory(target, to, target.numel(), item, 1, "target");
    check_apart({index, count * int64_t(sizeof(*index))}, {to, target.numel() * item}, "positions");
    for_units(
        units, index, count, item,
        [&](const auto* at, int64_t bytes, int64_t line, int64_t begin, int64_t end) {
          cpu::scatter(from + line * count * item, at, to + line * units.n * item, bytes, begin, end);
        },
        [&](const auto* at, int64_t begin, int64_t end) {
          cpu::scatter_blocks(from, at, to, units, item, begin, end);
        });
  });
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) {
  m.impl("gather", TORCH_BOX(&sk::gather));
  m.impl("scatter_", TORCH_BOX(&sk::scatter_));
}
