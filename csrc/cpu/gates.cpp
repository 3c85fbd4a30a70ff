// gate_values, gate_probabilities, gated_weight and gate_gradient: checks, dispatch, CPU registrations.
#include "gates.h"

#include <cmath>
#include <tuple>

#include "../common.h"
#include "scratch.h"

namespace sk {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread
constexpr int64_t kGateGrain = 1 << 5;  // blocks of gates that are

int64_t blocks_of(int64_t count) { return ceil_div(count, cpu::kGates); }

// How gates are drawn.
struct Draw {
  int64_t kind;
  double noise;
  bool drawn;
  uint64_t key;

  Draw(int64_t kind, double noise, const MaybeTensor& key) : kind(kind), noise(noise), drawn(key.has_value()), key(0) {
    STD_TORCH_CHECK(kind >= 0 && kind < kGateKinds, "no kind of gates has the number ", kind);
    if (!key) return;
    STD_TORCH_CHECK(key->numel() == 1 && key->scalar_type() == ScalarType::Long, "key must be int64, of one element");
    this->key = uint64_t(*data<int64_t>(*key, "key"));
  }

  template <int number, typename S>
  void of_kind(const S* logits, int64_t count, int64_t stream, S* values, S* slopes) const {
    parallel_for(0, blocks_of(count), kGateGrain, [&](int64_t begin, int64_t end) {
      const auto run = drawn ? cpu::draw_gates<number, true, S> : cpu::draw_gates<number, false, S>;
      run(logits, S(noise), key, uint32_t(stream), count, begin, end, values, slopes);
    });
  }

  template <typename S>
  void operator()(const S* logits, int64_t count, int64_t stream, S* values, S* slopes) const {
    switch (kind) {
      case kStg: return of_kind<kStg>(logits, count, stream, values, slopes);
      case kFineGates: return of_kind<kFineGates>(logits, count, stream, values, slopes);
      default: return of_kind<kHardConcrete>(logits, count, stream, values, slopes);
    }
  }

  template <typename S>
  void open(const S* logits, int64_t count, int64_t begin, int64_t end, S* values, S* slopes) const {
    const S shift = S(noise * std::log(-kGateLow / kGateHigh));
    const auto run = kind == kStg         ? cpu::open_gates<kStg, S>
                     : kind == kFineGates ? cpu::open_gates<kFineGates, S>
                                          : cpu::open_gates<kHardConcrete, S>;
    run(logits, S(noise), shift, count, begin, end, values, slopes);
  }
};

// Calls f with a zero of the C++ type of logits.
template <typename F>
void with_logits(const Tensor& logits, const char* op, const F& f) {
  STD_TORCH_CHECK(logits.dim() == 1 && logits.is_contiguous(), "logits must be contiguous, of one dimension");
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, " takes logits in fp32 and fp64 only");
  if (dtype == ScalarType::Double) f(double{});
  else f(float{});
}

std::tuple<Tensor, Tensor> gate_values(Tensor logits, int64_t kind, double noise, MaybeTensor key, int64_t stream) {
  const Draw draw(kind, noise, key);
  const int64_t count = logits.numel();
  Tensor values = torch::stable::new_empty(logits, {count}), slopes = torch::stable::new_empty(logits, {count});
  with_logits(logits, "gate_values", [&](auto zero) {
    using S = decltype(zero);
    draw(
        data<S>(logits, "logits"), count, stream, static_cast<S*>(values.mutable_data_ptr()),
        static_cast<S*>(slopes.mutable_data_ptr()));
  });
  return {values, slopes};
}

std::tuple<Tensor, Tensor> gate_probabilities(Tensors logits, int64_t kind, double noise) {
  STD_TORCH_CHECK(!logits.empty(), "logits must hold at least one tensor");
  const Draw draw(kind, noise, std::nullopt);
  std::vector<int64_t> starts{0}, ends;  // of the gates, and of the blocks they come in
  for (const Tensor& each : logits) {
    STD_TORCH_CHECK(
        each.is_contiguous() && each.scalar_type() == logits[0].scalar_type(),
        "logits must be contiguous, all of one dtype");
    starts.push_back(starts.back() + each.numel());
    ends.push_back((ends.empty() ? 0 : ends.back()) + blocks_of(each.numel()));
  }
  const int64_t count = starts.back();
  Tensor values = torch::stable::new_empty(logits[0], {count}), slopes = torch::stable::new_empty(logits[0], {count});
  with_logits(logits[0], "gate_probabilities", [&](auto zero) {
    using S = decltype(zero);
    std::vector<const S*> from;
    for (const Tensor& each : logits) from.push_back(data<S>(each, "logits"));
    S *p = static_cast<S*>(values.mutable_data_ptr()), *d = static_cast<S*>(slopes.mutable_data_ptr());
    parallel_for(0, ends.back(), kGateGrain, [&](int64_t begin, int64_t end) {
      for_stretches(ends, begin, end, [&](size_t k, int64_t first, int64_t last) {
        draw.open(from[k], logits[k].numel(), first, last, p + starts[k], d + starts[k]);
      });
    });
  });
  return {values, slopes};
}

bool divides(int64_t count, int64_t group, int64_t size) {
  return group > 0 && size % group == 0 && count == size / group;
}

// A factor for each of `size` rows or columns: gates repeated `group` times, or ones.
template <typename S>
Scratch<S> factors(const MaybeTensor& logits, int64_t size, int64_t group, const Draw& draw, int64_t stream) {
  auto out = scratch<S>(size);
  if (!logits) {
    std::fill_n(out.get(), size, S(1));
    return out;
  }
  STD_TORCH_CHECK(
      logits->is_contiguous() && logits->scalar_type() == scalar_type<S>() && divides(logits->numel(), group, size),
      "logits of gates must be contiguous, one for each group, in fp32 (fp64 for fp64 weights)");
  const S* from = data<S>(*logits, "logits");
  if (group == 1) {
    draw(from, size, stream, out.get(), static_cast<S*>(nullptr));
    return out;
  }
  auto gates = scratch<S>(logits->numel());
  draw(from, logits->numel(), stream, gates.get(), static_cast<S*>(nullptr));
  for (int64_t i = 0; i < logits->numel(); ++i) std::fill_n(out.get() + i * group, group, gates[i]);
  return out;
}

std::tuple<Tensor, Tensor> gated_weight(
    Tensor weight, MaybeTensor bias, MaybeTensor rows, MaybeTensor columns, int64_t kind, double noise, MaybeTensor key,
    bool transposed, ScalarType dtype, int64_t column_group) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be contiguous, of two dimensions");
  const int64_t height = weight.size(0), width = weight.size(1), m = transposed ? width : height;
  STD_TORCH_CHECK(
      !bias || (bias->dim() == 1 && bias->is_contiguous() && bias->size(0) == m &&
                bias->scalar_type() == weight.scalar_type()),
      "bias must be contiguous, one for each row, in the dtype of weight");
  const Draw draw(kind, noise, key);
  Tensor out = torch::stable::new_empty(weight, {height, width}, dtype);
  Tensor shift = torch::stable::new_empty(weight, {bias ? m : 0}, dtype);
  if (weight.numel() == 0 && !bias) return {out, shift};  // of any size, then: nothing is to be made of that size
  with_floating(weight.scalar_type(), "gated_weight", [&](auto zero) {
    using T = decltype(zero);
    using S = opmath_t<T>;
    const auto of_rows = factors<S>(rows, m, 1, draw, 0);
    const auto of_columns = factors<S>(columns, transposed ? height : width, column_group, draw, 1);
    const S *outer = (transposed ? of_columns : of_rows).get(), *inner = (transposed ? of_rows : of_columns).get();
    with_floating(dtype, "gated_weight", [&](auto other) {
      using O = decltype(other);
      O* to = static_cast<O*>(out.mutable_data_ptr());
      const T* from = data<T>(weight, "weight");
      parallel_for(0, height, kGrain / (width + 1) + 1, [&](int64_t begin, int64_t end) {
        cpu::scale_rows(from, outer, inner, to, width, begin, end);
      });
      if (!bias) return;
      const S one = S(1);
      cpu::scale_rows(data<T>(*bias, "bias"), &one, of_rows.get(), static_cast<O*>(shift.mutable_data_ptr()), m, 0, 1);
    });
  });
  return {out, shift};
}

void check_activation(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 2 && x.size(0) == like.size(0) && x.size(1) == like.size(1) && x.scalar_type() == like.scalar_type() &&
          (x.stride(1) == 1 || x.size(1) <= 1),
      name, " must be [tokens, width], columns side by side, and both of one dtype");
}

std::tuple<Tensor, Tensor, Tensor> gate_gradient(
    Tensor a, Tensor b, Tensor logits, int64_t kind, double noise, MaybeTensor key, int64_t stream, int64_t group) {
  STD_TORCH_CHECK(a.dim() == 2, "a must be [tokens, width]");
  check_activation(a, a, "a");
  check_activation(b, a, "b");
  const int64_t tokens = a.size(0), width = a.size(1), count = logits.numel();
  STD_TORCH_CHECK(divides(count, group, width), "logits must hold one gate for each group of columns");
  const Draw draw(kind, noise, key);
  Tensor gradient = torch::stable::new_empty(logits, {count}), of_values = torch::stable::new_empty(logits, {count});
  Tensor scaled = torch::stable::new_empty(logits, {width});
  const int64_t blocks = ceil_div(tokens, cpu::kTokens), across = ceil_div(width, cpu::kColumns);
  auto totals = scratch<double>(2 * width);
  with_floating(a.scalar_type(), "gate_gradient", [&](auto zero) {
    using T = decltype(zero);
    using S = opmath_t<T>;
    const auto parts = scratch<S>(2 * blocks * width);
    const T *left = rows_data<T>(a, "a"), *right = rows_data<T>(b, "b");
    const int64_t a_stride = a.stride(0), b_stride = b.stride(0), work = cpu::kTokens * std::min(width, cpu::kColumns);
    parallel_for(0, blocks * across, kGrain / (work + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / across, first = block * cpu::kTokens, column = task % across * cpu::kColumns;
        S* products = parts.get() + 2 * block * width + column;
        cpu::sum_tokens(
            left + first * a_stride + column, a_stride, right + first * b_stride + column, b_stride,
            std::min(cpu::kTokens, tokens - first), std::min(cpu::kColumns, width - column), products,
            products + width);
      }
    });
    parallel_for(0, 2 * width, kGrain / (blocks + 1) + 1, [&](int64_t begin, int64_t end) {
      cpu::add_parts(parts.get(), blocks, 2 * width, totals.get(), begin, end);
    });
  });
  with_logits(logits, "gate_gradient", [&](auto zero) {
    using S = decltype(zero);
    const auto values = scratch<S>(count), slopes = scratch<S>(count);
    draw(data<S>(logits, "logits"), count, stream, values.get(), slopes.get());
    S *out = static_cast<S*>(gradient.mutable_data_ptr()), *by_value = static_cast<S*>(of_values.mutable_data_ptr());
    S* sums = static_cast<S*>(scaled.mutable_data_ptr());
    for (int64_t i = 0; i < count; ++i) {
      const S z = values[i], slope = slopes[i];
      double product = 0;
      for (int64_t j = i * group; j < (i + 1) * group; ++j) {
        product += totals[j];
        // A gate that is closed, or clamped, lets nothing through, whatever NaN the activations hold.
        sums[j] = z == S(0) ? S(0) : z * S(totals[width + j]);
      }
      by_value[i] = z == S(0) ? S(0) : S(product) / z;
      out[i] = slope == S(0) ? S(0) : slope * by_value[i];
    }
  });
  return {gradient, of_values, scaled};
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) {
  m.impl("gate_values", TORCH_BOX(&sk::gate_values));
  m.impl("gate_probabilities", TORCH_BOX(&sk::gate_probabilities));
  m.impl("gated_weight", TORCH_BOX(&sk::gated_weight));
  m.impl("gate_gradient", TORCH_BOX(&sk::gate_gradient));
}
