// gather, scatter_ and scatter_add_: checks and CPU registrations.
#include "cpu/gather_scatter.h"

#include "common.h"
#include "positions.h"

namespace sk {
namespace {

constexpr int64_t kGrain = 1 << 14;  // bytes, or elements, that are worth a thread

// Bytes that one position stands for; checks what would corrupt memory otherwise.
int64_t bytes_per_position(const Tensor& dense, bool rows) {
  STD_TORCH_CHECK(dense.is_contiguous(), "the dense tensor must be contiguous");
  if (!rows) return dense.element_size();
  STD_TORCH_CHECK(dense.dim() >= 1, "rows of a tensor without dimensions");
  return dense.size(0) == 0 ? 0 : dense.numel() / dense.size(0) * dense.element_size();
}

Tensor gather(const Tensor& source, const Tensor& positions, bool rows) {
  const int64_t bytes = bytes_per_position(source, rows);
  const int64_t count = positions.numel();
  std::vector<int64_t> shape{count};
  if (rows) shape.insert(shape.end(), source.sizes().begin() + 1, source.sizes().end());
  Tensor out = torch::stable::new_empty(source, shape);
  with_positions(positions, [&](const auto* index) {
    check_positions(index, count, rows ? source.size(0) : source.numel());
    const auto* from = data<char>(source, "source");
    auto* to = static_cast<char*>(out.mutable_data_ptr());
    if (bytes == 0) return;
    parallel_for(0, count, kGrain / (bytes + 1) + 1, [&](int64_t begin, int64_t end) {
      cpu::gather(from, index, to, bytes, begin, end);
    });
  });
  return out;
}

void scatter_(Tensor target, const Tensor& positions, const Tensor& values, bool rows) {
  const int64_t bytes = bytes_per_position(target, rows);
  const int64_t count = positions.numel();
  STD_TORCH_CHECK(
      values.is_contiguous() && values.scalar_type() == target.scalar_type() &&
          values.numel() * int64_t(values.element_size()) == product(count, bytes),
      "values do not fit positions and target");
  with_positions(positions, [&](const auto* index) {
    check_positions(index, count, rows ? target.size(0) : target.numel());
    check_apart(positions, target, "positions");
    const auto* from = data<char>(values, "values");
    auto* to = mutable_data<char>(target, "target");
    if (bytes == 0) return;
    parallel_for(0, count, kGrain / (bytes + 1) + 1, [&](int64_t begin, int64_t end) {
      cpu::scatter(from, index, to, bytes, begin, end);
    });
  });
}

void scatter_add_(Tensor target, const Tensor& positions, const Tensor& values, bool rows) {
  const int64_t count = positions.numel();
  const int64_t width = bytes_per_position(target, rows) / int64_t(target.element_size());
  with_floating(target.scalar_type(), "scatter_add_", [&](auto zero) {
    using scalar_t = decltype(zero);
    using sum_t = opmath_t<scalar_t>;
    STD_TORCH_CHECK(
        values.is_contiguous() && values.scalar_type() == scalar_type<sum_t>() &&
            values.numel() == product(count, width),
        "values do not fit positions and target");
    with_positions(positions, [&](const auto* index) {
      check_positions(index, count, rows ? target.size(0) : target.numel());
      check_apart(positions, target, "positions");
      const auto* from = data<sum_t>(values, "values");
      auto* to = mutable_data<scalar_t>(target, "target");
      parallel_for(0, count, kGrain / (width + 1) + 1, [&](int64_t begin, int64_t end) {
        cpu::scatter_add(from, index, to, width, begin, end);
      });
    });
  });
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) {
  m.impl("gather", TORCH_BOX(&sk::gather));
  m.impl("scatter_", TORCH_BOX(&sk::scatter_));
  m.impl("scatter_add_", TORCH_BOX(&sk::scatter_add_));
}
