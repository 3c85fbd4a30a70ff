// What kernels share: C++ types for dtypes, and a guard for positions.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "types.h"

namespace sk::cuda {

constexpr int kThreads = 256;

// A position out of range would write into foreign memory. It stops the kernel instead: the next call that looks for
// errors raises. The host cannot look without waiting for the device.
template <typename I>
__device__ __forceinline__ int64_t checked(I position, int64_t limit) {
  if (static_cast<uint64_t>(position) >= static_cast<uint64_t>(limit)) __trap();
  return position;
}

// Calls f with a value of the dtype, and with one of the dtype that it is computed in.
template <typename F>
const char* with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::fp32: return f(float{}, float{});
    case Dtype::fp64: return f(double{}, double{});
    case Dtype::bf16: return f(__nv_bfloat16{}, float{});
    case Dtype::fp16: return f(__half{}, float{});
  }
  return "unknown dtype";
}

// Calls f with a value of the positions' dtype.
template <typename F>
const char* with_positions(bool is_int64, const F& f) {
  return is_int64 ? f(int64_t{}) : f(int32_t{});
}

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace sk::cuda
