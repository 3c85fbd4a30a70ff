// fisher_squares_, fisher_embedding_, fisher_vector_: checks, division into tasks, CPU registrations.
#include "fisher.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "../common.h"
#include "fisher_checks.h"
#include "hits.h"
#include "scratch.h"

namespace sk {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread
constexpr int64_t kSamples = 64;     // samples whose column sums exist at a time
constexpr int64_t kHitsAhead = 4;    // tokens of an embedding between a prefetch and its use

void fisher_squares_(Tensors totals, Tensors grads) {
  STD_TORCH_CHECK(totals.size() == grads.size(), "totals and grads must have one entry for each tensor");
  if (totals.empty()) return;
  with_floating(grads[0].scalar_type(), "fisher_squares_", [&](auto zero) {
    using T = decltype(zero);
    using S = opmath_t<T>;
    std::vector<S*> total;
    std::vector<const T*> grad;
    std::vector<int64_t> ends;
    for (size_t i = 0; i < grads.size(); ++i) {
      STD_TORCH_CHECK(
          grads[i].is_contiguous() && grads[i].scalar_type() == grads[0].scalar_type(),
          "grads must be contiguous and of one dtype");
      total.push_back(sum_pointer<S>(totals[i], grads[i].numel(), "totals"));
      grad.push_back(data<T>(grads[i], "grads"));
      ends.push_back(grads[i].numel() + (i ? ends[i - 1] : 0));
    }
    parallel_for(0, ends.back(), kGrain, [&](int64_t begin, int64_t end) {
      for_stretches(ends, begin, end, [&](size_t i, int64_t first, int64_t last) {
        cpu::squares(grad[i] + first, total[i] + first, last - first);
      });
    });
  });
}

// The tokens of a whole table, each of which hits the row of its id.
template <typename Id>
std::vector<Hit> hit_all(const Id* ids, int64_t tokens, int64_t table, int64_t padding_idx) {
  std::vector<Hit> hits;
  hits.reserve(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    if (padding_idx >= 0 && ids[t] == padding_idx) continue;
    STD_TORCH_CHECK(ids[t] >= 0 && ids[t] < table, "ids has an entry out of range for a table of ", table, " rows");
    hits.push_back({t, ids[t], int64_t(ids[t]) + 1});
  }
  sort_hits(hits);
  return hits;
}

template <typename T, typename I>
struct Embedding {
  using S = opmath_t<T>;
  const T* dy;  // [samples, each, width]
  int64_t samples, each, width;
  const I* index;  // elements; null: hits stand for whole rows
  std::vector<Hit> hits;
  S *total, *norms;  // either may be null

  int64_t sample(int64_t hit) const { return hits[hit].token / each; }

  SK_INLINE void fetch(int64_t hit) const {
    cpu::prefetch_row(dy + hits[hit].token * width, width);
    if (total && !same_row(hits, hit)) cpu::prefetch_row(total + hits[hit].from * width, width);
  }

  // All hits of a row are of one thread: [begin, end) is moved on to where rows change. The norm of a row within a
  // sample is left in `found`, at the first of its hits.
  void square(int64_t begin, int64_t end, double* found) const {
    keep_rows_whole(hits, begin, end);
    auto grad = scratch<S>(width);
    for (int64_t i = begin, next; i < end; i = next) {
      const Hit& hit = hits[i];
      const I* columns = index ? index + hit.from : nullptr;
      const int64_t start = index ? *columns / width * width : 0, elements = index ? hit.to - hit.from : width;
      for (next = i; next < end && hits[next].from == hit.from && sample(next) == sample(i); ++next) {
        if (!index && next + kHitsAhead < end) fetch(next + kHitsAhead);
        cpu::add_token(dy + hits[next].token * width, columns, start, elements, next == i, grad.get());
      }
      double sums[cpu::kSums] = {};
      S* own = total ? total + hit.from * (index ? 1 : width) : nullptr;
      cpu::square_sums(grad.get(), elements, own, norms ? sums : nullptr);
      found[i] = std::accumulate(sums, sums + cpu::kSums, 0.0);
    }
  }

  void run() const {
    const int64_t count = int64_t(hits.size());
    std::vector<double> found(count), sums(samples);
    parallel_for(
        0, count, kGrain / (width + 1) + 1, [&](int64_t begin, int64_t end) { square(begin, end, found.data()); });
    for (int64_t i = 0; i < count; ++i) sums[sample(i)] += found[i];
    for (int64_t b = 0; norms && b < samples; ++b) norms[b] = S(double(norms[b]) + sums[b]);
  }
};

void fisher_embedding_(
    Tensor grad_output, Tensor ids, MaybeTensor total, MaybeTensor norms, MaybeTensor positions, bool rows,
    int64_t padding_idx) {
  check_activations(grad_output, std::nullopt);
  const int64_t samples = grad_output.size(0), each = grad_output.size(1), width = grad_output.size(2);
  STD_TORCH_CHECK(
      ids.is_contiguous() && ids.dim() == 2 && ids.size(0) == samples && ids.size(1) == each,
      "ids must be contiguous, one for each token of grad_output");
  constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();
  const int64_t count = positions ? positions->numel() : 0, numel = total ? total->numel() : 0;
  const int64_t table = !positions && total && width > 0 ? numel / width : kUnknown;
  with_floating(grad_output.scalar_type(), "fisher_embedding_", [&](auto zero) {
    using T = decltype(zero);
    using S = opmath_t<T>;
    const int64_t elements = !positions ? numel : rows ? product(count, width) : count;
    S* sum = sum_pointer<S>(total, elements, "total");
    S* norm = sum_pointer<S>(norms, samples, "norms");
    with_selection(positions, sum, elements, norm, samples, [&](const auto* index) {
      using I = std::remove_const_t<std::remove_pointer_t<decltype(index)>>;
      if (width == 0) return;
      std::vector<Hit> hits;
      with_positions(torch::stable::view(ids, {samples * each}), [&](const auto* id) {
        hits = index ? find_hits(id, samples * each, index, count, rows ? 1 : width, padding_idx)
                     : hit_all(id, samples * each, table, padding_idx);
      });
      if (index && !rows) check_hits(hits, index, width);
      const T* dy = data<T>(grad_output, "grad_output");
      Embedding<T, I>{dy, samples, each, width, rows ? nullptr : index, std::move(hits), sum, norm}.run();
    });
  });
}

template <typename T, typename I>
struct Columns {
  using S = opmath_t<T>;
  const T *dy, *x;  // [samples, each, m]; x may be null
  int64_t samples, each, m;
  const I* index;  // null: all columns
  int64_t count;
  S *total, *norms;  // either may be null

  // Sums a block of columns over the tokens of sample b; keeps those selected. Returns the sum of their squares.
  double sum(int64_t b, int64_t begin, S* block, S* selected) const {
    const int64_t end = std::min(begin + cpu::kColumns, m), at = b * each * m + begin;
    if (x) {
      cpu::sum_columns<true>(dy + at, x + at, each, m, block, end - begin);
    } else {
      cpu::sum_columns<false>(dy + at, x, each, m, block, end - begin);
    }
    const int64_t from = index ? std::lower_bound(index, index + count, begin) - index : begin;
    const int64_t to = index ? std::lower_bound(index, index + count, end) - index : end;
    for (int64_t k = from; k < to; ++k) selected[k] = block[(index ? index[k] : k) - begin];
    double lanes[cpu::kSums] = {};
    cpu::square_sums(selected + from, to - from, static_cast<S*>(nullptr), lanes);
    return std::accumulate(lanes, lanes + cpu::kSums, 0.0);
  }

  // One sample after the other is added to total, and the blocks of a sample to its norm: the order never changes.
  void run() const {
    const int64_t blocks = ceil_div(m, cpu::kColumns);
    auto sums = scratch<S>(std::min(samples, kSamples) * count);
    for (int64_t first = 0; first < samples; first += kSamples) {
      const int64_t here = std::min(kSamples, samples - first);
      std::vector<double> found(here * blocks);
      for_each_task(here * blocks, [&] {
        return [&, block = scratch<S>(cpu::kColumns)](int64_t task) {
          const int64_t b = task / blocks;
          found[task] = sum(first + b, task % blocks * cpu::kColumns, block.get(), sums.get() + b * count);
        };
      });
      for (int64_t b = 0; norms && b < here; ++b) {
        const auto own = found.begin() + b * blocks;
        norms[first + b] = S(double(norms[first + b]) + std::accumulate(own, own + blocks, 0.0));
      }
      if (!total) continue;
      parallel_for(0, count, 1024, [&](int64_t begin, int64_t end) {
        for (int64_t b = 0; b < here; ++b) {
          cpu::square_sums(sums.get() + b * count + begin, end - begin, total + begin, static_cast<double*>(nullptr));
        }
      });
    }
  }
};

void fisher_vector_(
    Tensor grad_output, MaybeTensor input, MaybeTensor total, MaybeTensor norms, MaybeTensor positions) {
  check_activations(grad_output, input);
  const int64_t samples = grad_output.size(0), each = grad_output.size(1), m = grad_output.size(2);
  STD_TORCH_CHECK(!input || input->size(2) == m, "input must have the width of grad_output");
  with_floating(grad_output.scalar_type(), "fisher_vector_", [&](auto zero) {
    using T = decltype(zero);
    using S = opmath_t<T>;
    const int64_t count = positions ? positions->numel() : m;
    S* sum = sum_pointer<S>(total, count, "total");
    S* norm = sum_pointer<S>(norms, samples, "norms");
    const T* dy = data<T>(grad_output, "grad_output");
    const T* x = input ? data<T>(*input, "input") : nullptr;
    with_selection(positions, sum, count, norm, samples, [&](const auto* index) {
      if (index) check_positions(index, count, m);
      if (grad_output.numel() == 0) return;  // of any width, then: nothing is to be made of that size
      using I = std::remove_const_t<std::remove_pointer_t<decltype(index)>>;
      Columns<T, I>{dy, x, samples, each, m, index, count, sum, norm}.run();
    });
  });
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) {
  m.impl("fisher_squares_", TORCH_BOX(&sk::fisher_squares_));
  m.impl("fisher_embedding_", TORCH_BOX(&sk::fisher_embedding_));
  m.impl("fisher_vector_", TORCH_BOX(&sk::fisher_vector_));
}
