// Two-sample Kolmogorov-Smirnov: checks, one row after the other, CPU registration.
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

#include "../common.h"
#include "ks_16.h"
#include "scratch.h"

namespace sk {
namespace {

constexpr int64_t kGrain = 1 << 14;         // elements that are worth a thread
constexpr int64_t kNarrow = (1 << 16) - 1;  // samples whose counts fit 16 bits
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // whose counts fit 32, and their differences 64
constexpr int64_t kSmall = 1 << 28;         // differences that leave room in 32 bits

// What a thread needs to test rows, one after the other.
template <typename T, typename C, typename D>
class Tester {
 public:
  using F = opmath_t<T>;

  Tester(int64_t n, int64_t m, cpu::Steps steps)
      : n_(n), m_(m), steps_(steps), wide_(scratch<F>(std::is_same_v<T, F> ? 0 : n + m)) {
    most_buckets_ = cpu::kLanes << cpu::shift_for(n + m);
    if (sizeof(T) == 2) most_buckets_ = std::min(8 * most_buckets_, cpu::kMostBuckets);
    for (int i = 0; i < cpu::kLevels; ++i) {
      parts_[i] = {
          scratch<uint16_t>(n + m + 2 * most_buckets_), scratch<uint8_t>(2 * most_buckets_),
          scratch<C>(2 * most_buckets_), scratch<F>(n + m), scratch<cpu::Candidate<F>>(std::min(n + m, most_buckets_))};
      Parts& own = parts_[i];
      uint16_t* places = own.places.get();
      levels_[i] = {
          places,
          places + n,
          places + n + m,
          places + n + m + most_buckets_,
          own.marks.get(),
          own.marks.get() + most_buckets_,
          own.counts.get(),
          own.counts.get() + most_buckets_,
          own.gathered.get(),
          own.candidates.get()};
    }
  }

  // False where a sample holds NaN.
  bool run(const T* x, const T* y, cpu::Extremes<F>& found) {
    if constexpr (sizeof(T) == 2) {
      return run_16(x, y, found);
    } else {
      return run_wide(x, y, n_ == m_ && std::memcmp(x, y, n_ * sizeof(T)) == 0, found);
    }
  }

 private:
  struct Parts {
    Scratch<uint16_t> places;
    Scratch<uint8_t> marks;
    Scratch<C> counts;
    Scratch<F> gathered;
    Scratch<cpu::Candidate<F>> candidates;
  };

  bool run_wide(const F* x, const F* y, bool same, cpu::Extremes<F>& found) {
    cpu::Range<F> range = cpu::range(x, n_, false);
    if (same && !range.nan) found.see(0, range.least, true);
    if (same || range.nan) return !range.nan;
    range = cpu::joined(range, cpu::range(y, m_, false));
    if (range.nan) return false;
    if (std::isinf(range.least) || std::isinf(range.most)) {
      range = cpu::joined(cpu::range(x, n_, true), cpu::range(y, m_, true));
      if (range.least > range.most) range.least = range.most = 0;
    }
    if (n_ + m_ > cpu::kSortAtOnce) {
      cpu::search<D>(x, n_, y, m_, range, 0, steps_, levels_, cpu::kLevels, found);
    } else {
      F* copy = levels_[0].gathered;
      std::copy(x, x + n_, copy);
      std::copy(y, y + m_, copy + n_);
      cpu::merge(copy, n_, copy + n_, m_, 0, steps_, found);
    }
    return true;
  }

  bool run_16(const T* x, const T* y, cpu::Extremes<F>& found) {
    const auto *x_bits = reinterpret_cast<const uint16_t*>(x), *y_bits = reinterpret_cast<const uint16_t*>(y);
    constexpr uint16_t infinity = std::is_same_v<T, BFloat16> ? 0x7f80 : 0x7c00;
    const bool same = n_ == m_ && std::memcmp(x, y, n_ * sizeof(T)) == 0;
    const cpu::Magnitudes a = cpu::magnitudes(x_bits, n_, infinity), b = cpu::magnitudes(y_bits, m_, infinity);
    if (a.nan || b.nan) return false;
    const int32_t least = std::min(a.least, b.least);
    const int32_t middle = std::max(0, std::max(a.most, b.most) - least + 1);
    int shift = 2;
    while ((cpu::kLanes << shift) < 2 * middle + 1) ++shift;
    if (!same && (cpu::kLanes << shift) <= most_buckets_) {
      cpu::search_whole<D>(x_bits, n_, y_bits, m_, least, middle, shift, steps_, levels_[0], found, [](uint16_t bits) {
        T value;
        std::memcpy(&value, &bits, sizeof(value));
        return F(value);
      });
      return true;
    }
    cpu::widen(x, n_, wide_.get());
    cpu::widen(y, m_, wide_.get() + n_);
    return run_wide(wide_.get(), wide_.get() + n_, same, found);
  }

  int64_t n_, m_;
  cpu::Steps steps_;
  int64_t most_buckets_;
  Scratch<F> wide_;
  Parts parts_[cpu::kLevels];
  cpu::Level<F, C> levels_[cpu::kLevels];
};

template <typename T, typename C, typename D>
void test_rows(const Tensor& x, const Tensor& y, cpu::Steps steps, int64_t* differences, T* locations) {
  const int64_t n = x.size(1), m = y.size(1);
  const T *x_rows = data<T>(x, "x"), *y_rows = data<T>(y, "y");
  parallel_for(0, x.size(0), kGrain / (n + m) + 1, [&](int64_t begin, int64_t end) {
    Tester<T, C, D> tester(n, m, steps);
    for (int64_t row = begin; row < end; ++row) {
      cpu::Extremes<opmath_t<T>> found;
      if (!tester.run(x_rows + row * n, y_rows + row * m, found)) {
        differences[row] = 0;
        locations[row] = T(NAN);
        continue;
      }
      const bool low = steps.low && (!steps.high || -found.low > found.high);
      differences[row] = low ? found.low : found.high;
      locations[row] = T((low ? found.low_at : found.high_at) + 0);  // -0 becomes 0
    }
  });
}

std::tuple<Tensor, Tensor> ks_2samp(Tensor x, Tensor y, int64_t alternative) {
  STD_TORCH_CHECK(
      x.dim() == 2 && y.dim() == 2 && x.is_contiguous() && y.is_contiguous() && x.scalar_type() == y.scalar_type() &&
          x.size(0) == y.size(0),
      "x and y must be contiguous, of two dimensions and one dtype, with the same rows");
  const int64_t rows = x.size(0), n = x.size(1), m = y.size(1);
  STD_TORCH_CHECK(n > 0 && m > 0, "x and y must have columns");
  STD_TORCH_CHECK(std::max(n, m) <= kMost, "samples must have fewer than 2^31 numbers");
  Tensor differences = torch::stable::new_empty(x, {rows}, ScalarType::Long);
  Tensor locations = torch::stable::new_empty(x, {rows});
  const int64_t divisor = std::gcd(n, m);
  const cpu::Steps steps{m / divisor, n / divisor, alternative >= 0, alternative <= 0};
  with_floating(x.scalar_type(), "ks_2samp", [&](auto zero) {
    using T = decltype(zero);
    auto* to = static_cast<int64_t*>(differences.mutable_data_ptr());
    auto* at = static_cast<T*>(locations.mutable_data_ptr());
    if (std::max(n, m) <= kNarrow && n * steps.up < kSmall) test_rows<T, uint32_t, int32_t>(x, y, steps, to, at);
    else test_rows<T, uint64_t, int64_t>(x, y, steps, to, at);
  });
  return {differences, locations};
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) { m.impl("ks_2samp", TORCH_BOX(&sk::ks_2samp)); }
