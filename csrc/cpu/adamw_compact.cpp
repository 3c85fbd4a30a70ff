// adamw_compact_: checks, CPU registration.
#include "adamw_tasks.h"

namespace sk {
namespace {

void adamw_compact_(
    Tensors values, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs, Tensors steps,
    Tensors weights, Tensors positions, double lr, double beta1, double beta2, double weight_decay, double eps,
    bool maximize, MaybeTensor lr_tensor, MaybeTensor grad_scale, MaybeTensor found_inf,
    std::vector<int64_t> rounding) {
  check_lists(
      values.size(),
      {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), steps.size(), weights.size(), positions.size()},
      max_exp_avg_sqs.size());
  const auto options = make_options(lr, beta1, beta2, weight_decay, eps, maximize, lr_tensor, grad_scale);
  std::vector<cpu::AdamwTask> tasks;
  Memory memory(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const Tensor* maximum = max_exp_avg_sqs.empty() ? nullptr : &max_exp_avg_sqs[i];
    STD_TORCH_CHECK(values[i].is_contiguous(), "values must be contiguous");
    check_same(values[i], grads[i], "grads");
    STD_TORCH_CHECK(
        exp_avgs[i].is_contiguous() && exp_avgs[i].numel() == values[i].numel(), "exp_avgs must have the size of values");
    with_floating(weights[i].scalar_type(), "adamw_compact_", [&](auto zero) {
      using scalar_t = decltype(zero);
      using T = opmath_t<scalar_t>;
      STD_TORCH_CHECK(values[i].scalar_type() == scalar_type<T>(), "values must be fp32 (fp64 for fp64 weights)");
      auto task = make_task<T, scalar_t>(
          exp_avgs[i], exp_avg_sqs[i], maximum, steps[i], weights[i], positions[i], options, rounding, i, memory);
      task.values = mutable_data<T>(values[i], "values");
      task.grad = data<T>(grads[i], "grads");
      memory.changed.emplace_back(task.values, task.numel * int64_t(sizeof(T)));
      with_kind<T>(positions[i], exp_avgs[i], task, [&](auto index, auto state, auto amsgrad, auto aged) {
        task.run = cpu::adamw_compact<
            T, scalar_t, decltype(state), decltype(index), decltype(amsgrad)::value, decltype(aged)::value>;
      });
      tasks.push_back(task);
    });
  }
  memory.check();
  run(tasks, found_inf);
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) { m.impl("adamw_compact_", TORCH_BOX(&sk::adamw_compact_)); }
