// A stable radix sort.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace sk {

// By key(item), an int64 that is not negative, 11 bits at a time.
template <typename T, typename F>
void sort_stably(std::vector<T>& items, const F& key) {
  if (std::is_sorted(items.begin(), items.end(), [&](const T& a, const T& b) { return key(a) < key(b); })) return;
  constexpr int kDigit = 11;
  uint64_t all = 0;
  for (const T& item : items) all |= uint64_t(key(item));
  std::vector<T> sorted(items.size());
  for (int shift = 0; shift < 64 && all >> shift > 0; shift += kDigit) {
    int64_t starts[(1 << kDigit) + 1] = {};
    const auto digit = [&](const T& item) { return uint64_t(key(item)) >> shift & ((1 << kDigit) - 1); };
    for (const T& item : items) ++starts[digit(item) + 1];
    for (int d = 0; d < 1 << kDigit; ++d) starts[d + 1] += starts[d];
    for (const T& item : items) sorted[starts[digit(item)]++] = item;
    std::swap(items, sorted);
  }
}

}  // namespace sk
