// Narrowing a run of numbers, to nearest or stochastically.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../common.h"
#include "../rules/round.h"

namespace sk::cpu {

// Element j of the run has the random bits of position first + j.
template <typename N, typename T>
inline __attribute__((always_inline)) void narrow(
    const T* from, N* to, int64_t n, const Rounding& rounding, int64_t first, uint32_t array) {
  if constexpr (std::is_same_v<T, float> && !std::is_same_v<N, float>) {
    if (rounding.stochastic) {
      for (int64_t j = 0; j < n; ++j) {
        const uint32_t random = random_bits(rounding, first + j, array);
        to[j] = N(std::is_same_v<N, BFloat16> ? round_to_bf16(from[j], random) : round_to_fp16(from[j], random));
      }
      return;
    }
  }
  for (int64_t j = 0; j < n; ++j) to[j] = N(from[j]);
}

}  // namespace sk::cpu
