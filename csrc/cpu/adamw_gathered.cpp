// adamw_gathered_: checks, CPU registration.
#include "adamw_tasks.h"

namespace sk {
namespace {

void adamw_gathered_(
    Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs, Tensors steps,
    Tensors positions, double lr, double beta1, double beta2, double weight_decay, double eps, bool maximize,
    MaybeTensor lr_tensor, MaybeTensor grad_scale, MaybeTensor found_inf, std::vector<int64_t> rounding) {
  check_lists(
      params.size(), {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), steps.size(), positions.size()},
      max_exp_avg_sqs.size());
  const auto options = make_options(lr, beta1, beta2, weight_decay, eps, maximize, lr_tensor, grad_scale);
  std::vector<cpu::AdamwTask> tasks;
  Memory memory(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor* maximum = max_exp_avg_sqs.empty() ? nullptr : &max_exp_avg_sqs[i];
    check_same(params[i], grads[i], "grads");
    with_floating(params[i].scalar_type(), "adamw_gathered_", [&](auto zero) {
      using scalar_t = decltype(zero);
      using T = opmath_t<scalar_t>;
      STD_TORCH_CHECK(exp_avgs[i].is_contiguous(), "exp_avgs must be contiguous");
      auto task = make_task<T, scalar_t>(
          exp_avgs[i], exp_avg_sqs[i], maximum, steps[i], params[i], positions[i], options, rounding, i, memory);
      task.grad = data<scalar_t>(grads[i], "grads");
      with_kind<T>(positions[i], exp_avgs[i], task, [&](auto index, auto state, auto amsgrad, auto aged) {
        task.run = cpu::adamw_gathered<
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

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) { m.impl("adamw_gathered_", TORCH_BOX(&sk::adamw_gathered_)); }
