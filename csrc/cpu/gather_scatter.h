// Loops over positions [begin, end) of one tensor.
#pragma once
#include <cstdint>
#include <cstring>

#include "prefetch.h"

namespace sk::cpu {

// Elements of any dtype move as integers of their size, which begin where an element does: a unit can be a row of some.
template <typename U>
struct Unit {
  typedef U type __attribute__((aligned(1), may_alias));
};

// to[i] = from[index[i]], units of U.
template <typename U, typename I>
void gather_units(const char* __restrict__ source, const I* index, char* __restrict__ out, int64_t begin, int64_t end) {
  const auto* from = (const typename Unit<U>::type*)source;
  auto* to = (typename Unit<U>::type*)out;
  int64_t i = begin;
  for (; i < end - kAhead; ++i) {
    prefetch(from + index[i + kAhead]);
    to[i] = from[index[i]];
  }
  for (; i < end; ++i) to[i] = from[index[i]];
}

// to[index[i]] = from[i], units of U.
template <typename U, typename I>
void scatter_units(
    const char* __restrict__ values, const I* index, char* __restrict__ target, int64_t begin, int64_t end) {
  const auto* from = (const typename Unit<U>::type*)values;
  auto* to = (typename Unit<U>::type*)target;
  int64_t i = begin;
  for (; i < end - kAhead; ++i) {
    prefetch(to + index[i + kAhead]);
    to[index[i]] = from[i];
  }
  for (; i < end; ++i) to[index[i]] = from[i];
}

// Longer rows move as runs of bytes.
template <typename I>
void gather(const char* from, const I* index, char* to, int64_t bytes, int64_t begin, int64_t end) {
  switch (bytes) {
    case 1: return gather_units<uint8_t>(from, index, to, begin, end);
    case 2: return gather_units<uint16_t>(from, index, to, begin, end);
    case 4: return gather_units<uint32_t>(from, index, to, begin, end);
    case 8: return gather_units<uint64_t>(from, index, to, begin, end);
    default:
      for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * bytes, from + int64_t(index[i]) * bytes, bytes);
  }
}

template <typename I>
void scatter(const char* from, const I* index, char* to, int64_t bytes, int64_t begin, int64_t end) {
  switch (bytes) {
    case 1: return scatter_units<uint8_t>(from, index, to, begin, end);
    case 2: return scatter_units<uint16_t>(from, index, to, begin, end);
    case 4: return scatter_units<uint32_t>(from, index, to, begin, end);
    case 8: return scatter_units<uint64_t>(from, index, to, begin, end);
    default:
      for (int64_t i = begin; i < end; ++i) std::memcpy(to + int64_t(index[i]) * bytes, from + i * bytes, bytes);
  }
}

}  // namespace sk::cpu
