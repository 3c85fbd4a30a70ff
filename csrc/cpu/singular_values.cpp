// singular_value_grad, singular_value_grad_linear: checks, packing, division into tasks, CPU registrations.
#include "singular_values.h"

#include <algorithm>
#include <numeric>

#include "../common.h"
#include "scratch.h"

namespace sk {
namespace {

constexpr int64_t kStrip = 64;            // rows of a task, at most
constexpr int64_t kStripBytes = 1 << 19;  // what they may take of the second-level cache
constexpr int64_t kFew = 16;              // where strips are fewer, the vectors too are divided into tasks
// Panels of vectors that strips share: as many as the last-level cache holds, for from memory they come too slowly.
constexpr int64_t kBand = 8, kBandBytes = 1 << 22;
constexpr int64_t kTasks = 256;           // that leave sums of their own, at most
constexpr int64_t kTokens = 1 << 14;      // tokens of which the weight's gradient is made at a time
constexpr int64_t kTallBytes = 1 << 23;   // packed tokens that are read so slowly that strips should be tall
constexpr int64_t kGroupBytes = 1 << 24;  // vectors of small matrices that are packed at a time

int64_t strip_for(int64_t rows, int64_t row_bytes) {
  const int64_t fits = std::min(kStripBytes / row_bytes, kStrip) / cpu::kRows * cpu::kRows;
  return std::clamp(fits, cpu::kRows, cpu::round_up(std::max<int64_t>(rows, 1), cpu::kRows));
}

// Right factors [count][depth, columns], packed as register blocks read them.
template <typename S>
struct Panels {
  static constexpr int64_t kPanel = cpu::kPanel<S>, kLanes = cpu::kLanes<S>;
  int64_t depth, columns, size;
  Scratch<S> data;

  Panels(int64_t depth, int64_t columns, int64_t count = 1)
      : depth(depth), columns(columns), size(depth * cpu::round_up(columns, kLanes)), data(scratch<S>(count * size)) {}

  const S* at(int64_t i, int64_t column) const { return data.get() + i * size + column * depth; }

  template <typename T>
  void pack(const T* x, int64_t count = 1) {
    constexpr int64_t kTerms = 1024;
    const int64_t wide = kBand * kPanel, bands = ceil_div(columns, wide), parts = bands * ceil_div(depth, kTerms);
    for_each_task(count * parts, [&] {
      return [&](int64_t task) {
        const int64_t i = task / parts, begin = task % bands * wide, first = task % parts / bands * kTerms;
        const int64_t *tokens = nullptr, *rows = nullptr;
        cpu::pack_blocks<kPanel, kLanes>(
            x + i * depth * columns, columns, tokens, depth, rows, columns, data.get() + i * size, begin,
            std::min(begin + wide, columns), first, std::min(first + kTerms, depth));
      };
    });
  }
};

// Rows as a left factor: as they lie, if nothing is to be widened or filled up; or a copy.
template <typename S, typename T>
cpu::Lines<S> strip_of(const T* x, int64_t width, int64_t rows, S* to, int64_t stride) {
  if constexpr (std::is_same_v<S, T>) {
    if (rows % cpu::kRows == 0) return {x, width};
  }
  cpu::copy_strip(x, width, rows, to, stride);
  return {to, stride};
}

// Calls f(first column, columns, columns filled up to whole lines) for the panels of a band.
template <typename S, typename F>
void for_panels(int64_t begin, int64_t end, const F& f) {
  for (int64_t c = begin; c < end; c += cpu::kPanel<S>) {
    const int64_t width = std::min(cpu::kPanel<S>, end - c);
    f(c, width, cpu::round_up(width, cpu::kLanes<S>));
  }
}

// Vectors of a task, whose panels are `depth` deep. No sum depends on it.
template <typename S>
int64_t band_for(int64_t strips, int64_t rank, int64_t depth) {
  const int64_t panels = ceil_div(rank, cpu::kPanel<S>);
  const int64_t fits = std::max(kBandBytes / int64_t(depth * cpu::kPanel<S> * sizeof(S)), kBand);
  const int64_t bands = std::max(ceil_div(panels, fits), ceil_div(kFew, strips));
  return ceil_div(panels, std::min(bands, panels)) * cpu::kPanel<S>;
}

// sums[c] += the row dots of `rows` rows of G V with those of U, [rows, rank], for vectors [begin, end).
template <typename S>
void dot_strip(
    int bytes, cpu::Lines<S> g, int64_t rows, const S* v, int64_t depth, const S* u, int64_t rank, int64_t begin,
    int64_t end, S* product, double* sums) {
  for_panels<S>(begin, end, [&](int64_t c, int64_t width, int64_t panel) {
    cpu::multiply_strip(bytes, g, cpu::round_up(rows, cpu::kRows), v + c * depth, depth, panel, product, panel);
    cpu::add_products(product, panel, u + c, rank, rows, width, sums + c);
  });
}

template <typename T, typename S>
void of_matrices(const T* grad, const S* u, const S* v, int64_t count, int64_t m, int64_t n, int64_t rank, S* out) {
  const int64_t stride = cpu::round_up(n, cpu::kLanes<S>);
  const int64_t strip = strip_for(m, stride * sizeof(S)), strips = ceil_div(m, strip);
  const int64_t group = std::clamp<int64_t>(kGroupBytes / (n * rank * sizeof(S)), 1, count);
  Panels<S> panels(n, rank, group);
  const int64_t band = band_for<S>(group * strips, rank, n), bands = ceil_div(rank, band);
  const int bytes = cpu::register_bytes();
  std::vector<double> found(group * strips * rank);
  for (int64_t first = 0; first < count; first += group) {
    const int64_t here = std::min(group, count - first);
    panels.pack(v + first * n * rank, here);
    std::fill(found.begin(), found.end(), 0.0);
    for_each_task(here * strips * bands, [&] {
      return [&, g = scratch<S>(strip * stride), product = scratch<S>(strip * cpu::kPanel<S>)](int64_t task) {
        const int64_t at = task % (here * strips), i = at / strips, begin = task / (here * strips) * band;
        const int64_t row = at % strips * strip, rows = std::min(strip, m - row), from = (first + i) * m + row;
        const auto lines = strip_of(grad + from * n, n, rows, g.get(), stride);
        dot_strip<S>(
            bytes, lines, rows, panels.at(i, 0), n, u + from * rank, rank, begin, std::min(begin + band, rank),
            product.get(), found.data() + at * rank);
      };
    });
    for (int64_t i = 0; i < here; ++i) {
      for (int64_t c = 0; c < rank; ++c) {
        double sum = 0;
        for (int64_t s = 0; s < strips; ++s) sum += found[(i * strips + s) * rank + c];
        out[(first + i) * rank + c] = S(sum);
      }
    }
  }
}

template <typename T>
struct Linear {
  using S = opmath_t<T>;
  const T *dy, *x;  // [samples, each, m], [samples, each, n]
  const S *u, *v;   // [m, rank], [n, rank]
  int64_t samples, each, m, n, rank;
  S* out;  // [samples, rank]
  int bytes = cpu::register_bytes();

  // Both projections of a strip of tokens, multiplied as they are made. Sums of sample b that task k finds stand in row
  // b + k: a task begins with the sample where the one before it ended, or with a later one.
  void by_projections() const {
    Panels<S> of_u(m, rank), of_v(n, rank);
    of_u.pack(u);
    of_v.pack(v);
    const int64_t tokens = samples * each, dy_stride = cpu::round_up(m, cpu::kLanes<S>);
    const int64_t x_stride = cpu::round_up(n, cpu::kLanes<S>);
    const int64_t strip = strip_for(tokens, (dy_stride + x_stride) * sizeof(S));
    const int64_t share = ceil_div(ceil_div(tokens, strip), kTasks) * strip;  // tokens of a task
    const int64_t shares = ceil_div(tokens, share), band = band_for<S>(shares, rank, m + n);
    std::vector<double> found((samples + shares) * rank);
    for_each_task(shares * ceil_div(rank, band), [&] {
      return [&, a = scratch<S>(strip * dy_stride), b = scratch<S>(strip * x_stride),
              of_dy = scratch<S>(strip * cpu::kPanel<S>), of_x = scratch<S>(strip * cpu::kPanel<S>)](int64_t task) {
        const int64_t k = task % shares, begin = task / shares * band, last = std::min(tokens, (k + 1) * share);
        for (int64_t first = k * share; first < last; first += strip) {
          const int64_t count = std::min(strip, last - first), rows = cpu::round_up(count, cpu::kRows);
          const auto dy_lines = strip_of(dy + first * m, m, count, a.get(), dy_stride);
          const auto x_lines = strip_of(x + first * n, n, count, b.get(), x_stride);
          for_panels<S>(begin, std::min(begin + band, rank), [&](int64_t c, int64_t width, int64_t panel) {
            cpu::multiply_strip<S>(bytes, dy_lines, rows, of_u.at(0, c), m, panel, of_dy.get(), panel);
            cpu::multiply_strip<S>(bytes, x_lines, rows, of_v.at(0, c), n, panel, of_x.get(), panel);
            for (int64_t t = 0, end; t < count; t = end) {
              const int64_t sample = (first + t) / each;
              end = std::min(count, (sample + 1) * each - first);
              cpu::add_products(
                  of_dy.get() + t * panel, panel, of_x.get() + t * panel, panel, end - t, width,
                  found.data() + (sample + k) * rank + c);
            }
          });
        }
      };
    });
    parallel_for(0, samples, (1 << 15) / rank + 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t from = b * each / share, to = ((b + 1) * each - 1) / share;
        for (int64_t c = 0; c < rank; ++c) {
          double sum = 0;
          for (int64_t k = from; k <= to; ++k) sum += found[(b + k) * rank + c];
          out[b * rank + c] = S(sum);
        }
      }
    });
  }

  // A strip of rows of the weight's gradient at a time, then as for a gradient that is given. Of one sample.
  void by_gradient() const {
    const int64_t stride = cpu::round_up(n, cpu::kLanes<S>), even = cpu::round_up(ceil_div(m, kFew), cpu::kRows);
    const bool tall = std::min(each, kTokens) * stride * int64_t(sizeof(S)) > kTallBytes;
    const int64_t most = tall ? kStrip : std::max(even, kStrip / 2);
    const int64_t strip = std::min(strip_for(m, stride * sizeof(S)), most), strips = ceil_div(m, strip);
    Panels<S> of_v(n, rank);
    of_v.pack(v);
    std::vector<double> found(strips * rank);
    for (int64_t first = 0; first < each; first += kTokens) {
      const int64_t tokens = std::min(kTokens, each - first);
      Panels<S> of_x(tokens, n);
      of_x.pack(x + first * n);
      for_each_task(strips, [&] {
        return [&, g = scratch<S>(strip * stride), of_dy = scratch<S>(strip * cpu::kDepth),
                product = scratch<S>(strip * cpu::kPanel<S>)](int64_t task) {
          const int64_t row = task * strip, rows = std::min(strip, m - row);
          for (int64_t t = 0; t < tokens; t += cpu::kDepth) {
            const int64_t here = std::min(cpu::kDepth, tokens - t), *which = nullptr;
            cpu::pack_blocks<cpu::kRows, cpu::kRows>(
                dy + (first + t) * m + row, m, which, here, which, rows, of_dy.get(), 0, rows, 0, here);
            for_panels<S>(0, n, [&](int64_t c, int64_t, int64_t panel) {
              cpu::multiply_packed(
                  bytes, of_dy.get(), cpu::round_up(rows, cpu::kRows), of_x.at(0, c) + t * panel, here, panel, t > 0,
                  g.get() + c, stride);
            });
          }
          dot_strip<S>(
              bytes, {g.get(), stride}, rows, of_v.at(0, 0), n, u + row * rank, rank, 0, rank, product.get(),
              found.data() + task * rank);
        };
      });
    }
    for (int64_t c = 0; c < rank; ++c) {
      double sum = 0;
      for (int64_t s = 0; s < strips; ++s) sum += found[s * rank + c];
      out[c] = S(sum);
    }
  }

  void run(bool per_sample) const {
    const double tokens = double(samples * each), weight = double(m) * double(n);
    if (per_sample || tokens * double(rank) * double(m + n) <= weight * (tokens + double(rank))) {
      const int64_t own = per_sample ? samples : 1;
      Linear{dy, x, u, v, own, samples * each / own, m, n, rank, out}.by_projections();
    } else if (n <= m) {
      Linear{dy, x, u, v, 1, samples * each, m, n, rank, out}.by_gradient();
    } else {  // the transposed gradient has shorter rows
      Linear{x, dy, v, u, 1, samples * each, n, m, rank, out}.by_gradient();
    }
  }
};

template <typename S>
const S* vectors(const Tensor& x, int64_t dims, int64_t count, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == dims && x.is_contiguous() && x.scalar_type() == scalar_type<S>() && x.numel() == count, name,
      " must be contiguous, of ", count, " elements in fp32 (fp64 for fp64 gradients)");
  return data<S>(x, name);
}

Tensor singular_value_grad(Tensor grad, Tensor u, Tensor v) {
  STD_TORCH_CHECK(grad.dim() == 3 && grad.is_contiguous(), "grad must be contiguous, [matrices, rows, columns]");
  STD_TORCH_CHECK(u.dim() == 3, "u must be [matrices, rows, vectors]");
  const int64_t count = grad.size(0), m = grad.size(1), n = grad.size(2), rank = u.size(2);
  Tensor out = torch::stable::new_zeros(u, {count, rank});
  with_floating(grad.scalar_type(), "singular_value_grad", [&](auto zero) {
    using T = decltype(zero);
    using S = opmath_t<T>;
    const S* left = vectors<S>(u, 3, product(product(count, m), rank), "u");
    const S* right = vectors<S>(v, 3, product(product(count, n), rank), "v");
    if (grad.numel() == 0 || rank == 0) return;
    const T* g = data<T>(grad, "grad");
    of_matrices<T, S>(g, left, right, count, m, n, rank, static_cast<S*>(out.mutable_data_ptr()));
  });
  return out;
}

Tensor singular_value_grad_linear(Tensor grad_output, Tensor input, Tensor u, Tensor v, bool per_sample) {
  check_activations(grad_output, input);
  STD_TORCH_CHECK(u.dim() == 2, "u must be [rows, vectors]");
  const int64_t samples = input.size(0), each = input.size(1), m = grad_output.size(2), n = input.size(2);
  const int64_t rank = u.size(1);
  const std::vector<int64_t> shape = per_sample ? std::vector<int64_t>{samples, rank} : std::vector<int64_t>{rank};
  Tensor out = torch::stable::new_zeros(u, shape);
  with_floating(input.scalar_type(), "singular_value_grad_linear", [&](auto zero) {
    using T = decltype(zero);
    using S = opmath_t<T>;
    const S *left = vectors<S>(u, 2, product(m, rank), "u"), *right = vectors<S>(v, 2, product(n, rank), "v");
    if (grad_output.numel() == 0 || input.numel() == 0 || rank == 0) return;
    const T *dy = data<T>(grad_output, "grad_output"), *x = data<T>(input, "input");
    S* to = static_cast<S*>(out.mutable_data_ptr());
    Linear<T>{dy, x, left, right, samples, each, m, n, rank, to}.run(per_sample);
  });
  return out;
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) {
  m.impl("singular_value_grad", TORCH_BOX(&sk::singular_value_grad));
  m.impl("singular_value_grad_linear", TORCH_BOX(&sk::singular_value_grad_linear));
}
