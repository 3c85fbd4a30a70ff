// take_columns and put_columns: checks, dispatch, CPU registrations.
#include "columns.h"

#include "../common.h"
#include "positions.h"
#include "scratch.h"

namespace sk {
namespace {

constexpr int64_t kGrain = 1 << 15;  // bytes that are worth a thread

// Calls f with a zero of an unsigned integer of that many bytes.
template <typename F>
void with_bytes(int64_t bytes, const F& f) {
  switch (bytes) {
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    case 8: return f(uint64_t{});
    default: STD_TORCH_CHECK(false, "elements of x must have 2, 4 or 8 bytes");
  }
}

// move(x, columns, lanes, out, begin, end) for rows of x, of which the wider side has `width` columns.
template <typename F>
void for_rows(const Tensor& x, const Tensor& columns, int64_t width, Tensor& out, const F& move) {
  const int64_t count = columns.numel();
  with_positions(columns, [&](const auto* index) {
    check_positions(index, count, width);
    if (x.size(0) == 0 || width == 0) return;  // the other may be of any size
    with_bytes(x.element_size(), [&](auto zero) {
      using U = decltype(zero);
      constexpr int64_t kLanes = 64 / sizeof(U);
      const int64_t vectors = (width + kLanes - 1) / kLanes;
      const auto lanes = scratch<cpu::Lanes>(vectors);
      const bool fast = cpu::compresses();
      if (fast) cpu::find_lanes<kLanes>(index, count, vectors, lanes.get());
      const U* from = rows_data<U>(x, "x");
      auto* to = static_cast<U*>(out.mutable_data_ptr());
      const int64_t grain = kGrain / ((count + width) * int64_t(sizeof(U)) + 1) + 1;
      parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
        move(from, index, fast ? static_cast<const cpu::Lanes*>(lanes.get()) : nullptr, to, begin, end);
      });
    });
  });
}

void check_matrix(const Tensor& x) {
  STD_TORCH_CHECK(
      x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), "x must be a matrix whose columns lie side by side");
}

Tensor take_columns(const Tensor& x, const Tensor& columns) {
  check_matrix(x);
  const int64_t count = columns.numel(), width = x.size(1), stride = x.stride(0);
  Tensor out = torch::stable::new_empty(x, {x.size(0), count});
  for_rows(x, columns, width, out, [&](auto* from, auto* index, auto* lanes, auto* to, int64_t begin, int64_t end) {
    cpu::take_columns(from, stride, index, lanes, count, width, to, begin, end);
  });
  return out;
}

Tensor put_columns(const Tensor& x, const Tensor& columns, int64_t width) {
  check_matrix(x);
  const int64_t count = columns.numel(), stride = x.stride(0);
  STD_TORCH_CHECK(width >= 0 && x.size(1) == count, "x must have one column for each of columns");
  Tensor out = torch::stable::new_empty(x, {x.size(0), width});
  for_rows(x, columns, width, out, [&](auto* from, auto* index, auto* lanes, auto* to, int64_t begin, int64_t end) {
    cpu::put_columns(from, stride, index, lanes, count, width, to, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) {
  m.impl("take_columns", TORCH_BOX(&sk::take_columns));
  m.impl("put_columns", TORCH_BOX(&sk::put_columns));
}
