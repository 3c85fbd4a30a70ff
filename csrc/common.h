// What every host file needs: names from torch's stable ABI, dispatch over dtypes, and the macro for portable SIMD.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>
#include <vector>

// One library for every x86-64 machine: the compiler makes three versions, the loader picks the best one that runs here.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define SK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SK_CLONES
#endif
// What such a function calls must become a part of it.
#define SK_INLINE inline __attribute__((always_inline))

namespace sk {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// fp64 is computed in fp64, everything else in fp32.
template <typename T>
using opmath_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr ScalarType scalar_type() {
  return std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
}

// Calls f with a zero of the C++ type of a floating dtype.
template <typename F>
void with_floating(ScalarType dtype, const char* op, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, op, " takes fp32, fp64, bf16 and fp16 only");
  }
}

// Calls f with a typed pointer to positions, int32 or int64.
template <typename F>
void with_positions(const Tensor& positions, const F& f) {
  STD_TORCH_CHECK(positions.dim() == 1 && positions.is_contiguous(), "positions must be contiguous, of one dimension");
  if (positions.scalar_type() == ScalarType::Int) {
    f(static_cast<const int32_t*>(positions.const_data_ptr()));
  } else {
    STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Long, "positions must be int32 or int64");
    f(static_cast<const int64_t*>(positions.const_data_ptr()));
  }
}

// Positions are sorted, so the first and the last one tell whether all stay inside.
template <typename I>
void check_bounds(const I* positions, int64_t count, int64_t limit) {
  STD_TORCH_CHECK(
      count == 0 || (positions[0] >= 0 && positions[count - 1] < limit), "positions out of range for a size of ", limit);
}

inline void check_same(const Tensor& a, const Tensor& b, const char* what) {
  STD_TORCH_CHECK(
      a.numel() == b.numel() && a.scalar_type() == b.scalar_type() && b.is_contiguous(),
      what, " does not fit: it must be contiguous and have the size and dtype of its parameter");
}

}  // namespace sk
