// What every host file needs: names from torch's stable ABI, dispatch over dtypes, and the macro for portable SIMD.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

// One library for every x86-64 machine: the compiler makes three versions, the loader picks the best one that runs
// here. Under a sanitizer one is enough, for it takes long to compile.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__)
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
using MaybeTensor = std::optional<Tensor>;

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

// A product of sizes: tensors without elements may have any.
inline int64_t product(int64_t a, int64_t b) {
  int64_t result;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &result), "sizes of ", a, " and ", b, " are too large");
  return result;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(i, first, last) for what [begin, end) holds of each tensor i, all of which lie on one axis, one after
// another: tensor i ends at ends[i].
template <typename F>
void for_stretches(const std::vector<int64_t>& ends, int64_t begin, int64_t end, const F& f) {
  size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
  for (; begin < end; begin = ends[i++]) {
    const int64_t start = i == 0 ? 0 : ends[i - 1];
    f(i, begin - start, std::min(end, ends[i]) - start);
  }
}

// A storage can be freed or shrunk under a tensor, which FSDP does to weights, and memory of others can begin anywhere.
// `span` elements of `item` bytes lie between the first and the last. Each call into torch costs a small op a fraction
// of a percent: what the caller knows is not asked for again.
inline void check_memory(
    const Tensor& x, const void* data, int64_t span, int64_t item, size_t alignment, const char* name) {
  if (span == 0) return;
  int64_t held = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &held));
  STD_TORCH_CHECK(
      (x.storage_offset() + span) * item <= held, name, " has no memory: its storage was freed or made smaller");
  STD_TORCH_CHECK(uintptr_t(data) % alignment == 0, name, " is not aligned: its memory must begin at a whole element");
}

// Where a contiguous tensor of T begins, to be read; to be changed.
template <typename T>
const T* data(const Tensor& x, const char* name) {
  const void* at = x.const_data_ptr();
  check_memory(x, at, x.numel(), sizeof(T), alignof(T), name);
  return static_cast<const T*>(at);
}
template <typename T>
T* mutable_data(const Tensor& x, const char* name) {
  void* at = x.mutable_data_ptr();
  check_memory(x, at, x.numel(), sizeof(T), alignof(T), name);
  return static_cast<T*>(at);
}

// The same of a matrix whose rows may lie apart.
template <typename T>
const T* rows_data(const Tensor& x, const char* name) {
  const void* at = x.const_data_ptr();
  const int64_t height = x.size(0), width = x.size(1);
  const int64_t span = height == 0 || width == 0 ? 0 : (height - 1) * x.stride(0) + width;
  check_memory(x, at, span, sizeof(T), alignof(T), name);
  return static_cast<const T*>(at);
}

// Parallel lists have one entry for each of `count` parameters; those that are optional may also be empty.
inline void check_lists(size_t count, std::initializer_list<size_t> needed, std::initializer_list<size_t> optional) {
  for (size_t size : needed) STD_TORCH_CHECK(size == count, "all lists must have one entry for each parameter");
  for (size_t size : optional) {
    STD_TORCH_CHECK(size == 0 || size == count, "optional lists must be empty or have one entry for each parameter");
  }
}

inline void check_same(const Tensor& a, const Tensor& b, const char* what) {
  STD_TORCH_CHECK(
      a.numel() == b.numel() && a.scalar_type() == b.scalar_type() && b.is_contiguous(), what,
      " does not fit: it must be contiguous and have the size and dtype of its parameter");
}

inline void check_activations(const Tensor& grad_output, const MaybeTensor& input) {
  STD_TORCH_CHECK(
      grad_output.dim() == 3 && grad_output.is_contiguous(),
      "grad_output must be contiguous, [samples, tokens, width]");
  STD_TORCH_CHECK(
      !input || (input->dim() == 3 && input->is_contiguous() && input->scalar_type() == grad_output.scalar_type() &&
                 input->size(0) == grad_output.size(0) && input->size(1) == grad_output.size(1)),
      "input must be contiguous, with the dtype, samples and tokens of grad_output");
}

}  // namespace sk
