// The AdamW rule for one element, shared by the CPU loops and the CUDA kernels.
#pragma once
#include <math.h>

#include "rule.h"

namespace sk {

// Everything of a step that is the same for all elements of a tensor, in the dtype of the arithmetic.
template <typename T>
struct AdamwStep {
  T beta2;
  T rest1, rest2;    // 1 - beta1 and 1 - beta2: formed in fp64, for 1 - 0.999f is off by 1e-5
  T decay;           // lr * weight_decay; 1 - decay would round the same way at every step
  T step_size;       // lr / (1 - beta1^step)
  T inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^step)
  T eps;
  T sign;  // of gradients: -1 to maximise; over grad_scale where gradients come scaled
};

// What the steps of a call are made of. On the CPU all of it is known, on CUDA some of it may lie on the device only.
struct AdamwOptions {
  double lr, beta1, beta2, weight_decay, eps;
  bool maximize;
  double grad_scale = 1;
};

// A step count at which nothing is left of the zeros that the moments began with: step_size is lr, inv_sqrt_bias2 is 1.
constexpr double kNoBias = INFINITY;

template <typename T>
SK_RULE AdamwStep<T> adamw_step(double step, const AdamwOptions& o) {
  return {
      T(o.beta2),
      T(1 - o.beta1),
      T(1 - o.beta2),
      T(o.lr * o.weight_decay),
      T(o.lr / (1 - pow(o.beta1, step))),
      T(1 / sqrt(1 - pow(o.beta2, step))),
      T(o.eps),
      T((o.maximize ? -1 : 1) / o.grad_scale)};
}

SK_RULE float sqrt_of(float x) { return sqrtf(x); }
SK_RULE double sqrt_of(double x) { return sqrt(x); }
SK_RULE float expm1_of(float x) { return expm1f(x); }
SK_RULE double expm1_of(double x) { return expm1(x); }

// The step of one position, made from that of kNoBias. 1 - beta^t = -expm1(t log(beta)) loses no digits in fp32,
// where the difference of 1 and a power would lose them all: fp64, slow on most GPUs, is not needed.
template <typename T>
SK_RULE void set_step(AdamwStep<T>& s, const AdamwStep<T>& no_bias, T step_count, T log_beta1, T log_beta2) {
  s.step_size = no_bias.step_size / -expm1_of(step_count * log_beta1);
  s.inv_sqrt_bias2 = T(1) / sqrt_of(-expm1_of(step_count * log_beta2));
}

// m <- m + (1-b1)(g-m);  v <- b2 v + (1-b2) g^2;  returns x - decay x - step_size m / (sqrt(v)/sqrt(bias2) + eps).
// `maximum` points to the running maximum of v (amsgrad) or is null.
template <bool amsgrad, typename T>
SK_RULE T adamw(T x, T g, T& m, T& v, T* maximum, const AdamwStep<T>& s) {
  g *= s.sign;
  m += s.rest1 * (g - m);
  v = s.beta2 * v + s.rest2 * g * g;
  T second = v;
  if constexpr (amsgrad) {
    // NaN wins, as in torch.maximum.
    second = *maximum = v > *maximum || v != v ? v : *maximum;
  }
  x -= s.decay * x;
  return x - s.step_size * m / (sqrt_of(second) * s.inv_sqrt_bias2 + s.eps);
}

}  // namespace sk
