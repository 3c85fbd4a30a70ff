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
  T sign;  // -1 to maximise
};

template <typename T>
SK_RULE AdamwStep<T> adamw_step(
    double step, double lr, double beta1, double beta2, double weight_decay, double eps, bool maximize) {
  return {
      T(beta2),
      T(1 - beta1),
      T(1 - beta2),
      T(lr * weight_decay),
      T(lr / (1 - pow(beta1, step))),
      T(1 / sqrt(1 - pow(beta2, step))),
      T(eps),
      T(maximize ? -1 : 1)};
}

SK_RULE float sqrt_of(float x) { return sqrtf(x); }
SK_RULE double sqrt_of(double x) { return sqrt(x); }

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
