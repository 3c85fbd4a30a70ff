// gather and scatter_ on CUDA: checks and registrations.
#include "gather_scatter.h"

#include "host.h"

namespace sk::cuda {
namespace {

// How many positions a dense tensor has, and how many elements one stands for.
struct Layout {
  int64_t limit, width;
};

Layout layout_of(const Tensor& dense, bool rows) {
  STD_TORCH_CHECK(dense.is_contiguous(), "the dense tensor must be contiguous");
  if (!rows) return {dense.numel(), 1};
  STD_TORCH_CHECK(dense.dim() >= 1, "rows of a tensor without dimensions");
  return {dense.size(0), dense.size(0) == 0 ? 0 : dense.numel() / dense.size(0)};
}

Tensor gather(const Tensor& source, const Tensor& positions, bool rows) {
  const int32_t device = device_of(source, "source");
  const Layout layout = layout_of(source, rows);
  const Positions index = positions_of(positions, device, layout.limit);
  std::vector<int64_t> shape{index.count};
  if (rows) shape.insert(shape.end(), source.sizes().begin() + 1, source.sizes().end());
  const DeviceGuard guard(device);
  Tensor out = torch::stable::new_empty(source, shape);
  const int64_t bytes = layout.width * int64_t(source.element_size());
  const char* error =
      launch_gather(source.const_data_ptr(), out.mutable_data_ptr(), index, bytes, current_stream(device));
  check_launch("gather", error);
  return out;
}

void scatter_(Tensor target, const Tensor& positions, const Tensor& values, bool rows) {
  const int32_t device = device_of(target, "target");
  const Layout layout = layout_of(target, rows);
  const Positions index = positions_of(positions, device, layout.limit);
  check_device(values, device, "values");
  STD_TORCH_CHECK(
      values.is_contiguous() && values.scalar_type() == target.scalar_type() &&
          values.numel() == product(index.count, layout.width),
      "values do not fit positions and target");
  const DeviceGuard guard(device);
  const int64_t bytes = layout.width * int64_t(target.element_size());
  const char* error =
      launch_scatter(target.mutable_data_ptr(), values.const_data_ptr(), index, bytes, current_stream(device));
  check_launch("scatter_", error);
}

}  // namespace
}  // namespace sk::cuda

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CUDA, m) {
  m.impl("gather", TORCH_BOX(&sk::cuda::gather));
  m.impl("scatter_", TORCH_BOX(&sk::cuda::scatter_));
}
