// Loops over positions [begin, end) of one tensor.
#pragma once
#include <cstdint>
#include <cstring>

#include "../rules/units.h"
#include "prefetch.h"

namespace sk::cpu {

// Elements of any dtype move as integers of their size, which begin where an element does: a row can be one of some.
template <typename U>
struct Unaligned {
  typedef U type __attribute__((aligned(1), may_alias));
};

// to[i] = from[index[i]], units of U.
template <typename U, typename I>
void gather_units(const char* __restrict__ source, const I* index, char* __restrict__ out, int64_t begin, int64_t end) {
  const auto* from = (const typename Unaligned<U>::type*)source;
  auto* to = (typename Unaligned<U>::type*)out;
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
  const auto* from = (const typename Unaligned<U>::type*)values;
  auto* to = (typename Unaligned<U>::type*)target;
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

// Blocks [begin, end): the rows of one lie apart in the dense tensor. What is cut off is zero in the compact one.
template <typename I>
void gather_blocks(
    const char* from, const I* index, char* to, const Units& units, int64_t item, int64_t begin, int64_t end) {
  const int64_t width = units.width * item;
  for (int64_t k = begin; k < end; ++k) {
    const auto tile = units.tile(index[k]);
    char* block = to + k * units.height * width;
    for (int64_t r = 0; r < units.height; ++r, block += width) {
      const int64_t bytes = r < tile.rows ? tile.columns * item : 0;
      if (bytes != 0) std::memcpy(block, from + (tile.begin + r * units.n) * item, bytes);
      if (bytes != width) std::memset(block + bytes, 0, width - bytes);
    }
  }
}

template <typename I>
void scatter_blocks(
    const char* from, const I* index, char* to, const Units& units, int64_t item, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    const auto tile = units.tile(index[k]);
    const char* block = from + k * units.size() * item;
    for (int64_t r = 0; r < tile.rows; ++r) {
      std::memcpy(to + (tile.begin + r * units.n) * item, block + r * units.width * item, tile.columns * item);
    }
  }
}

}  // namespace sk::cpu
