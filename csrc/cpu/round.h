// Narrowing a run of numbers, to nearest or stochastically.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../common.h"
#include "../rules/round.h"

namespace sk::cpu {

// What the random bits of element j depend on is for `draw` to say: draw(j, array).
template <typename N, typename T, typename Draw>
inline __attribute__((always_inline)) void narrow(
    const T* from, N* to, int64_t n, bool stochastic, uint32_t array, const Draw& draw) {
  if constexpr (std::is_same_v<T, float> && !std::is_same_v<N, float>) {
    if (stochastic) {
      for (int64_t j = 0; j < n; ++j) {
        const uint32_t random = draw(j, array);
        to[j] = N(std::is_same_v<N, BFloat16> ? round_to_bf16(from[j], random) : round_to_fp16(from[j], random));
      }
      return;
    }
  }
  for (int64_t j = 0; j < n; ++j) to[j] = N(from[j]);
}

// The moments of a few neighbours, as wide as the arithmetic: run(m, v, maximum) steps them where they lie, or a copy
// that is narrowed afterwards.
template <bool amsgrad, int kMost, typename T, typename S, typename Draw, typename Run>
inline __attribute__((always_inline)) void with_state(
    S* __restrict__ exp_avg, S* __restrict__ exp_avg_sq, S* __restrict__ maximum, int64_t n, bool stochastic,
    const Draw& draw, const Run& run) {
  if constexpr (std::is_same_v<S, T>) {
    run(exp_avg, exp_avg_sq, maximum);
  } else {
    alignas(64) T m[kMost], v[kMost], largest[kMost];
    for (int64_t j = 0; j < n; ++j) {
      m[j] = T(exp_avg[j]);
      v[j] = T(exp_avg_sq[j]);
    }
    for (int64_t j = 0; amsgrad && j < n; ++j) largest[j] = T(maximum[j]);
    run(m, v, largest);
    narrow(m, exp_avg, n, stochastic, kExpAvg, draw);
    narrow(v, exp_avg_sq, n, stochastic, kExpAvgSq, draw);
    if (amsgrad) narrow(largest, maximum, n, stochastic, kMaximum, draw);
  }
}

}  // namespace sk::cpu
