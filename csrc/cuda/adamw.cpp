// adamw_ on CUDA: checks, one launch for all tensors of one kind, registration.
#include "adamw.h"

#include "../units.h"
#include "host.h"

namespace sk::cuda {
namespace {

const float* number(const Tensor& tensor, int32_t device, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1 && tensor.scalar_type() == ScalarType::Float, name, " must be a 0-d fp32 tensor");
  check_device(tensor, device, name);
  return static_cast<const float*>(tensor.const_data_ptr());
}

AdamwCall make_call(
    const AdamwOptions& options, const MaybeTensor& lr, const MaybeTensor& grad_scale, const MaybeTensor& found_inf,
    const std::vector<int64_t>& rounding, int32_t device) {
  AdamwCall call{options};
  STD_TORCH_CHECK(rounding.empty() || rounding.size() == 2, "rounding must be empty, or seed and first stream");
  call.stochastic = !rounding.empty();
  if (call.stochastic) call.seed = uint64_t(rounding[0]);
  if (lr) call.lr = number(*lr, device, "lr");
  if (grad_scale) call.grad_scale = number(*grad_scale, device, "grad_scale");
  if (found_inf) call.found_inf = number(*found_inf, device, "found_inf");
  return call;
}

void check_state(const Tensor& state, int64_t numel, ScalarType dtype, int32_t device, const char* name) {
  check_device(state, device, name);
  STD_TORCH_CHECK(
      state.numel() == numel && state.scalar_type() == dtype && state.is_contiguous(), name,
      " does not fit: it must be contiguous, of the size of its selection, in the dtype of its like");
}

// All but the values of the compact form, and the gradient.
AdamwTensor make_tensor(
    const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor* maximum, const Tensor& step, const Tensor& weight,
    const Tensor& positions, const std::vector<int64_t>& tiles, const std::vector<int64_t>& rounding, size_t number,
    int32_t device) {
  check_device(weight, device, "weights");
  const int64_t numel = exp_avg.numel(), count = positions.numel();
  const ScalarType compute = computed_in(dtype_of(weight)), dtype = exp_avg.scalar_type();
  STD_TORCH_CHECK(
      dtype == compute || (dtype == ScalarType::BFloat16 && compute == ScalarType::Float),
      "exp_avgs must be fp32 or bf16 (fp64 for fp64 weights)");
  check_state(exp_avg, numel, dtype, device, "exp_avgs");
  check_state(exp_avg_sq, numel, dtype, device, "exp_avg_sqs");
  if (maximum) check_state(*maximum, numel, dtype, device, "max_exp_avg_sqs");

  AdamwTensor tensor{};
  if (!rounding.empty()) tensor.stream = uint32_t(rounding[1] + number);
  tensor.numel = numel;
  tensor.units = units_of(weight, tiles[2 * number], tiles[2 * number + 1]);
  STD_TORCH_CHECK(product(count, tensor.units.size()) == numel, "the state does not fit its positions");
  tensor.positions = positions_of(positions, device, tensor.units.limit);
  tensor.exp_avg = exp_avg.mutable_data_ptr();
  tensor.exp_avg_sq = exp_avg_sq.mutable_data_ptr();
  tensor.maximum = maximum ? maximum->mutable_data_ptr() : nullptr;
  tensor.weight = weight.mutable_data_ptr();

  STD_TORCH_CHECK(
      step.scalar_type() == ScalarType::Float && step.is_contiguous() &&
          (step.numel() == 1 || (step.dim() == 1 && step.numel() == count)),
      "steps must be fp32 tensors, 0-d or with one entry for each position");
  const float* at = static_cast<const float*>(step.const_data_ptr());
  if (step.numel() != 1) {
    check_device(step, device, "steps with one entry for each position");
    tensor.step_counts = at;
    tensor.step = kNoBias;
  } else if (step.is_cpu()) {
    tensor.step = *at;
  } else {
    check_device(step, device, "steps");
    tensor.device_step = at;
  }
  return tensor;
}

bool is_narrow(const Tensor& exp_avg, const Tensor& weight) {
  return exp_avg.scalar_type() != computed_in(dtype_of(weight));
}

// Tensors of one dtype of weights, of positions and of moments go together, whatever lies between them; elements and
// rows apart from columns and blocks. `call` says the rest.
void run(
    const std::vector<AdamwTensor>& tensors, const Tensors& weights, const Tensors& exp_avgs, AdamwCall call,
    int32_t device) {
  const DeviceGuard guard(device);
  std::vector<bool> done(tensors.size(), false);
  for (size_t first = 0; first < tensors.size(); ++first) {
    if (done[first]) continue;
    call.dtype = dtype_of(weights[first]);
    call.is_int64 = tensors[first].positions.is_int64;
    call.narrow = is_narrow(exp_avgs[first], weights[first]);
    call.tiled = !tensors[first].units.one_run();
    call.scales = nullptr;
    std::vector<AdamwTensor> alike;
    bool on_device = call.lr || call.grad_scale;
    for (size_t i = first; i < tensors.size(); ++i) {
      if (done[i] || dtype_of(weights[i]) != call.dtype || tensors[i].positions.is_int64 != call.is_int64) continue;
      if (is_narrow(exp_avgs[i], weights[i]) != call.narrow || tensors[i].units.one_run() == call.tiled) continue;
      done[i] = true;
      alike.push_back(tensors[i]);
      on_device |= tensors[i].device_step != nullptr;
    }
    Tensor room;
    if (on_device) {
      room = torch::stable::new_empty(exp_avgs[first], {kScales * int64_t(alike.size())}, computed_in(call.dtype));
      call.scales = room.mutable_data_ptr();
    }
    check_launch("adamw_", launch_adamw(alike.data(), int64_t(alike.size()), call, current_stream(device)));
  }
}

void adamw_(
    Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs, Tensors steps,
    Tensors positions, Tensors weights, std::vector<int64_t> tiles, double lr, double beta1, double beta2,
    double weight_decay, double eps, bool maximize, MaybeTensor lr_tensor, MaybeTensor grad_scale,
    MaybeTensor found_inf, std::vector<int64_t> rounding) {
  check_lists(
      params.size(), {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), steps.size(), positions.size()},
      {max_exp_avg_sqs.size(), weights.size()});
  STD_TORCH_CHECK(tiles.size() == 2 * params.size(), "tiles must be two numbers for each parameter");
  if (params.empty()) return;
  const int32_t device = device_of(params[0], "params");
  auto call =
      make_call({lr, beta1, beta2, weight_decay, eps, maximize}, lr_tensor, grad_scale, found_inf, rounding, device);
  call.compact = !weights.empty();
  call.amsgrad = !max_exp_avg_sqs.empty();
  const Tensors& dense = call.compact ? weights : params;
  std::vector<AdamwTensor> tensors;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor* maximum = call.amsgrad ? &max_exp_avg_sqs[i] : nullptr;
    auto tensor =
        make_tensor(exp_avgs[i], exp_avg_sqs[i], maximum, steps[i], dense[i], positions[i], tiles, rounding, i, device);
    if (call.compact) {
      check_state(params[i], tensor.numel, computed_in(dtype_of(weights[i])), device, "params");
      tensor.values = params[i].mutable_data_ptr();
    }
    check_device(grads[i], device, "grads");
    check_same(params[i], grads[i], "grads");
    tensor.grad = grads[i].const_data_ptr();
    tensors.push_back(tensor);
  }
  run(tensors, dense, exp_avgs, call, device);
}

}  // namespace
}  // namespace sk::cuda

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CUDA, m) { m.impl("adamw_", TORCH_BOX(&sk::cuda::adamw_)); }
