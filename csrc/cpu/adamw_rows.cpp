// adamw_rows_: checks and CPU registration.
#include "adamw_rows.h"

#include "../common.h"
#include "positions.h"
#include "radix.h"

namespace sk {
namespace {

constexpr int64_t kGrain = 32768;  // elements that are worth a thread: about 10 us of work

void* check_state(const Tensor& state, const Tensor& first, const Tensor& param, int64_t width, const char* name) {
  STD_TORCH_CHECK(
      state.is_contiguous() && state.scalar_type() == first.scalar_type() && state.dim() == param.dim() &&
          state.size(0) == first.size(0) && state.numel() == product(state.size(0), width),
      name, " must be contiguous, of the dtype and size of exp_avg, with rows as long as the parameter's");
  void* at = state.mutable_data_ptr();
  const int64_t item = state.element_size();
  check_memory(state, at, state.numel(), item, item, name);
  return at;
}

void adamw_rows_(
    Tensor param, Tensor grad_values, Tensor ids, MaybeTensor slots, Tensor exp_avg, Tensor exp_avg_sq,
    MaybeTensor max_exp_avg_sq, Tensor scales, double beta1, double beta2, double eps, bool maximize,
    std::vector<int64_t> rounding) {
  STD_TORCH_CHECK(param.dim() > 0 && param.is_contiguous(), "param must be contiguous, of at least one dimension");
  const int64_t rows = param.size(0), count = ids.numel();
  if (count == 0) return;
  const int64_t width = rows == 0 ? 0 : param.numel() / rows;
  STD_TORCH_CHECK(
      grad_values.is_contiguous() && grad_values.scalar_type() == param.scalar_type() &&
          grad_values.dim() == param.dim() && grad_values.size(0) == count &&
          grad_values.numel() == product(count, width),
      "grad_values must be contiguous [T, *row] with the dtype of param");
  STD_TORCH_CHECK(
      ids.dim() == 1 && ids.is_contiguous() && ids.scalar_type() == ScalarType::Long,
      "ids must be contiguous int64 with one entry for each row of grad_values");
  const auto* listed = data<int64_t>(ids, "ids");
  std::vector<cpu::RowEntry> entries;
  entries.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(listed[i] >= 0 && listed[i] < rows, "ids has an entry out of range for a table of ", rows, " rows");
    entries.push_back({listed[i], i});
  }
  // Stably: duplicates of a row follow each other as they came.
  sort_stably(entries, [](const cpu::RowEntry& entry) { return entry.row; });
  const int64_t lines = exp_avg.size(0);
  cpu::AdamwRowsTask task{};
  task.entries = entries.data();
  task.count = count;
  task.width = width;
  if (slots) {
    STD_TORCH_CHECK(
        slots->scalar_type() == ScalarType::Int && slots->is_contiguous() && slots->numel() == rows,
        "slots must be contiguous int32 with one entry for each row of param");
    task.slots = data<int32_t>(*slots, "slots");
    for (int64_t i = 0; i < count; ++i) {
      const int32_t slot = task.slots[entries[i].row];
      STD_TORCH_CHECK(slot >= 0 && slot < lines, "slots has an entry out of range for a state of ", lines, " rows");
    }
  } else {
    STD_TORCH_CHECK(lines == rows, "without slots the state must have the rows of param");
  }
  task.step = {beta2, 1 - beta1, 1 - beta2, 0, 0, 1, eps, maximize ? -1.0 : 1.0};
  STD_TORCH_CHECK(rounding.empty() || rounding.size() == 3, "rounding must be empty, or seed, step and stream");
  if (!rounding.empty()) task.rounding = {uint64_t(rounding[0]), uint32_t(rounding[1]), uint32_t(rounding[2]), true};
  task.exp_avg = check_state(exp_avg, exp_avg, param, width, "exp_avg");
  task.exp_avg_sq = check_state(exp_avg_sq, exp_avg, param, width, "exp_avg_sq");
  if (max_exp_avg_sq) task.maximum = check_state(*max_exp_avg_sq, exp_avg, param, width, "max_exp_avg_sq");
  task.scales_each = scales.dim() == 2 && scales.size(0) > 1;
  with_floating(param.scalar_type(), "adamw_rows_", [&](auto zero) {
    using W = decltype(zero);
    using T = opmath_t<W>;
    STD_TORCH_CHECK(
        scales.dim() == 2 && scales.size(1) == 2 && scales.is_contiguous() &&
            scales.scalar_type() == scalar_type<T>() && (scales.size(0) == 1 || scales.size(0) == count),
        "scales must be contiguous [1, 2] or [T, 2], fp32 (fp64 for fp64 parameters)");
    task.scales = data<T>(scales, "scales");
    task.param = mutable_data<W>(param, "param");
    task.grad_values = data<W>(grad_values, "grad_values");
    if (slots) {
      const Span own(task.slots, rows * int64_t(sizeof(int32_t)));
      const int64_t state = exp_avg.numel() * int64_t(exp_avg.element_size());
      check_apart(own, {task.param, rows * width * int64_t(sizeof(W))}, "slots");
      for (void* each : {task.exp_avg, task.exp_avg_sq, task.maximum}) {
        if (each) check_apart(own, {each, state}, "slots");
      }
    }
    void (*run)(const cpu::AdamwRowsTask&, int64_t, int64_t) = nullptr;
    if (exp_avg.scalar_type() == scalar_type<T>()) {
      run = task.maximum ? cpu::adamw_rows<T, W, T, true> : cpu::adamw_rows<T, W, T, false>;
    } else {
      STD_TORCH_CHECK(exp_avg.scalar_type() == ScalarType::BFloat16, "the state must be fp32, bf16, or fp64 for fp64");
      run = task.maximum ? cpu::adamw_rows<T, W, BFloat16, true> : cpu::adamw_rows<T, W, BFloat16, false>;
    }
    parallel_for(0, count, kGrain / (width + 1) + 1, [&](int64_t begin, int64_t end) { run(task, begin, end); });
  });
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) { m.impl("adamw_rows_", TORCH_BOX(&sk::adamw_rows_)); }
