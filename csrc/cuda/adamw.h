// Launcher of the AdamW step, compact and gathered, over many tensors.
#pragma once
#include "../rules/adamw.h"
#include "../rules/units.h"
#include "types.h"

namespace sk::cuda {

// One tensor. M is fp32, fp64 where W, the dtype of the weight, is fp64.
struct AdamwTensor {
  void* values;       // [numel], M: compact form. null: the weight and its gradient are read where they lie
  const void* grad;   // [numel], M: compact form. As the weight: gathered form
  void* exp_avg;      // [numel], M, or bf16 where the call says so
  void* exp_avg_sq;   // likewise
  void* maximum;      // likewise, or null
  void* weight;       // [units.limit units], W
  Positions positions;
  Units units;
  int64_t numel;              // positions.count * units.size()
  double step;                // the number of this step,
  const float* device_step;   // unless it is here, on the device,
  const float* step_counts;   // or, there too, one for each position. Either may be null
  uint32_t stream;            // of random bits
};

// What the tensors of one call share.
struct AdamwCall {
  AdamwOptions options;
  // Of 0-d tensors on the device, or null: they stand for what `options` says, which is not read then.
  const float *lr = nullptr, *grad_scale = nullptr;
  const float* found_inf = nullptr;  // nothing changes where it is not 0
  bool compact = false, amsgrad = false;
  bool tiled = false;       // all units are columns and blocks, else elements and rows
  bool narrow = false;      // the moments are bf16
  bool stochastic = false;  // what is narrower than M is rounded stochastically, but for the weights of compact values
  uint64_t seed = 0;
  Dtype dtype = Dtype::fp32;  // of the weights
  bool is_int64 = false;  // positions are int64
  void* scales = nullptr;  // [tensors, kScales], M: room for what is made of numbers on the device; null if none is
};

constexpr int kScales = 4;

// Returns what went wrong, or null.
const char* launch_adamw(const AdamwTensor* tensors, int64_t count, const AdamwCall& call, void* stream);

}  // namespace sk::cuda
