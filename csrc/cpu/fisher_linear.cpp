// fisher_linear_: checks, packing, division into tasks, CPU registration.
#include "fisher_linear.h"

#include <algorithm>
#include <numeric>

#include "../common.h"
#include "fisher_checks.h"
#include "scratch.h"

namespace sk {
namespace {

constexpr int64_t kTokens = 1024;         // tokens that are packed at a time, and at least a sample
constexpr int64_t kSamples = 256;         // samples that are packed at a time, at most
constexpr int64_t kStrip = 32;            // rows of a task: dY's part stays in the second-level cache
constexpr int64_t kBand = 8;              // panels of a task
constexpr int64_t kStripBytes = 1 << 18;  // what a strip of products may take of that cache

// Where one dot product for each position is faster than whole products, measured on a core of Zen 4 (384 x 1536,
// 384 x 384, 768 x 768, 1024 x 4096): below 15 to 28 % of all elements with 64 tokens in a sample or more, 12 % with
// 32, 4 to 11 % with 16, 3 % with 4: a short dot product costs little less than a long one.
bool worth_dots(int64_t count, int64_t elements, double tokens) {
  return double(count) < double(elements) * std::min(tokens / 256, 0.2);
}

// Runs tasks that each add to the norms of all samples: make() gives a thread its run(task, sums [samples, kSums]).
// What they find is added in the order of tasks, whoever ran them.
template <typename S, typename F>
void run_tasks(int64_t tasks, int64_t samples, S* norms, const F& make) {
  std::vector<double> found(norms ? tasks * samples : 0);
  for_each_task(tasks, [&] {
    return [&, run = make(), sums = std::vector<double>(norms ? samples * cpu::kSums : 0)](int64_t task) mutable {
      std::fill(sums.begin(), sums.end(), 0.0);
      run(task, norms ? sums.data() : nullptr);
      for (int64_t b = 0; norms && b < samples; ++b) {
        const double* lanes = sums.data() + b * cpu::kSums;
        found[task * samples + b] = std::accumulate(lanes, lanes + cpu::kSums, 0.0);
      }
    };
  });
  for (int64_t b = 0; norms && b < samples; ++b) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += found[task * samples + b];
    norms[b] = S(double(norms[b]) + sum);
  }
}

template <typename T, typename I>
struct Linear {
  using S = opmath_t<T>;
  const T *dy, *x;  // [samples, tokens, m], [samples, tokens, n]
  int64_t samples, m, n;
  const I* index;  // null: all of the weight
  int64_t count;
  bool rows;
  S *total, *norms;                          // either may be null
  std::vector<int64_t> tokens{}, starts{0};  // those that are not padding, and where a sample's begin

  int64_t lines() const { return rows ? count : m; }  // rows of a product
  int64_t length(int64_t b) const { return starts[b + 1] - starts[b]; }
  S* own(int64_t first) const { return norms ? norms + first : nullptr; }

  void find_tokens(int64_t each) {
    std::vector<char> real(samples * each);
    parallel_for(0, samples * each, (1 << 15) / (m + 1) + 1, [&](int64_t begin, int64_t end) {
      cpu::find_real(dy, m, real.data(), begin, end);
    });
    for (int64_t b = 0; b < samples; ++b) {
      for (int64_t t = b * each; t < (b + 1) * each; ++t) {
        if (real[t]) tokens.push_back(t);
      }
      starts.push_back(int64_t(tokens.size()));
    }
  }

  // Calls run(first, last) for ranges of samples that are packed together.
  template <typename F>
  void for_chunks(const F& run) const {
    for (int64_t first = 0, last; first < samples; first = last) {
      last = first + 1;
      while (last < samples && last - first < kSamples && starts[last + 1] - starts[first] <= kTokens) ++last;
      if (starts[last] > starts[first]) run(first, last);
    }
  }

  // Calls run(sample, whether dy or else x, first column, last column) for all that is to be packed.
  template <typename F>
  void pack(int64_t first, int64_t last, int64_t dy_columns, const F& run) const {
    constexpr int64_t part = kBand * cpu::kPanel<S>;
    const int64_t dy_parts = ceil_div(dy_columns, part), parts = dy_parts + ceil_div(n, part);
    for_each_task((last - first) * parts, [&] {
      return [&](int64_t task) {
        const int64_t at = task % parts;
        const bool of_dy = at < dy_parts;
        const int64_t begin = (of_dy ? at : at - dy_parts) * part;
        run(first + task / parts, of_dy, begin, std::min(begin + part, of_dy ? dy_columns : n));
      };
    });
  }

  // Whole products, block by block: squared as they are made or, where elements are selected, gathered from a strip.
  void products() const {
    const int64_t height = cpu::round_up(lines(), cpu::kRows), width = cpu::round_up(n, cpu::kLanes<S>);
    int64_t most = 0;
    for_chunks([&](int64_t first, int64_t last) { most = std::max(most, starts[last] - starts[first]); });
    auto packed_dy = scratch<S>(most * height), packed_x = scratch<S>(most * width);
    for_chunks([&](int64_t first, int64_t last) {
      std::vector<int64_t> from;
      for (int64_t b = first; b <= last; ++b) from.push_back(starts[b] - starts[first]);
      pack(first, last, lines(), [&](int64_t b, bool of_dy, int64_t begin, int64_t end) {
        const int64_t* which = tokens.data() + starts[b];
        if (of_dy) {
          S* to = packed_dy.get() + from[b - first] * height;
          const I* columns = rows ? index : nullptr;
          cpu::pack_blocks<cpu::kRows, cpu::kRows>(
              dy, m, which, length(b), columns, lines(), to, begin, end, 0, length(b));
        } else {
          S* to = packed_x.get() + from[b - first] * width;
          const I* columns = nullptr;
          cpu::pack_blocks<cpu::kPanel<S>, cpu::kLanes<S>>(
              x, n, which, length(b), columns, n, to, begin, end, 0, length(b));
        }
      });
      const cpu::Packed<S> packed{packed_dy.get(),      packed_x.get(), from.data(), last - first, lines(), n,
                                  cpu::register_bytes()};
      if (index && !rows) gather(packed, own(first));
      else square(packed, own(first));
    });
  }

  void square(const cpu::Packed<S>& packed, S* own_norms) const {
    const int64_t strips = ceil_div(packed.m, kStrip), band = kBand * cpu::kPanel<S>;
    run_tasks(strips * ceil_div(n, band), packed.samples, own_norms, [&] {
      return [&](int64_t task, double* sums) {
        const int64_t r = task % strips * kStrip, c = task / strips * band;
        cpu::square_products(packed, r, std::min(r + kStrip, packed.m), c, std::min(c + band, n), total, sums);
      };
    });
  }

  void gather(const cpu::Packed<S>& packed, S* own_norms) const {
    const int64_t stride = cpu::round_up(n, cpu::kLanes<S>), fits = kStripBytes / (stride * int64_t(sizeof(S)));
    const int64_t strip = std::clamp(fits / cpu::kRows * cpu::kRows, cpu::kRows, kStrip);
    run_tasks(ceil_div(m, strip), packed.samples, own_norms, [&] {
      return [&, products = scratch<S>(strip * stride), at = scratch<int32_t>(strip * n)](int64_t task, double* sums) {
        const int64_t row = task * strip, end = std::min(row + strip, m);
        const I* from = std::lower_bound(index, index + count, row * n);
        const I* to = std::lower_bound(from, index + count, end * n);
        if (from == to) return;
        int64_t r = row;
        for (const I* k = from; k < to; ++k) {
          while (*k >= (r + 1) * n) ++r;
          at[k - from] = int32_t((r - row) * stride + (*k - r * n));
        }
        S* own_total = total ? total + (from - index) : nullptr;
        cpu::square_selected(packed, row, end, at.get(), to - from, products.get(), own_total, sums);
      };
    });
  }

  // Tokens of a panel of sample b for dots(): as masked_grad_linear chooses them, evened out.
  int64_t panel(int64_t b) const {
    const int64_t fits = cpu::chunk_for(n, length(b), sizeof(S));
    if (fits == 0) return cpu::kLine;
    return cpu::round_up(ceil_div(length(b), ceil_div(length(b), fits)), cpu::kLine);
  }

  // A dot product for each position and sample, over panels as masked_grad_linear packs them.
  void dots() const {
    const int64_t block = std::clamp<int64_t>(count / 32, 512, 16384);  // positions of a task
    int64_t most = 0;
    for_chunks([&](int64_t first, int64_t last) {
      int64_t sum = 0;
      for (int64_t b = first; b < last; ++b) sum += cpu::round_up(length(b), panel(b));
      most = std::max(most, sum);
    });
    auto dy_panels = scratch<S>(most * m), x_panels = scratch<S>(most * n);
    for_chunks([&](int64_t first, int64_t last) {
      std::vector<int64_t> from{0};  // where a sample's panels begin, in tokens
      for (int64_t b = first; b < last; ++b) from.push_back(from.back() + cpu::round_up(length(b), panel(b)));
      pack(first, last, m, [&](int64_t b, bool of_dy, int64_t begin, int64_t end) {
        const int64_t width = of_dy ? m : n, each = panel(b);
        S* panels = (of_dy ? dy_panels : x_panels).get() + from[b - first] * width;
        for (int64_t t = starts[b]; t < starts[b + 1]; t += each, panels += each * width) {
          const int64_t here = std::min(each, starts[b + 1] - t);
          cpu::pack(of_dy ? dy : x, tokens.data() + t, panels, width, each, here, begin, end);
        }
      });
      run_tasks(ceil_div(count, block), last - first, own(first), [&] {
        return [&, row = scratch<int32_t>(block), column = scratch<int32_t>(block), found = scratch<S>(block)](
                   int64_t task, double* sums) {
          const int64_t k = task * block, here = std::min(block, count - k);
          for (int64_t i = 0; i < here; ++i) {
            row[i] = int32_t(index[k + i] / n);
            column[i] = int32_t(index[k + i] - row[i] * n);
          }
          for (int64_t b = first; b < last; ++b) {
            std::fill(found.get(), found.get() + here, S(0));
            for (int64_t t = from[b - first]; t < from[b - first + 1]; t += panel(b)) {
              const S *of_x = x_panels.get() + t * n, *of_dy = dy_panels.get() + t * m;
              cpu::dot_panel(of_x, of_dy, panel(b), row.get(), column.get(), found.get(), 0, here);
            }
            double* own_sums = sums ? sums + (b - first) * cpu::kSums : nullptr;
            cpu::square_sums(found.get(), here, total ? total + k : nullptr, own_sums);
          }
        };
      });
    });
  }
};

void fisher_linear_(
    Tensor grad_output, Tensor input, MaybeTensor total, MaybeTensor norms, MaybeTensor positions, bool rows) {
  check_activations(grad_output, input);
  const int64_t samples = input.size(0), each = input.size(1), m = grad_output.size(2), n = input.size(2);
  STD_TORCH_CHECK(std::max(m, n) < (1 << 27), "places within a strip of a weight so long do not fit 32 bits");
  const int64_t count = positions ? positions->numel() : 0;
  with_floating(input.scalar_type(), "fisher_linear_", [&](auto zero) {
    using T = decltype(zero);
    using S = opmath_t<T>;
    const int64_t elements = !positions ? m * n : rows ? product(count, n) : count;
    S* sum = sum_pointer<S>(total, elements, "total");
    S* norm = sum_pointer<S>(norms, samples, "norms");
    const T *dy = data<T>(grad_output, "grad_output"), *x = data<T>(input, "input");
    with_selection(positions, sum, elements, norm, samples, [&](const auto* index) {
      if (index) check_positions(index, count, rows ? m : m * n);
      if (samples == 0 || each == 0 || m == 0 || n == 0) return;
      using I = std::remove_const_t<std::remove_pointer_t<decltype(index)>>;
      Linear<T, I> linear{dy, x, samples, m, n, index, count, index && rows, sum, norm};
      linear.find_tokens(each);
      const double real = double(linear.tokens.size()) / double(samples);
      if (index && !rows && worth_dots(count, m * n, real)) linear.dots();
      else linear.products();
    });
  });
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) { m.impl("fisher_linear_", TORCH_BOX(&sk::fisher_linear_)); }
