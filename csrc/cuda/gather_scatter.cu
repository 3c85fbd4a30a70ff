// gather and scatter_: one thread an element, or a vector of up to 16 bytes.
#include <algorithm>
#include <type_traits>

#include "device.cuh"
#include "gather_scatter.h"

namespace sk::cuda {
namespace {

constexpr int64_t kRows = 4;  // rows of a unit for which a thread divides once

// How units are dealt to threads, so that neighbours read and write neighbours: elements and rows are runs, in both
// tensors alike; of columns, each row of the matrix has one element of each, and so has the compact tensor; of blocks,
// each row is a run.
enum class Form { runs, columns, blocks };

// Calls f(compact, dense, exists) with the offsets of every vector that this thread owns.
template <Form form, typename I, typename F>
__device__ __forceinline__ void for_vectors(const Positions& positions, const Units& units, const F& f) {
  const I* __restrict__ position = static_cast<const I*>(positions.data);
  if constexpr (form == Form::runs) {
    const int64_t first = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    for (int64_t slot = first; slot < positions.count; slot += int64_t(gridDim.x) * blockDim.y) {
      const int64_t row = checked(position[slot], units.limit) * units.width;
      const int64_t column = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
      for (int64_t i = column; i < units.width; i += int64_t(gridDim.y) * blockDim.x) {
        f(slot * units.width + i, row + i, true);
      }
    }
  } else if constexpr (form == Form::columns) {
    const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64_t slot = first; slot < positions.count; slot += int64_t(gridDim.x) * blockDim.x) {
      const int64_t begin = units.tile(checked(position[slot], units.limit)).begin + threadIdx.z;
      const int64_t top = int64_t(blockIdx.y) * blockDim.y + threadIdx.y, step = int64_t(gridDim.y) * blockDim.y;
      int64_t compact = (top * positions.count + slot) * units.width + threadIdx.z, dense = begin + top * units.n;
      for (int64_t row = top; row < units.height; row += step) {
        f(compact, dense, true);
        compact += step * positions.count * units.width;
        dense += step * units.n;
      }
    }
  } else {
    const int64_t first = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    for (int64_t slot = first; slot < positions.count; slot += int64_t(gridDim.x) * blockDim.y) {
      const auto tile = units.tile(checked(position[slot], units.limit));
      const int64_t top = int64_t(blockIdx.y) * blockDim.z + threadIdx.z;
      for (int64_t row = top; row < units.height; row += int64_t(gridDim.y) * blockDim.z) {
        for (int64_t column = threadIdx.x; column < units.width; column += blockDim.x) {
          const bool exists = row < tile.rows && column < tile.columns;
          f((slot * units.height + row) * units.width + column, tile.begin + row * units.n + column, exists);
        }
      }
    }
  }
}

template <Form form, typename U, typename I>
__global__ void __launch_bounds__(kThreads)
    gather(const U* __restrict__ dense, U* __restrict__ compact, Positions positions, Units units) {
  for_vectors<form, I>(
      positions, units, [&](int64_t to, int64_t from, bool exists) { compact[to] = exists ? dense[from] : U{}; });
}

template <Form form, typename U, typename I>
__global__ void __launch_bounds__(kThreads)
    scatter(U* __restrict__ dense, const U* __restrict__ compact, Positions positions, Units units) {
  for_vectors<form, I>(positions, units, [&](int64_t from, int64_t to, bool exists) {
    if (exists) dense[to] = compact[from];
  });
}

// The first power of two that reaches `size`, at most `most`.
unsigned power_of_two(int64_t size, unsigned most) {
  unsigned power = 1;
  while (power < size && power < most) power *= 2;
  return power;
}

// Threads and blocks for `count` units.
struct Shape {
  dim3 threads, blocks;
  Shape(Form form, int64_t count, const Units& units) {
    int64_t along, down;  // blocks that the units make, and that one makes
    if (form == Form::runs) {
      const unsigned x = power_of_two(units.width, kThreads);
      threads = dim3(x, kThreads / x);
      along = divide_up(count, threads.y), down = divide_up(units.width, x);
    } else if (form == Form::columns) {
      const unsigned z = unsigned(units.width);  // 1, but for elements that are not aligned
      const unsigned x = power_of_two(count, std::min(32u, kThreads / z));
      threads = dim3(x, kThreads / (x * z), z);
      along = divide_up(count, x), down = divide_up(units.height, kRows * threads.y);
    } else {
      const unsigned x = power_of_two(units.width, kThreads);
      const unsigned z = power_of_two(units.height, std::min(kThreads / x, 64u));  // no block has more than 64
      threads = dim3(x, kThreads / (x * z), z);
      along = divide_up(count, threads.y), down = divide_up(units.height, kRows * z);
    }
    blocks = dim3(unsigned(std::min<int64_t>(along, 1 << 16)), unsigned(std::min<int64_t>(down, 1 << 10)));
  }
};

// Calls f with an unsigned type, the widest that both arrays and the rows of units are made of; with units of these;
// and with the types of their form and positions.
template <typename F>
const char* with_types(
    const void* a, const void* b, const Positions& positions, const Units& units, int64_t item, const F& f) {
  const auto with_index = [&](auto unit, auto form) {
    Units vectors = units;
    vectors.n = units.n * item / int64_t(sizeof(unit));
    vectors.width = units.width * item / int64_t(sizeof(unit));
    return with_positions(positions.is_int64, [&](auto index) { return f(unit, form, index, vectors); });
  };
  const auto with_form = [&](auto unit) {
    if (units.one_run()) return with_index(unit, std::integral_constant<Form, Form::runs>{});
    if (units.side_by_side()) return with_index(unit, std::integral_constant<Form, Form::columns>{});
    return with_index(unit, std::integral_constant<Form, Form::blocks>{});
  };
  const auto fits = [&](int64_t size) {
    const bool whole = units.width * item % size == 0 && units.n * item % size == 0;
    return whole && is_aligned(a, size) && is_aligned(b, size);
  };
  if (fits(16)) return with_form(uint4{});
  if (fits(8)) return with_form(uint2{});
  if (fits(4)) return with_form(uint32_t{});
  if (fits(2)) return with_form(uint16_t{});
  return with_form(uint8_t{});
}

}  // namespace

const char* launch_gather(
    const void* dense, void* compact, const Positions& positions, const Units& units, int64_t item, void* stream) {
  if (positions.count == 0 || units.size() == 0) return nullptr;
  return with_types(
      dense, compact, positions, units, item, [&](auto unit, auto form, auto index, const Units& vectors) {
        using U = decltype(unit);
        const Shape shape(form, positions.count, vectors);
        gather<decltype(form)::value, U, decltype(index)>
            <<<shape.blocks, shape.threads, 0, static_cast<cudaStream_t>(stream)>>>(
                static_cast<const U*>(dense), static_cast<U*>(compact), positions, vectors);
        return launch_error();
      });
}

const char* launch_scatter(
    void* dense, const void* compact, const Positions& positions, const Units& units, int64_t item, void* stream) {
  if (positions.count == 0 || units.size() == 0) return nullptr;
  return with_types(
      dense, compact, positions, units, item, [&](auto unit, auto form, auto index, const Units& vectors) {
        using U = decltype(unit);
        const Shape shape(form, positions.count, vectors);
        scatter<decltype(form)::value, U, decltype(index)>
            <<<shape.blocks, shape.threads, 0, static_cast<cudaStream_t>(stream)>>>(
                static_cast<U*>(dense), static_cast<const U*>(compact), positions, vectors);
        return launch_error();
      });
}

}  // namespace sk::cuda
