// Floating-point numbers as unsigned integers of the same order, shared by the CPU loops and CUDA kernels.
#pragma once
#include <cstdint>
#include <cstring>

#include "../rules/rule.h"

namespace sk {

template <int bytes>
struct Key;
template <>
struct Key<2> {
  using type = uint16_t;
};
template <>
struct Key<4> {
  using type = uint32_t;
};
template <>
struct Key<8> {
  using type = uint64_t;
};

// The order: negative numbers with all bits inverted, positive ones with the sign bit set; -0 becomes +0 first.
template <typename K>
SK_RULE K radix_key(K bits, bool magnitude) {
  constexpr K sign = K(K(1) << (8 * sizeof(K) - 1));
  const K absolute = K(bits & K(~sign));
  if (magnitude) return absolute;
  if (absolute == 0) return sign;
  return bits & sign ? K(~bits) : K(bits | sign);
}

}  // namespace sk
