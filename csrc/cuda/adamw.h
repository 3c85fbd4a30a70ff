// Launcher of the AdamW step, compact and gathered, over many tensors.
#pragma once
#include "types.h"

namespace sk::cuda {

// One tensor. M is fp32, fp64 where W, the dtype of the weight, is fp64. A position stands for `width` elements.
struct AdamwTensor {
  void* values;       // [numel], M: compact form. null: the weight and its gradient are read where they lie
  const void* grad;   // [numel], M: compact form. [limit * width], W: gathered form
  void* exp_avg;      // [numel], M
  void* exp_avg_sq;   // [numel], M
  void* maximum;      // [numel], M, or null
  void* weight;       // [positions.limit * width], W
  Positions positions;
  int64_t numel, width;       // numel = positions.count * width
  double step;                // the number of this step,
  const float* device_step;   // unless it is here, on the device
};

// What the tensors of one call share.
struct AdamwCall {
  double lr, beta1, beta2, weight_decay, eps;
  bool maximize;
  bool compact = false, amsgrad = false;
  Dtype dtype = Dtype::fp32;  // of the weights
  bool wide = false;          // positions are int64
  void* scales = nullptr;     // [2 * tensors], M: room for what is made of steps on the device; null if none is there
};

// Returns what went wrong, or null.
const char* launch_adamw(const AdamwTensor* tensors, int64_t count, const AdamwCall& call, void* stream);

}  // namespace sk::cuda
