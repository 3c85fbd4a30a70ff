// AdamW over the rows that a sparse gradient lists: entries [begin, end) of the sorted list.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common.h"
#include "../rules/adamw.h"
#include "adamw.h"
#include "prefetch.h"
#include "round.h"

namespace sk::cpu {

// A line of the gradient, and the row that it is for.
struct RowEntry {
  int64_t row, line;
};

struct AdamwRowsTask {
  void* param;              // [V, width]
  const void* grad_values;  // [count, width]
  const RowEntry* entries;     // [count], by row
  const int32_t* slots;        // [V], or null: a row is its own slot
  void *exp_avg, *exp_avg_sq, *maximum;  // [S, width]; maximum may be null
  const void* scales;                    // [count or 1, 2]
  bool scales_each;
  int64_t count, width;
  AdamwStep<double> step;  // but for decay and step_size
  Rounding rounding;       // of what is narrower than the arithmetic
};

// Fetches columns [c, c + n) of a row, line by line.
template <typename P>
inline __attribute__((always_inline)) void prefetch_columns(const P* row, int64_t c, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(P))) prefetch(row + c + j);
}

// An entry owns its row if it is the first of its id: one thread sums the duplicates, in order, and steps the row.
// T is the arithmetic's type, W the parameter's, S the state's.
template <typename T, typename W, typename S, bool amsgrad>
SK_CLONES void adamw_rows(const AdamwRowsTask& task, int64_t begin, int64_t end) {
  const int64_t width = task.width;
  const T* scales = static_cast<const T*>(task.scales);
  const W* grads = static_cast<const W*>(task.grad_values);
  W* param = static_cast<W*>(task.param);
  S* exp_avg = static_cast<S*>(task.exp_avg);
  S* exp_avg_sq = static_cast<S*>(task.exp_avg_sq);
  S* maximum = static_cast<S*>(task.maximum);
  AdamwStep<T> step{T(task.step.beta2), T(task.step.rest1), T(task.step.rest2), T(0), T(0), T(1),
                    T(task.step.eps),   T(task.step.sign)};
  const auto line_of = [&](int64_t row) { return (task.slots ? task.slots[row] : row) * width; };
  std::vector<T> sum(width);
  alignas(64) T x[kBlock];
  while (begin > 0 && begin < end && task.entries[begin].row == task.entries[begin - 1].row) ++begin;
  for (int64_t i = begin, next; i < end; i = next) {
    const int64_t row = task.entries[i].row, line = line_of(row);
    const W* grad = grads + task.entries[i].line * width;
    for (next = i + 1; next < task.count && task.entries[next].row == row; ++next) {
      const W* more = grads + task.entries[next].line * width;
      if (next == i + 1) {
        for (int64_t j = 0; j < width; ++j) sum[j] = T(grad[j]) + T(more[j]);
      } else {
        for (int64_t j = 0; j < width; ++j) sum[j] += T(more[j]);
      }
    }
    const bool alone = next == i + 1;
    const bool more = next < end;
    const int64_t next_row = more ? task.entries[next].row : row, next_line = line_of(next_row);
    const W* next_grad = grads + task.entries[more ? next : i].line * width;
    const T* own = scales + (task.scales_each ? 2 * task.entries[i].line : 0);
    step.decay = own[0];
    step.step_size = own[1];
    for (int64_t c = 0; c < width; c += kBlock) {
      const int64_t n = std::min(width - c, kBlock);
      if (more) {
        prefetch_columns(next_grad, c, n);
        prefetch_columns(param + next_row * width, c, n);
        prefetch_columns(exp_avg + next_line, c, n);
        prefetch_columns(exp_avg_sq + next_line, c, n);
      }
      W* to = param + row * width + c;
      if (alone) {
        for (int64_t j = 0; j < n; ++j) sum[c + j] = T(grad[c + j]);
      }
      for (int64_t j = 0; j < n; ++j) x[j] = T(to[j]);
      const int64_t at = line + c, position = row * width + c;
      const auto draw = [&](int64_t j, uint32_t array) { return random_bits(task.rounding, position + j, array); };
      const bool stochastic = task.rounding.stochastic;
      S* most = amsgrad ? maximum + at : nullptr;
      with_state<amsgrad, kBlock, T>(exp_avg + at, exp_avg_sq + at, most, n, stochastic, draw, [&](T* m, T* v, T* u) {
        adamw_run<amsgrad>(x, sum.data() + c, m, v, u, x, n, step);
      });
      narrow(x, to, n, stochastic, kWeight, draw);
    }
  }
}

}  // namespace sk::cpu
