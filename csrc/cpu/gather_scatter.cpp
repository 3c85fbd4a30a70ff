// gather and scatter_: checks and CPU registrations.
#include "gather_scatter.h"

#include "../common.h"
#include "positions.h"

namespace sk {
namespace {

constexpr int64_t kGrain = 1 << 14;  // bytes that are worth a thread

// How many positions a dense tensor has, and how many elements, of how many bytes, one stands for.
struct Layout {
  int64_t limit, width, item;

  Layout(const Tensor& dense, bool rows) : limit(dense.numel()), width(1), item(dense.element_size()) {
    STD_TORCH_CHECK(dense.is_contiguous(), "the dense tensor must be contiguous");
    if (!rows) return;
    STD_TORCH_CHECK(dense.dim() >= 1, "rows of a tensor without dimensions");
    const int64_t numel = limit;
    limit = dense.size(0);
    width = limit == 0 ? 0 : numel / limit;
  }
  int64_t bytes() const { return width * item; }  // that one position stands for
  int64_t numel() const { return limit * width; }
};

Tensor gather(const Tensor& source, const Tensor& positions, bool rows) {
  const Layout layout(source, rows);
  const int64_t bytes = layout.bytes();
  const int64_t count = positions.numel();
  std::vector<int64_t> shape{count};
  if (rows) shape.insert(shape.end(), source.sizes().begin() + 1, source.sizes().end());
  Tensor out = torch::stable::new_empty(source, shape);
  with_positions(positions, [&](const auto* index) {
    check_positions(index, count, layout.limit);
    const auto* from = static_cast<const char*>(source.const_data_ptr());
    check_memory(source, from, layout.numel(), layout.item, 1, "source");
    auto* to = static_cast<char*>(out.mutable_data_ptr());
    if (bytes == 0) return;
    parallel_for(0, count, kGrain / (bytes + 1) + 1, [&](int64_t begin, int64_t end) {
      cpu::gather(from, index, to, bytes, begin, end);
    });
  });
  return out;
}

void scatter_(Tensor target, const Tensor& positions, const Tensor& values, bool rows) {
  const Layout layout(target, rows);
  const int64_t bytes = layout.bytes(), count = positions.numel(), numel = product(count, layout.width);
  STD_TORCH_CHECK(
      values.is_contiguous() && values.scalar_type() == target.scalar_type() && values.numel() == numel,
      "values do not fit positions and target");
  with_positions(positions, [&](const auto* index) {
    check_positions(index, count, layout.limit);
    const auto* from = static_cast<const char*>(values.const_data_ptr());
    auto* to = static_cast<char*>(target.mutable_data_ptr());
    check_memory(values, from, numel, layout.item, 1, "values");
    check_memory(target, to, layout.numel(), layout.item, 1, "target");
    check_apart({index, count * int64_t(sizeof(*index))}, {to, layout.numel() * layout.item}, "positions");
    if (bytes == 0) return;
    parallel_for(0, count, kGrain / (bytes + 1) + 1, [&](int64_t begin, int64_t end) {
      cpu::scatter(from, index, to, bytes, begin, end);
    });
  });
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) {
  m.impl("gather", TORCH_BOX(&sk::gather));
  m.impl("scatter_", TORCH_BOX(&sk::scatter_));
}
