// Radix select over runs of scores: histograms of one digit at a time, then one pass that collects.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common.h"

namespace sk::cpu {

// Floating-point numbers as unsigned integers of the same order: negative numbers with all bits inverted, positive ones
// with the sign bit set; -0 becomes +0 first.
template <int bytes>
using Key = std::conditional_t<bytes == 2, uint16_t, std::conditional_t<bytes == 4, uint32_t, uint64_t>>;
template <typename K>
SK_INLINE K radix_key(K bits, bool magnitude) {
  constexpr K sign = K(K(1) << (8 * sizeof(K) - 1));
  const K absolute = K(bits & K(~sign));
  if (magnitude) return absolute;
  if (absolute == 0) return sign;
  return bits & sign ? K(~bits) : K(bits | sign);
}

constexpr int64_t kSkip = 16;  // entries that are passed over together when none of them matters

template <typename K>
constexpr K infinity_bits(bool bfloat16) {
  if constexpr (sizeof(K) == 8) return K(0x7ff0000000000000);
  if constexpr (sizeof(K) == 4) return K(0x7f800000);
  return bfloat16 ? K(0x7f80) : K(0x7c00);
}

// Whether any of n scores is NaN.
template <typename K>
SK_CLONES bool has_nan(const K* bits, int64_t n, K infinity) {
  constexpr K sign = K(K(1) << (8 * sizeof(K) - 1));
  bool found = false;
  for (int64_t i = 0; i < n; ++i) found |= K(bits[i] & K(~sign)) > infinity;
  return found;
}

// Digits of few bits make short histograms, which is what a few scores cost; wide digits make few passes.
constexpr int digit_bits(int64_t scores) { return scores < (1 << 18) ? 8 : 16; }

// counts[digit] += 1 for every score whose key, above the digit, is `prefix`. The first digit has nothing above it.
template <typename K>
SK_CLONES void histogram(const K* bits, int64_t n, bool magnitude, int shift, int digit, K prefix, int64_t* counts) {
  const bool first = shift + digit == int(8 * sizeof(K));
  const K low = K((uint64_t(1) << digit) - 1);
  for (int64_t i = 0; i < n; i += kSkip) {
    const int64_t end = std::min(i + kSkip, n);
    if (!first) {
      bool any = false;
      for (int64_t j = i; j < end; ++j) any |= K(radix_key(bits[j], magnitude) >> shift >> digit) == prefix;
      if (!any) continue;
    }
    for (int64_t j = i; j < end; ++j) {
      const K key = radix_key(bits[j], magnitude);
      if (first || K(key >> shift >> digit) == prefix) ++counts[(key >> shift) & low];
    }
  }
}

struct Found {
  int64_t begin;                        // where the run starts, to put the parts in order
  std::vector<int64_t> above, ties;     // offsets of keys above the threshold, and equal to it
};

// Offsets, counted from `offset`, of scores above the threshold, and of at most `most` that equal it.
template <typename K>
SK_CLONES void collect(
    const K* bits, int64_t n, bool magnitude, K threshold, int64_t offset, int64_t most, Found& found) {
  for (int64_t i = 0; i < n; i += kSkip) {
    const int64_t end = std::min(i + kSkip, n);
    bool any = false;
    for (int64_t j = i; j < end; ++j) any |= radix_key(bits[j], magnitude) >= threshold;
    if (!any) continue;
    for (int64_t j = i; j < end; ++j) {
      const K key = radix_key(bits[j], magnitude);
      if (key > threshold) found.above.push_back(offset + j);
      else if (key == threshold && int64_t(found.ties.size()) < most) found.ties.push_back(offset + j);
    }
  }
}

}  // namespace sk::cpu
