// Stochastic gates: what one logit and two random words become. In fp32 without a call or a branch, so that loops over
// gates become vectors; in fp64 by the standard library. Everything is as accurate as fp32 is near 1.
#pragma once
#include <math.h>
#include <stdint.h>

#include "../rules/round.h"
#include "../rules/rule.h"

namespace sk {

enum GateKind { kStg, kFineGates, kHardConcrete, kGateKinds };
constexpr double kGateLow = -0.1, kGateHigh = 1.1;  // what hard concrete gates stretch (0, 1) to, before they clamp

// ln x of a normal x > 0: x = 2^e (1 + f), a polynomial in f (Cephes).
SK_RULE float gate_log(float x) {
  const int32_t e = int32_t(bits_of(x) - 0x3f3504f3u) >> 23;
  const float f = float_of(bits_of(x) - (uint32_t(e) << 23)) - 1.0f, z = f * f;
  float y = 7.0376836292e-2f;
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  return (f + (y * f * z - 0.5f * z - 2.12194440e-4f * float(e))) + 0.693359375f * float(e);
}
SK_RULE double gate_log(double x) { return log(x); }

// e^x, held between e^-87 and e^88. NaN stays NaN.
SK_RULE float gate_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // the low bits of the sum hold n
  x = x - n * 0.693359375f + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  return (y * (x * x) + x + 1.0f) * float_of((bits_of(shifted) - 0x4b400000u + 127u) << 23);
}
SK_RULE double gate_exp(double x) { return exp(x); }

// cos(2 pi u) for u in (0, 1), as the sine of an angle in [-pi/2, pi/2]: its Taylor series.
SK_RULE float gate_cos(float u) {
  const float x = 6.28318531f * (fabsf(u - 0.5f) - 0.25f), z = x * x;
  float y = 1.60590438e-10f;
  y = y * z - 2.50521084e-8f;
  y = y * z + 2.75573192e-6f;
  y = y * z - 1.98412698e-4f;
  y = y * z + 8.33333333e-3f;
  y = y * z - 1.66666667e-1f;
  return x + x * z * y;
}
SK_RULE double gate_cos(double u) { return sin(6.283185307179586477 * (fabs(u - 0.5) - 0.25)); }

SK_RULE float gate_root(float x) { return sqrtf(x); }
SK_RULE double gate_root(double x) { return sqrt(x); }

template <typename S>
SK_RULE S gate_sigmoid(S x) {
  return S(1) / (S(1) + gate_exp(-x));
}

SK_RULE float gate_tanh(float x) { return 1.0f - 2.0f / (gate_exp(2.0f * x) + 1.0f); }
SK_RULE double gate_tanh(double x) { return tanh(x); }

// The normal distribution function: by a fit of erfc whose relative error is 1.2e-7 (Numerical Recipes).
SK_RULE float gate_normal(float x) {
  const float z = 0.707106781f * fabsf(x), t = 1.0f / (1.0f + 0.5f * z);
  float y = 0.17087277f;
  y = y * t - 0.82215223f;
  y = y * t + 1.48851587f;
  y = y * t - 1.13520398f;
  y = y * t + 0.27886807f;
  y = y * t - 0.18628806f;
  y = y * t + 0.09678418f;
  y = y * t + 0.37409196f;
  y = y * t + 1.00002368f;
  const float tail = 0.5f * t * gate_exp(y * t - 1.26551223f - z * z);
  return x > 0.0f ? 1.0f - tail : tail;
}
SK_RULE double gate_normal(double x) { return 0.5 * erfc(-0.70710678118654752440 * x); }

// A number from (0, 1), exact in fp32.
template <typename S>
SK_RULE S gate_uniform(uint32_t word) {
  return (S(int32_t(word >> 9)) + S(0.5)) * S(1.1920928955078125e-07);
}

// A value of a gate, or a probability, and its derivative by the logit.
template <typename S>
struct Gate {
  S value, slope;
};

// The gate of two random words. `drawn` is false where there is no noise.
template <int kind, bool drawn, typename S>
SK_RULE Gate<S> draw_gate(S logit, S noise, uint32_t first, uint32_t second) {
  const S u = gate_uniform<S>(first), v = gate_uniform<S>(second);
  S before, slope;
  if (kind == kHardConcrete) {
    constexpr S span = S(kGateHigh - kGateLow);
    const S s = gate_sigmoid(drawn ? (gate_log(u) - gate_log(S(1) - u) + logit) / noise : logit);
    before = s * span + S(kGateLow);
    slope = span * s * (S(1) - s) / (drawn ? noise : S(1));
  } else {
    const S mean = kind == kFineGates ? gate_tanh(logit) : logit;
    before = mean + S(0.5);
    if (drawn) before += noise * (gate_root(S(-2) * gate_log(u)) * gate_cos(v));
    slope = kind == kFineGates ? S(1) - mean * mean : S(1);
  }
  // One condition at a time, NaN failing each: GCC makes no vectors of two.
  slope = before > S(0) ? slope : S(0);
  slope = before < S(1) ? slope : S(0);
  before = before < S(0) ? S(0) : before;
  return {before > S(1) ? S(1) : before, slope};
}

// The chance of a gate to be more than 0. `shift` is noise * ln(0.1 / 1.1).
template <int kind, typename S>
SK_RULE Gate<S> open_gate(S logit, S noise, S shift) {
  if (kind == kHardConcrete) {
    const S share = gate_sigmoid(logit - shift);
    return {share, share * (S(1) - share)};
  }
  const S mean = kind == kFineGates ? gate_tanh(logit) : logit;
  const S score = (mean + S(0.5)) / noise;
  const S slope = gate_exp(S(-0.5) * score * score) / (S(2.50662827463100050242) * noise);
  return {gate_normal(score), kind == kFineGates ? slope * (S(1) - mean * mean) : slope};
}

}  // namespace sk
