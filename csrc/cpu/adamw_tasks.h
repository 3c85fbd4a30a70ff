// What adamw_compact_ and adamw_gathered_ share: checks, and the work list over all tensors.
#pragma once
#include <algorithm>
#include <optional>

#include "../common.h"
#include "adamw.h"
#include "positions.h"

namespace sk {

constexpr int64_t kGrain = 32768;  // elements that are worth a thread: about 10 us of work

using MaybeTensor = std::optional<Tensor>;

inline float number(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(
      tensor.numel() == 1 && tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float, name,
      " must be a 0-d fp32 CPU tensor");
  return *data<float>(tensor, name);
}

inline AdamwOptions make_options(
    double lr, double beta1, double beta2, double weight_decay, double eps, bool maximize, const MaybeTensor& lr_tensor,
    const MaybeTensor& grad_scale) {
  if (lr_tensor) lr = number(*lr_tensor, "lr");
  return {lr, beta1, beta2, weight_decay, eps, maximize, grad_scale ? number(*grad_scale, "grad_scale") : 1.0};
}

// One parallel region over the elements of all tensors; nothing, where a gradient is not finite.
inline void run(const std::vector<cpu::AdamwTask>& tasks, const MaybeTensor& found_inf) {
  if (found_inf && number(*found_inf, "found_inf") != 0) return;
  std::vector<int64_t> ends;
  int64_t total = 0;
  for (const auto& task : tasks) ends.push_back(total += task.numel);
  parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; begin = ends[i], ++i) {
      const int64_t start = ends[i] - tasks[i].numel;
      tasks[i].run(tasks[i], begin - start, std::min(end, ends[i]) - start);
    }
  });
}

inline void check_lists(size_t count, std::initializer_list<size_t> sizes, size_t maxima) {
  for (size_t size : sizes) STD_TORCH_CHECK(size == count, "all lists must have one entry for each parameter");
  STD_TORCH_CHECK(maxima == 0 || maxima == count, "max_exp_avg_sqs must be empty or have one entry for each parameter");
}

// Positions and what a call changes, in memory: positions are read again after they were checked.
struct Memory {
  std::vector<Span> positions, changed;

  explicit Memory(size_t parameters) {
    positions.reserve(parameters);
    changed.reserve(5 * parameters);
  }
  void check() const { check_apart(positions, changed, "positions"); }
};

// Fills what both forms share: moments, positions, and the scalars of the step.
template <typename T, typename W>
cpu::AdamwTask make_task(
    const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor* maximum, const Tensor& step, const Tensor& dense,
    const Tensor& positions, const AdamwOptions& options, const std::vector<int64_t>& rounding, size_t number,
    Memory& memory) {
  check_same(exp_avg, exp_avg_sq, "exp_avg_sq");
  if (maximum) check_same(exp_avg, *maximum, "max_exp_avg_sq");
  STD_TORCH_CHECK(dense.is_contiguous(), "dense parameters must be contiguous");
  const int64_t count = positions.numel();
  const int64_t numel = exp_avg.numel();
  cpu::AdamwTask task{};
  task.numel = numel;
  task.width = count == 0 ? 1 : numel / count;
  STD_TORCH_CHECK(task.width * count == numel, "the state does not fit its positions");
  const int64_t item = exp_avg.element_size(), dense_numel = dense.numel();
  const auto changed = [&](const Tensor& x, int64_t numel, int64_t item, const char* name) {
    void* at = x.mutable_data_ptr();
    check_memory(x, at, numel, item, item, name);
    memory.changed.emplace_back(at, numel * item);
    return at;
  };
  task.exp_avg = changed(exp_avg, numel, item, "exp_avg");
  task.exp_avg_sq = changed(exp_avg_sq, numel, item, "exp_avg_sq");
  task.maximum = maximum ? changed(*maximum, numel, item, "max_exp_avg_sq") : nullptr;
  task.dense = changed(dense, dense_numel, sizeof(W), "weights");
  with_positions(positions, [&](const auto* index) {
    check_positions(index, count, task.width == 0 ? dense.size(0) : dense_numel / task.width);
    task.positions = index;
    memory.positions.emplace_back(index, count * int64_t(sizeof(*index)));
  });
  STD_TORCH_CHECK(
      step.is_cpu() && step.scalar_type() == ScalarType::Float && step.is_contiguous() &&
          (step.numel() == 1 || (step.dim() == 1 && step.numel() == count)),
      "steps must be fp32 CPU tensors, 0-d or with one entry for each position");
  const auto* steps = data<float>(step, "steps");
  const bool aged = step.numel() != 1;
  task.ages = aged ? steps : nullptr;
  task.options = &options;
  if (!rounding.empty()) {
    STD_TORCH_CHECK(rounding.size() == 2, "rounding must be empty, or seed and first stream");
    task.rounding = {uint64_t(rounding[0]), aged ? 0 : counter_of(*steps), uint32_t(rounding[1] + number), true};
  }
  const auto scalars = adamw_step<T>(aged ? kNoBias : *steps, options);
  if constexpr (std::is_same_v<T, double>) task.step64 = scalars; else task.step32 = scalars;
  return task;
}

// Calls f with values of the positions' and the state's dtype, whether there are maxima, and whether ages differ.
template <typename T, typename F>
void with_kind(const Tensor& positions, const Tensor& exp_avg, const cpu::AdamwTask& task, const F& f) {
  const auto with_state = [&](auto state) {
    const auto with_index = [&](auto index) {
      const auto with_ages = [&](auto amsgrad) {
        if (task.ages) f(index, state, amsgrad, std::true_type{}); else f(index, state, amsgrad, std::false_type{});
      };
      if (task.maximum) with_ages(std::true_type{}); else with_ages(std::false_type{});
    };
    if (positions.scalar_type() == ScalarType::Int) with_index(int32_t{}); else with_index(int64_t{});
  };
  if (exp_avg.scalar_type() == scalar_type<T>()) return with_state(T{});
  if constexpr (std::is_same_v<T, float>) {
    if (exp_avg.scalar_type() == ScalarType::BFloat16) return with_state(BFloat16{});
  }
  STD_TORCH_CHECK(false, "exp_avgs must be fp32 or bf16 (fp64 for fp64 weights)");
}

}  // namespace sk
