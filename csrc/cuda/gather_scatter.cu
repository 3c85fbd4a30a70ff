// gather and scatter_: one thread an element, or a vector of up to 16 bytes.
#include <algorithm>

#include "device.cuh"
#include "gather_scatter.h"

namespace sk::cuda {
namespace {

// Calls f(compact, dense) with the offsets of every element that this thread owns: threads of dimension x walk along a
// row, those of dimension y go from position to position.
template <typename I, typename F>
__device__ __forceinline__ void for_elements(const Positions& positions, int64_t width, const F& f) {
  const I* __restrict__ position = static_cast<const I*>(positions.data);
  const int64_t first = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  for (int64_t slot = first; slot < positions.count; slot += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = checked(position[slot], positions.limit) * width;
    const int64_t column = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
    for (int64_t i = column; i < width; i += int64_t(gridDim.y) * blockDim.x) f(slot * width + i, row + i);
  }
}

template <typename U, typename I>
__global__ void __launch_bounds__(kThreads)
    gather(const U* __restrict__ source, U* __restrict__ out, Positions positions, int64_t width) {
  for_elements<I>(positions, width, [&](int64_t compact, int64_t dense) { out[compact] = source[dense]; });
}

template <typename U, typename I>
__global__ void __launch_bounds__(kThreads)
    scatter(U* __restrict__ target, const U* __restrict__ values, Positions positions, int64_t width) {
  for_elements<I>(positions, width, [&](int64_t compact, int64_t dense) { target[dense] = values[compact]; });
}

// Threads and blocks for `count` rows of `width` units.
struct Shape {
  dim3 threads, blocks;
  Shape(int64_t count, int64_t width) {
    unsigned x = 1;
    while (x < width && x < kThreads) x *= 2;
    threads = dim3(x, kThreads / x);
    blocks = dim3(
        unsigned(std::min<int64_t>(divide_up(count, threads.y), 1 << 16)),
        unsigned(std::min<int64_t>(divide_up(width, x), 1 << 10)));
  }
};

// Calls f with an unsigned type: the widest that rows of `bytes` bytes and both arrays are made of.
template <typename F>
const char* with_unit(const void* a, const void* b, int64_t bytes, const F& f) {
  const auto fits = [&](int64_t size) { return bytes % size == 0 && is_aligned(a, size) && is_aligned(b, size); };
  if (fits(16)) return f(uint4{});
  if (fits(8)) return f(uint2{});
  if (fits(4)) return f(uint32_t{});
  if (fits(2)) return f(uint16_t{});
  return f(uint8_t{});
}

}  // namespace

const char* launch_gather(const void* source, void* out, const Positions& positions, int64_t bytes, void* stream) {
  if (positions.count == 0 || bytes == 0) return nullptr;
  return with_unit(source, out, bytes, [&](auto unit) {
    using U = decltype(unit);
    return with_positions(positions.is_int64, [&](auto index) {
      const int64_t width = bytes / sizeof(U);
      const Shape shape(positions.count, width);
      gather<U, decltype(index)><<<shape.blocks, shape.threads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const U*>(source), static_cast<U*>(out), positions, width);
      return launch_error();
    });
  });
}

const char* launch_scatter(void* target, const void* values, const Positions& positions, int64_t bytes, void* stream) {
  if (positions.count == 0 || bytes == 0) return nullptr;
  return with_unit(target, values, bytes, [&](auto unit) {
    using U = decltype(unit);
    return with_positions(positions.is_int64, [&](auto index) {
      const int64_t width = bytes / sizeof(U);
      const Shape shape(positions.count, width);
      scatter<U, decltype(index)><<<shape.blocks, shape.threads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<U*>(target), static_cast<const U*>(values), positions, width);
      return launch_error();
    });
  });
}

}  // namespace sk::cuda
