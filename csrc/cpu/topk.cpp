// topk over a list of tensors: checks, the passes of the radix select, CPU registration.
#include "topk.h"

#include <algorithm>
#include <mutex>
#include <tuple>

#include "../common.h"

namespace sk {
namespace {

constexpr int64_t kGrain = 1 << 16;  // scores that are worth a thread

// The scores of all tensors on one axis.
template <typename K>
struct Axis {
  std::vector<const K*> data;
  std::vector<int64_t> ends;

  // f(tensor, pointer, count, offset on the axis) for each stretch of [begin, end) inside one tensor.
  template <typename F>
  void runs(int64_t begin, int64_t end, const F& f) const {
    for_stretches(ends, begin, end, [&](size_t i, int64_t first, int64_t last) {
      f(i, data[i] + first, last - first, (i == 0 ? 0 : ends[i - 1]) + first);
    });
  }
};

template <typename K>
void check_nan(const Axis<K>& axis, K infinity) {
  int64_t bad = int64_t(axis.data.size());
  std::mutex mutex;
  parallel_for(0, axis.ends.back(), kGrain, [&](int64_t begin, int64_t end) {
    axis.runs(begin, end, [&](int64_t i, const K* bits, int64_t n, int64_t) {
      if (cpu::has_nan(bits, n, infinity)) {
        std::lock_guard<std::mutex> lock(mutex);
        bad = std::min(bad, i);
      }
    });
  });
  STD_TORCH_CHECK(bad == int64_t(axis.data.size()), "scores[", bad, "] holds NaN");
}

// The key of the k-th largest score, and how many scores with just that key belong to the k.
template <typename K>
std::pair<K, int64_t> find_threshold(const Axis<K>& axis, int64_t k, bool magnitude) {
  K prefix = 0;
  std::mutex mutex;
  const int digit = cpu::digit_bits(axis.ends.back());
  const int64_t bins = int64_t(1) << digit;
  for (int shift = 8 * int(sizeof(K)) - digit; shift >= 0; shift -= digit) {
    std::vector<int64_t> counts(bins);
    parallel_for(0, axis.ends.back(), kGrain, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> own(bins);
      axis.runs(begin, end, [&](int64_t, const K* bits, int64_t n, int64_t) {
        cpu::histogram(bits, n, magnitude, shift, digit, prefix, own.data());
      });
      std::lock_guard<std::mutex> lock(mutex);
      for (int64_t b = 0; b < bins; ++b) counts[b] += own[b];
    });
    int64_t at = bins - 1;
    for (; counts[at] < k; --at) k -= counts[at];
    prefix = K(uint64_t(prefix) << digit | uint64_t(at));
  }
  return {prefix, k};
}

template <typename K>
void select(const Axis<K>& axis, int64_t k, bool magnitude, int64_t* positions, int64_t* counts) {
  const auto [threshold, ties] = find_threshold(axis, k, magnitude);
  std::vector<cpu::Found> parts;
  std::mutex mutex;
  parallel_for(0, axis.ends.back(), kGrain, [&, threshold = threshold, ties = ties](int64_t begin, int64_t end) {
    cpu::Found found{begin, {}, {}};
    axis.runs(begin, end, [&](int64_t, const K* bits, int64_t n, int64_t offset) {
      cpu::collect(bits, n, magnitude, threshold, offset, ties, found);
    });
    std::lock_guard<std::mutex> lock(mutex);
    parts.push_back(std::move(found));
  });
  std::sort(parts.begin(), parts.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  int64_t* to = positions;
  int64_t left = ties;
  for (auto& part : parts) {
    part.ties.resize(std::min<int64_t>(left, part.ties.size()));
    left -= int64_t(part.ties.size());
    to = std::merge(part.above.begin(), part.above.end(), part.ties.begin(), part.ties.end(), to);
  }
  const int64_t* from = positions;
  for (size_t i = 0; i < axis.ends.size(); ++i) {
    const int64_t start = i == 0 ? 0 : axis.ends[i - 1];
    const int64_t* stop = std::lower_bound(from, static_cast<const int64_t*>(to), axis.ends[i]);
    counts[i] = stop - from;
    for (; from < stop; ++from) positions[from - positions] -= start;
  }
}

std::tuple<Tensor, Tensor> topk(Tensors scores, int64_t k, bool magnitude) {
  STD_TORCH_CHECK(!scores.empty(), "scores is empty");
  int64_t total = 0;
  for (const Tensor& s : scores) {
    STD_TORCH_CHECK(
        s.is_contiguous() && s.scalar_type() == scores[0].scalar_type(), "scores must be contiguous and of one dtype");
    total += s.numel();
  }
  STD_TORCH_CHECK(k >= 0 && k <= total, "k is ", k, ", there are ", total, " scores");
  Tensor positions = torch::stable::new_empty(scores[0], {k}, ScalarType::Long);
  Tensor counts = torch::stable::new_zeros(scores[0], {int64_t(scores.size())}, ScalarType::Long);
  with_floating(scores[0].scalar_type(), "topk", [&](auto zero) {
    using K = cpu::Key<sizeof(zero)>;
    Axis<K> axis;
    int64_t end = 0;
    for (const Tensor& s : scores) {
      axis.data.push_back(data<K>(s, "scores"));
      axis.ends.push_back(end += s.numel());
    }
    check_nan(axis, cpu::infinity_bits<K>(std::is_same_v<decltype(zero), BFloat16>));
    if (k == 0) return;
    select(
        axis, k, magnitude, static_cast<int64_t*>(positions.mutable_data_ptr()),
        static_cast<int64_t*>(counts.mutable_data_ptr()));
  });
  return {positions, counts};
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) { m.impl("topk", TORCH_BOX(&sk::topk)); }
