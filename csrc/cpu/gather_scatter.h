// Loops over positions [begin, end) of one tensor.
#pragma once
#include <cstdint>
#include <cstring>

#include "prefetch.h"

namespace sk::cpu {

// to[i] = from[index[i]], units of U.
template <typename U, typename I>
void gather_units(const U* __restrict__ from, const I* index, U* __restrict__ to, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) prefetch(from + index[i + kAhead]);
    to[i] = from[index[i]];
  }
}

// to[index[i]] = from[i], units of U.
template <typename U, typename I>
void scatter_units(const U* __restrict__ from, const I* index, U* __restrict__ to, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) prefetch(to + index[i + kAhead]);
    to[index[i]] = from[i];
  }
}

// Elements of any dtype move as integers of their size; rows as runs of bytes.
template <typename I>
void gather(const char* from, const I* index, char* to, int64_t bytes, int64_t begin, int64_t end) {
  switch (bytes) {
    case 1: return gather_units((const uint8_t*)from, index, (uint8_t*)to, begin, end);
    case 2: return gather_units((const uint16_t*)from, index, (uint16_t*)to, begin, end);
    case 4: return gather_units((const uint32_t*)from, index, (uint32_t*)to, begin, end);
    case 8: return gather_units((const uint64_t*)from, index, (uint64_t*)to, begin, end);
    default:
      for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * bytes, from + int64_t(index[i]) * bytes, bytes);
  }
}

template <typename I>
void scatter(const char* from, const I* index, char* to, int64_t bytes, int64_t begin, int64_t end) {
  switch (bytes) {
    case 1: return scatter_units((const uint8_t*)from, index, (uint8_t*)to, begin, end);
    case 2: return scatter_units((const uint16_t*)from, index, (uint16_t*)to, begin, end);
    case 4: return scatter_units((const uint32_t*)from, index, (uint32_t*)to, begin, end);
    case 8: return scatter_units((const uint64_t*)from, index, (uint64_t*)to, begin, end);
    default:
      for (int64_t i = begin; i < end; ++i) std::memcpy(to + int64_t(index[i]) * bytes, from + i * bytes, bytes);
  }
}

// to[index[i]] += from[i] for positions of `width` elements; the sum is formed in S and rounded once.
template <typename S, typename T, typename I>
void scatter_add(
    const S* __restrict__ from, const I* index, T* __restrict__ to, int64_t width, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* row = to + int64_t(index[i]) * width;
    if (width == 1 && i + kAhead < end) prefetch(to + index[i + kAhead]);
    for (int64_t j = 0; j < width; ++j) row[j] = T(S(row[j]) + from[i * width + j]);
  }
}

}  // namespace sk::cpu
