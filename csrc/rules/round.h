// Stochastic rounding: up or down at random, so that the expected result is the number itself.
#pragma once
#include <stdint.h>
#include <string.h>

#include "philox.h"
#include "rule.h"

namespace sk {

SK_RULE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

SK_RULE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// A neighbour of x with `dropped` mantissa bits less, as a float; uniform `random` bits decide which. Infinities, NaN
// and what rounding up would make infinite stay below.
SK_RULE float round_mantissa(float x, int dropped, uint32_t random) {
  const uint32_t mask = (uint32_t(1) << dropped) - 1, bits = bits_of(x);
  const uint32_t down = bits & ~mask, up = (bits + (random >> (32 - dropped))) & ~mask;
  const bool finite = (up & 0x7f800000u) != 0x7f800000u;
  if ((bits & 0x7f800000u) == 0x7f800000u) return x;
  return float_of(finite ? up : down);
}

SK_RULE float round_to_bf16(float x, uint32_t random) { return round_mantissa(x, 16, random); }

// fp16 is subnormal below 2^-14, where its steps are all of 2^-24.
SK_RULE float round_to_fp16(float x, uint32_t random) {
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  if (magnitude >= 0x38800000u) {
    const float rounded = round_mantissa(x, 13, random);
    const bool over = (bits_of(rounded) & 0x7fffffffu) > 0x477fe000u && magnitude < 0x477ff000u;
    return over ? float_of((bits_of(x) & 0x80000000u) | 0x477fe000u) : rounded;  // 65504 is the largest
  }
  const float steps = float_of(magnitude) * 16777216.0f;
  const float below = float(uint32_t(steps));
  const float chance = float(random >> 8) * 5.9604644775390625e-08f;
  const float rounded = (below + (chance < steps - below ? 1.0f : 0.0f)) * 5.9604644775390625e-08f;
  return float_of(bits_of(rounded) | (bits_of(x) & 0x80000000u));
}

// What the random bits of a number are drawn from: they can be drawn again.
struct Rounding {
  uint64_t seed;
  uint32_t step, stream;
  bool stochastic;
};

enum RoundedArray : uint32_t { kWeight, kExpAvg, kExpAvgSq, kMaximum, kRoundedArrays };

// A count of steps, which floats hold, as random bits are drawn from it; 0 for anything else.
SK_RULE uint32_t counter_of(float step) { return step >= 0.0f && step < 4294967296.0f ? uint32_t(step) : 0u; }

SK_RULE uint32_t random_bits(const Rounding& rounding, int64_t position, uint32_t array) {
  return philox(rounding.seed, uint64_t(position), rounding.step, rounding.stream * kRoundedArrays + array);
}

}  // namespace sk
