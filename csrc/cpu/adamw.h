// AdamW over elements [begin, end) of one tensor's compact state.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common.h"
#include "../rules/adamw.h"
#include "../rules/units.h"
#include "prefetch.h"
#include "round.h"

namespace sk::cpu {

// The steps of tensors whose positions differ in step count. Step counts take few distinct values, and a power costs as
// much as many elements: what was made for a step count is kept where the next position of that step count looks for
// it.
template <typename T>
class PositionSteps {
 public:
  PositionSteps(const float* step_counts, const AdamwOptions& options) : step_counts_(step_counts), options_(options) {
    std::fill(known_, known_ + kKept, NAN);  // equal to no step count
  }

  // Sets what depends on the step count, for the position in this slot.
  SK_INLINE void set(int64_t slot, T& step_size, T& inv_sqrt_bias2) {
    const float step_count = step_counts_[slot];
    uint32_t bits;
    std::memcpy(&bits, &step_count, sizeof(bits));
    const uint32_t at = (bits * 0x9E3779B1u) >> (32 - kBits);
    if (known_[at] != step_count) keep(at, step_count);
    step_size = step_size_[at];
    inv_sqrt_bias2 = inv_sqrt_bias2_[at];
  }

 private:
  // Seldom called, and not a part of the loops, which its powers would slow down.
  __attribute__((noinline)) void keep(uint32_t at, float step_count) {
    const auto step = adamw_step<T>(step_count, options_);
    known_[at] = step_count;
    step_size_[at] = step.step_size;
    inv_sqrt_bias2_[at] = step.inv_sqrt_bias2;
  }

  static constexpr int kBits = 6, kKept = 1 << kBits;
  const float* step_counts_;
  const AdamwOptions& options_;
  float known_[kKept];
  T step_size_[kKept], inv_sqrt_bias2_[kKept];
};

struct SameSteps {
  SameSteps(const float*, const AdamwOptions&) {}
};

struct AdamwTask {
  void* values;      // [numel]: compact form. null: the weight and its gradient are read where they lie
  const void* grad;  // [numel], or as the weight
  void *exp_avg, *exp_avg_sq, *maximum;  // [numel]; maximum may be null
  void* dense;                           // the weight
  const void* positions;                 // [K]; of columns, where they begin
  const float* step_counts;              // [K], or null: all positions have taken the same steps
  const AdamwOptions* options;           // for step counts
  Rounding rounding;  // of what is narrower than the arithmetic; step: where there are no step counts
  Units units;
  int64_t count;  // K
  AdamwStep<float> step32;
  AdamwStep<double> step64;

  // The random bits of one array at a position of the weight, which lies in this slot.
  uint32_t random(int64_t slot, int64_t position, uint32_t array) const {
    Rounding own = rounding;
    if (step_counts) own.step = counter_of(step_counts[slot]);
    return random_bits(own, position, array);
  }
};

template <typename T>
const AdamwStep<T>& step_of(const AdamwTask& task) {
  if constexpr (std::is_same_v<T, double>) return task.step64;
  else return task.step32;
}

constexpr int64_t kBlock = 64;  // elements computed together

// The rule over n neighbours; `out` may be x itself.
template <bool amsgrad, typename T>
inline __attribute__((always_inline)) void adamw_run(
    const T* x, const T* __restrict__ g, T* __restrict__ m, T* __restrict__ v, T* __restrict__ maximum, T* out,
    int64_t n, const AdamwStep<T>& step) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i)
    out[i] = adamw<amsgrad>(x[i], g[i], m[i], v[i], amsgrad ? maximum + i : nullptr, step);
}

// The same for n single elements, at most kBlock, that differ in step count; the first lies in slot `first`.
template <bool amsgrad, typename T>
inline __attribute__((always_inline)) void adamw_run_per_position(
    const T* x, const T* __restrict__ g, T* __restrict__ m, T* __restrict__ v, T* __restrict__ maximum, T* out,
    int64_t n, const AdamwStep<T>& step, PositionSteps<T>& step_counts, int64_t first) {
  alignas(64) T step_size[kBlock], inv_sqrt_bias2[kBlock];
  for (int64_t i = 0; i < n; ++i) step_counts.set(first + i, step_size[i], inv_sqrt_bias2[i]);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    AdamwStep<T> own = step;
    own.step_size = step_size[i];
    own.inv_sqrt_bias2 = inv_sqrt_bias2[i];
    out[i] = adamw<amsgrad>(x[i], g[i], m[i], v[i], amsgrad ? maximum + i : nullptr, own);
  }
}

// Calls f(first, slot, at, n) for every run of elements that are neighbours in both tensors: of rows and blocks.
template <typename I, typename F>
inline __attribute__((always_inline)) void for_runs(
    const Units& units, const I* positions, int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end;) {
    const int64_t run = i / units.width;
    const int64_t column = i - run * units.width;
    const int64_t n = std::min(end - i, units.width - column);
    if (units.one_run()) {
      f(i, run, int64_t(positions[run]) * units.width + column, n);
    } else {
      const int64_t slot = run / units.height, row = run - slot * units.height;
      const auto tile = units.tile(positions[slot]);
      if (row < tile.rows && column < tile.columns) {
        f(i, slot, tile.begin + row * units.n + column, std::min(n, tile.columns - column));
      }
    }
    i += n;
  }
}

// Fetches the scattered lines of one block: kAhead positions before they are needed, or one line of the matrix.
template <typename I, typename P>
inline __attribute__((always_inline)) void prefetch_block(
    const P* dense, const I* positions, int64_t i, int64_t end, int64_t pitch) {
  if (pitch != 0) {
    for (int64_t j = i; j < std::min(i + kBlock, end); ++j) prefetch(dense + pitch + positions[j]);
    return;
  }
  for (int64_t j = i + kAhead; j < std::min(i + kAhead + kBlock, end); ++j) prefetch(dense + positions[j]);
}

// Fetches the matrix's part of a block's row kRunsAhead rows before it is needed: hardware prefetchers stop at the end
// of a row (measured on Zen 4, 5 % of 50M floats in 64 x 64 blocks, two threads: 2.6 -> 2.0 ms).
template <typename I, typename P>
inline __attribute__((always_inline)) void prefetch_run(
    const Units& units, const I* positions, int64_t count, int64_t run, const P* dense) {
  constexpr int64_t kRunsAhead = 4, kMost = 4096 / sizeof(P), kStep = 64 / sizeof(P);
  const int64_t slot = (run + kRunsAhead) / units.height, row = run + kRunsAhead - slot * units.height;
  if (slot >= count) return;
  const auto tile = units.tile(positions[slot]);
  if (row >= tile.rows) return;
  for (int64_t j = 0; j < std::min(tile.columns, kMost); j += kStep) prefetch(dense + tile.begin + row * units.n + j);
}

// T is the arithmetic's type, W the weight's, S the state's, I the positions'.
//
// Compact values step in place; the weight receives them, rounded to nearest: nothing is lost, for the values stay.
// Otherwise the weight and its gradient are read where they lie, stepped, and the weight written back.
template <typename T, typename W, typename S, typename I, bool compact, bool amsgrad, bool per_position>
SK_CLONES void adamw_at(const AdamwTask& task, int64_t begin, int64_t end) {
  T* __restrict__ values = static_cast<T*>(task.values);
  const auto* __restrict__ grad = static_cast<const std::conditional_t<compact, T, W>*>(task.grad);
  S* __restrict__ m = static_cast<S*>(task.exp_avg);
  S* __restrict__ v = static_cast<S*>(task.exp_avg_sq);
  S* __restrict__ maximum = static_cast<S*>(task.maximum);
  W* __restrict__ dense = static_cast<W*>(task.dense);
  const I* positions = static_cast<const I*>(task.positions);
  const AdamwStep<T> step = step_of<T>(task);
  const bool stochastic = task.rounding.stochastic;
  std::conditional_t<per_position, PositionSteps<T>, SameSteps> step_counts(task.step_counts, *task.options);
  alignas(64) T x[kBlock], g[kBlock];
  const Units units = task.units;
  const bool columns = units.side_by_side();
  // Of narrower blocks, finding a row costs more than missing it.
  const bool fetches = !units.one_run() && units.width * int64_t(sizeof(W)) >= 128;
  if (units.size() != 1 && !columns) {
    constexpr int64_t kRun = compact && std::is_same_v<S, T> ? INT64_MAX : kBlock;
    for_runs(units, positions, begin, end, [&](int64_t i, int64_t slot, int64_t first, int64_t count) {
      AdamwStep<T> own = step;
      if constexpr (per_position) step_counts.set(slot, own.step_size, own.inv_sqrt_bias2);
      if (fetches) {
        prefetch_run(units, positions, task.count, i / units.width, dense);
        if constexpr (!compact) prefetch_run(units, positions, task.count, i / units.width, grad);
      }
      for (int64_t done = 0; done < count; done += kRun) {
        const int64_t n = std::min(count - done, kRun), o = i + done, at = first + done;
        const auto draw = [&](int64_t j, uint32_t array) { return task.random(slot, at + j, array); };
        if constexpr (!compact) {
          for (int64_t j = 0; j < n; ++j) {
            x[j] = T(dense[at + j]);
            g[j] = T(grad[at + j]);
          }
        }
        with_state<amsgrad, kBlock, T>(m + o, v + o, maximum + o, n, stochastic, draw, [&](T* m, T* v, T* maximum) {
          if constexpr (compact) {
            adamw_run<amsgrad>(values + o, grad + o, m, v, maximum, values + o, n, own);
          } else {
            adamw_run<amsgrad>(x, g, m, v, maximum, x, n, own);
          }
        });
        if constexpr (compact) {
          for (int64_t j = 0; j < n; ++j) dense[at + j] = W(values[o + j]);
        } else {
          narrow(x, dense + at, n, stochastic, kWeight, draw);
        }
        if constexpr (kRun != kBlock) break;
      }
    });
    return;
  }
  // Elements make one line; columns make one for each row of the matrix, `pitch` elements apart.
  const int64_t pitch = columns ? units.n : 0;
  for (int64_t start = begin; start < end;) {
    const int64_t line = columns ? start / task.count : 0, before = line * task.count, first = start - before;
    const int64_t last = std::min(task.count, end - before);
    W* line_dense = dense + line * pitch;
    const auto* line_grad = grad + (compact ? before : line * pitch);
    for (int64_t i = first; i < last; i += kBlock) {
      const int64_t n = std::min(last - i, kBlock), o = before + i;
      const auto draw = [&](int64_t j, uint32_t array) {
        return task.random(i + j, positions[i + j] + line * pitch, array);
      };
      prefetch_block(line_dense, positions, i, last, pitch);
      if constexpr (!compact) {
        prefetch_block(line_grad, positions, i, last, pitch);
        for (int64_t j = 0; j < n; ++j) {
          x[j] = T(line_dense[positions[i + j]]);
          g[j] = T(line_grad[positions[i + j]]);
        }
      }
      with_state<amsgrad, kBlock, T>(m + o, v + o, maximum + o, n, stochastic, draw, [&](T* m, T* v, T* maximum) {
        const auto run = [&](T* own, const T* own_grad) __attribute__((always_inline)) {
          if constexpr (per_position) {
            adamw_run_per_position<amsgrad>(own, own_grad, m, v, maximum, own, n, step, step_counts, i);
          } else {
            adamw_run<amsgrad>(own, own_grad, m, v, maximum, own, n, step);
          }
        };
        if constexpr (compact) run(values + o, line_grad + i);
        else run(x, g);
      });
      if constexpr (compact) {
        for (int64_t j = 0; j < n; ++j) line_dense[positions[i + j]] = W(values[o + j]);
      } else {
        W out[kBlock];
        narrow(x, out, n, stochastic, kWeight, draw);
        for (int64_t j = 0; j < n; ++j) line_dense[positions[i + j]] = out[j];
      }
    }
    start = before + last;
  }
}

// The kernel for a task whose weight, state and positions are of these dtypes, which are known to go together. Each
// form is compiled by a file of its own, side by side: they take the longest of all.
using AdamwRun = void (*)(const AdamwTask&, int64_t begin, int64_t end);
template <bool compact>
AdamwRun adamw_kernel(const AdamwTask& task, ScalarType weight, ScalarType state, ScalarType positions) {
  AdamwRun run = nullptr;
  const auto with_bool = [](bool value, const auto& f) { value ? f(std::true_type{}) : f(std::false_type{}); };
  with_floating(weight, "adamw_", [&](auto zero) {
    using W = decltype(zero);
    using T = opmath_t<W>;
    const auto with_types = [&](auto narrow, auto index) {
      using S = decltype(narrow);
      with_bool(task.maximum, [&](auto amsgrad) {
        with_bool(task.step_counts, [&](auto per_position) {
          run = adamw_at<T, W, S, decltype(index), compact, decltype(amsgrad)::value, decltype(per_position)::value>;
        });
      });
    };
    const auto with_state = [&](auto narrow) {
      if (positions == ScalarType::Int) with_types(narrow, int32_t{});
      else with_types(narrow, int64_t{});
    };
    if (state == scalar_type<T>()) return with_state(T{});
    if constexpr (std::is_same_v<T, float>) with_state(BFloat16{});
  });
  return run;
}
extern template AdamwRun adamw_kernel<true>(const AdamwTask&, ScalarType, ScalarType, ScalarType);
extern template AdamwRun adamw_kernel<false>(const AdamwTask&, ScalarType, ScalarType, ScalarType);

}  // namespace sk::cpu
