// Products with singular vectors, of a strip of rows: row-dotted as they are made, none is ever kept.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common.h"
#include "blocks.h"

namespace sk::cpu {

// Rows of a strip in the dtype of the sums, filled up with zeros to a multiple of kRows.
template <typename S, typename T>
SK_CLONES void copy_strip(const T* __restrict__ x, int64_t width, int64_t rows, S* __restrict__ to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < width; ++j) to[r * stride + j] = S(x[r * width + j]);
  }
  for (int64_t r = rows; r < round_up(rows, kRows); ++r) std::fill(to + r * stride, to + r * stride + width, S(0));
}

// `rows` rows, a multiple of kRows, of a strip times a packed panel, stored. kDepth at a time: that part of the panel
// serves all rows from the second-level cache.
template <typename S>
SK_CLONES void multiply_strip(
    int bytes, Lines<S> a, int64_t rows, const S* x, int64_t depth, int64_t panel, S* out, int64_t stride) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t here = std::min(kDepth, depth - k);
    for (int64_t r = 0; r < rows; r += kRows) {
      S* to = out + r * stride;
      if (k == 0) {
        block(bytes, a.from(r, k), x + k * panel, here, panel, Store<S>{to, stride});
      } else {
        block(bytes, a.from(r, k), x + k * panel, here, panel, Add<S>{to, stride});
      }
    }
  }
}

// The same, of a left factor packed as [row / 8][depth][8], over kDepth terms at most; added where `add` is true.
template <typename S>
SK_CLONES void multiply_packed(
    int bytes, const S* a, int64_t rows, const S* x, int64_t depth, int64_t panel, bool add, S* out, int64_t stride) {
  for (int64_t r = 0; r < rows; r += kRows) {
    const Columns<S> of_rows{a + r * depth};
    S* to = out + r * stride;
    if (add) {
      block(bytes, of_rows, x, depth, panel, Add<S>{to, stride});
    } else {
      block(bytes, of_rows, x, depth, panel, Store<S>{to, stride});
    }
  }
}

// sums[j] += the sum over rows of a[r, j] * b[r, j], for a panel of columns at most. Eight rows are summed in S, these
// sums in fp64.
template <typename S>
SK_CLONES void add_products(
    const S* __restrict__ a, int64_t a_stride, const S* __restrict__ b, int64_t b_stride, int64_t rows, int64_t columns,
    double* __restrict__ sums) {
  alignas(64) S part[kPanel<S>];
  for (int64_t first = 0; first < rows; first += kRows) {
    for (int64_t j = 0; j < columns; ++j) part[j] = S(0);
    for (int64_t r = first; r < std::min(rows, first + kRows); ++r) {
      for (int64_t j = 0; j < columns; ++j) part[j] += a[r * a_stride + j] * b[r * b_stride + j];
    }
    for (int64_t j = 0; j < columns; ++j) sums[j] += double(part[j]);
  }
}

}  // namespace sk::cpu
