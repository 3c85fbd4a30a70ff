// What launchers are told about tensors. Free of torch: nvcc compiles it too.
#pragma once
#include <cstdint>

namespace sk::cuda {

enum class Dtype { fp32, fp64, bf16, fp16 };

// The entries of an Index on the device. They are sorted and unique, so no two threads ever write one address.
struct Positions {
  const void* data;  // [count]
  bool is_int64;         // int64, else int32
  int64_t count;
  int64_t limit;  // every position is below this
};

}  // namespace sk::cuda
