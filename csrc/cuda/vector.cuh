// A few neighbours at a time: read and written whole where they may be, else one by one.
#pragma once
#include "device.cuh"

namespace sk::cuda {

template <typename P, int N>
struct alignas(sizeof(P) * N < 16 ? sizeof(P) * N : 16) Vector {
  P at[N];
};

// The first n of N; all of them at once if `whole`, which takes their alignment for granted.
template <int N, typename P>
__device__ __forceinline__ Vector<P, N> read(const P* from, int64_t n, bool whole) {
  if (whole) return *reinterpret_cast<const Vector<P, N>*>(from);
  Vector<P, N> vector{};
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < n) vector.at[j] = from[j];
  }
  return vector;
}

template <int N, typename P>
__device__ __forceinline__ void write(P* to, const Vector<P, N>& vector, int64_t n, bool whole) {
  if (whole) {
    *reinterpret_cast<Vector<P, N>*>(to) = vector;
    return;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < n) to[j] = vector.at[j];
  }
}

// The same wherever they lie; `together`: all of them, side by side and aligned, at at[0]. Where `some`, those of a
// negative place do not exist.
template <int N, bool some, typename W>
__device__ __forceinline__ Vector<W, N> read_at(const W* from, const Vector<int64_t, N>& at, int64_t n, bool together) {
  if (together) return read<N>(from + at.at[0], n, true);
  Vector<W, N> vector{};
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < n && (!some || at.at[j] >= 0)) vector.at[j] = from[at.at[j]];
  }
  return vector;
}

template <int N, bool some, typename W>
__device__ __forceinline__ void write_at(
    W* to, const Vector<int64_t, N>& at, const Vector<W, N>& vector, int64_t n, bool together) {
  if (together) return write<N>(to + at.at[0], vector, n, true);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < n && (!some || at.at[j] >= 0)) to[at.at[j]] = vector.at[j];
  }
}

}  // namespace sk::cuda
