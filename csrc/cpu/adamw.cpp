// adamw_: checks, the work list over all tensors, CPU registration.
#include "adamw.h"

#include "../common.h"
#include "../units.h"
#include "positions.h"
#include "scratch.h"

namespace sk {
namespace {

constexpr int64_t kGrain = 32768;  // elements that are worth a thread: about 10 us of work

float number(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(
      tensor.numel() == 1 && tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float, name,
      " must be a 0-d fp32 CPU tensor");
  return *data<float>(tensor, name);
}

// Positions and what a call changes, in memory: positions are read again after they were checked.
struct Memory {
  std::vector<Span> positions, changed;

  template <typename T>
  T* change(const Tensor& x, const char* name) {
    T* at = mutable_data<T>(x, name);
    changed.emplace_back(at, x.numel() * int64_t(sizeof(T)));
    return at;
  }
};

void adamw_(
    Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs, Tensors steps,
    Tensors positions, Tensors weights, std::vector<int64_t> tiles, double lr, double beta1, double beta2,
    double weight_decay, double eps, bool maximize, MaybeTensor lr_tensor, MaybeTensor grad_scale,
    MaybeTensor found_inf, std::vector<int64_t> rounding) {
  check_lists(
      params.size(), {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), steps.size(), positions.size()},
      {max_exp_avg_sqs.size(), weights.size()});
  STD_TORCH_CHECK(tiles.size() == 2 * params.size(), "tiles must be two numbers for each parameter");
  STD_TORCH_CHECK(rounding.empty() || rounding.size() == 2, "rounding must be empty, or seed and first stream");
  if (lr_tensor) lr = number(*lr_tensor, "lr");
  const double scale = grad_scale ? number(*grad_scale, "grad_scale") : 1.0;
  const AdamwOptions options{lr, beta1, beta2, weight_decay, eps, maximize, scale};
  std::vector<cpu::AdamwTask> tasks(params.size());
  std::vector<cpu::AdamwRun> runs(params.size());
  std::vector<int64_t> ends;
  int64_t total = 0;
  std::vector<Scratch<int64_t>> begins;
  Memory memory;
  memory.positions.reserve(params.size());
  memory.changed.reserve(5 * params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor &param = params[i], &exp_avg = exp_avgs[i], &exp_avg_sq = exp_avg_sqs[i], &step = steps[i];
    const Tensor& weight = weights.empty() ? param : weights[i];
    STD_TORCH_CHECK(param.is_contiguous() && weight.is_contiguous(), "parameters and weights must be contiguous");
    STD_TORCH_CHECK(exp_avg.is_contiguous(), "exp_avgs must be contiguous");
    check_same(param, grads[i], "grads");
    check_same(exp_avg, exp_avg_sq, "exp_avg_sqs");
    if (!max_exp_avg_sqs.empty()) check_same(exp_avg, max_exp_avg_sqs[i], "max_exp_avg_sqs");
    const Units units = units_of(weight, tiles[2 * i], tiles[2 * i + 1]);
    const int64_t count = positions[i].numel(), numel = exp_avg.numel();
    STD_TORCH_CHECK(product(count, units.size()) == numel, "the state does not fit its positions");
    STD_TORCH_CHECK(weights.empty() || param.numel() == numel, "exp_avgs must have the size of params");
    STD_TORCH_CHECK(
        step.is_cpu() && step.scalar_type() == ScalarType::Float && step.is_contiguous() &&
            (step.numel() == 1 || (step.dim() == 1 && step.numel() == count)),
        "steps must be fp32 CPU tensors, 0-d or with one entry for each position");
    const auto* step_count = data<float>(step, "steps");
    const bool per_position = step.numel() != 1;
    cpu::AdamwTask& task = tasks[i];
    task.units = units;
    task.count = count;
    task.step_counts = per_position ? step_count : nullptr;
    task.options = &options;
    if (!rounding.empty()) {
      task.rounding = {
          uint64_t(rounding[0]), per_position ? 0 : counter_of(*step_count), uint32_t(rounding[1] + int64_t(i)), true};
    }
    with_floating(weight.scalar_type(), "adamw_", [&](auto zero) {
      using W = decltype(zero);
      using T = opmath_t<W>;
      task.dense = memory.change<W>(weight, "weights");
      if (weights.empty()) {
        task.grad = data<W>(grads[i], "grads");
      } else {
        STD_TORCH_CHECK(param.scalar_type() == scalar_type<T>(), "params must be fp32 (fp64 for fp64 weights)");
        task.values = memory.change<T>(param, "params");
        task.grad = data<T>(grads[i], "grads");
      }
      const auto scalars = adamw_step<T>(per_position ? kNoBias : *step_count, options);
      if constexpr (std::is_same_v<T, double>) task.step64 = scalars;
      else task.step32 = scalars;
      const auto change_state = [&](const Tensor& x, const char* name) -> void* {
        if (x.scalar_type() == scalar_type<T>()) return memory.change<T>(x, name);
        STD_TORCH_CHECK(
            (std::is_same_v<T, float>) && x.scalar_type() == ScalarType::BFloat16,
            "exp_avgs must be fp32 or bf16 (fp64 for fp64 weights)");
        return memory.change<BFloat16>(x, name);
      };
      task.exp_avg = change_state(exp_avg, "exp_avgs");
      task.exp_avg_sq = change_state(exp_avg_sq, "exp_avg_sqs");
      if (!max_exp_avg_sqs.empty()) task.maximum = change_state(max_exp_avg_sqs[i], "max_exp_avg_sqs");
    });
    ScalarType index_type = positions[i].scalar_type();
    with_positions(positions[i], [&](const auto* index) {
      check_positions(index, count, units.limit);
      task.positions = index;
      memory.positions.emplace_back(index, count * int64_t(sizeof(*index)));
      if (!units.side_by_side() || units.limit == units.n) return;
      begins.push_back(scratch<int64_t>(count));  // columns of several matrices
      for (int64_t k = 0; k < count; ++k) begins.back()[k] = units.tile(index[k]).begin;
      task.positions = begins.back().get();
      index_type = ScalarType::Long;
    });
    const auto kernel = weights.empty() ? cpu::adamw_kernel<false> : cpu::adamw_kernel<true>;
    runs[i] = kernel(task, weight.scalar_type(), exp_avg.scalar_type(), index_type);
    ends.push_back(total += numel);
  }
  check_apart(memory.positions, memory.changed, "positions");
  if (found_inf && number(*found_inf, "found_inf") != 0) return;
  // One parallel region over the elements of all tensors.
  parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    for_stretches(ends, begin, end, [&](size_t i, int64_t first, int64_t last) { runs[i](tasks[i], first, last); });
  });
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) { m.impl("adamw_", TORCH_BOX(&sk::adamw_)); }
