// gather and scatter_ on CUDA: checks and registrations.
#include "gather_scatter.h"

#include "../units.h"
#include "host.h"

namespace sk::cuda {
namespace {

Tensor gather(const Tensor& source, const Tensor& positions, std::vector<int64_t> tile) {
  const int32_t device = device_of(source, "source");
  const Units units = units_of(source, tile);
  const Positions index = positions_of(positions, device, units.limit);
  const DeviceGuard guard(device);
  Tensor out = torch::stable::new_empty(source, {product(index.count, units.size())});
  const int64_t item = source.element_size();
  const char* error =
      launch_gather(source.const_data_ptr(), out.mutable_data_ptr(), index, units, item, current_stream(device));
  check_launch("gather", error);
  return out;
}

void scatter_(Tensor target, const Tensor& positions, const Tensor& values, std::vector<int64_t> tile) {
  const int32_t device = device_of(target, "target");
  const Units units = units_of(target, tile);
  const Positions index = positions_of(positions, device, units.limit);
  check_device(values, device, "values");
  STD_TORCH_CHECK(
      values.is_contiguous() && values.scalar_type() == target.scalar_type() &&
          values.numel() == product(index.count, units.size()),
      "values do not fit positions and target");
  const DeviceGuard guard(device);
  const int64_t item = target.element_size();
  const char* error =
      launch_scatter(target.mutable_data_ptr(), values.const_data_ptr(), index, units, item, current_stream(device));
  check_launch("scatter_", error);
}

}  // namespace
}  // namespace sk::cuda

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CUDA, m) {
  m.impl("gather", TORCH_BOX(&sk::cuda::gather));
  m.impl("scatter_", TORCH_BOX(&sk::cuda::scatter_));
}
