// What the bindings share: checks of devices, the current stream, and errors of launches.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common.h"
#include "types.h"

namespace sk::cuda {

using torch::stable::accelerator::DeviceGuard;

inline void check_device(const Tensor& tensor, int32_t device, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name, " must be on CUDA device ", device);
  check_memory(tensor, tensor.const_data_ptr(), tensor.numel(), tensor.element_size(), 1, name);
}

inline int32_t device_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a CUDA device");
  return tensor.get_device_index();
}

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

inline void check_launch(const char* name, const char* error) {
  STD_TORCH_CHECK(error == nullptr, name, " could not be launched: ", error);
}

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::fp32;
    case ScalarType::Double: return Dtype::fp64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::fp16;
    default: STD_TORCH_CHECK(false, "expected fp32, fp64, bf16 or fp16");
  }
}

// fp64 is computed in fp64, everything else in fp32.
inline ScalarType computed_in(Dtype dtype) { return dtype == Dtype::fp64 ? ScalarType::Double : ScalarType::Float; }

inline Positions positions_of(const Tensor& positions, int32_t device, int64_t limit) {
  check_device(positions, device, "positions");
  STD_TORCH_CHECK(positions.dim() == 1 && positions.is_contiguous(), "positions must be contiguous, of one dimension");
  const bool is_int64 = positions.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(is_int64 || positions.scalar_type() == ScalarType::Int, "positions must be int32 or int64");
  return {positions.const_data_ptr(), is_int64, positions.numel(), limit};
}

}  // namespace sk::cuda
