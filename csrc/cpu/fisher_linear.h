// Squares of the per-sample weight gradients of a Linear.
//
// The product of one sample, dY^T X, is made a register block at a time: 8 rows of the weight by up to 3 lines of
// columns, over all tokens of the sample. Squared there and then, it never exists. For that both factors are packed as
// the blocks read them, dY as [row / 8][token][8] and X as [column / panel][token][panel], in the dtype of the sum.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common.h"
#include "blocks.h"
#include "fisher.h"

namespace sk::cpu {

constexpr int64_t kGather = 512;  // values gathered before they are squared

// real[t] = whether row t of [tokens, width] holds anything but zeros.
template <typename T>
SK_CLONES void find_real(const T* rows, int64_t width, char* real, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const T* row = rows + t * width;
    bool any = false;
    for (int64_t j = 0; j < width && !any; j += kLine) {
      int found = 0;
      for (int64_t i = j; i < std::min(j + kLine, width); ++i) found |= opmath_t<T>(row[i]) != 0;
      any = found;
    }
    real[t] = any;
  }
}

// The squares of a product are added to a total and to `sums`, where they are wanted.
template <typename S>
struct Square {
  S* total;
  int64_t stride;
  double* sums;
  SK_INLINE Square from(int64_t r, int64_t c) const { return {total ? total + r * stride + c : total, stride, sums}; }

  template <int bytes, int R, int C, typename V>
  SK_INLINE void take(const V (&sum)[R][C]) const {
    constexpr int lanes = bytes / sizeof(S);
    if (total) {
      for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
          auto* to = reinterpret_cast<typename Vector<S, bytes>::loose*>(total + r * stride + c * lanes);
          *to += sum[r][c] * sum[r][c];
        }
      }
    }
    if (!sums) return;
    // Converting costs more than adding: the few squares of a column come together in S, all others in fp64.
    for (int c = 0; c < C; ++c) {
      V column{};
      for (int r = 0; r < R; ++r) column += sum[r][c] * sum[r][c];
      for (int lane = 0; lane < lanes; ++lane) sums[lane] += double(column[lane]);
    }
  }
};

// Some samples of a Linear, packed; all their products are [m, n].
template <typename S>
struct Packed {
  const S *a, *x;
  const int64_t* starts;  // [samples + 1], in tokens
  int64_t samples, m, n;
  int bytes;  // of a register

  int64_t tokens(int64_t b) const { return starts[b + 1] - starts[b]; }
  const S* rows(int64_t b, int64_t r) const { return a + starts[b] * round_up(m, kRows) + r * tokens(b); }
  const S* columns(int64_t b, int64_t c) const { return x + starts[b] * round_up(n, kLanes<S>) + c * tokens(b); }
};

// The block of sample b at row r and column c, stored.
template <typename S>
SK_INLINE void product(const Packed<S>& p, int64_t b, int64_t r, int64_t c, int64_t panel, S* out, int64_t stride) {
  const Columns<S> a{p.rows(b, r)};
  const S* x = p.columns(b, c);
  block(p.bytes, a, x, std::min(kDepth, p.tokens(b)), panel, Store<S>{out, stride});
  for (int64_t t = kDepth; t < p.tokens(b); t += kDepth) {
    const int64_t here = std::min(kDepth, p.tokens(b) - t);
    block(p.bytes, a.from(0, t), x + t * panel, here, panel, Add<S>{out, stride});
  }
}

// Squares of the products at rows [row, row_end) and columns [column, column_end), multiples of the block, or the ends:
// added to total [m, n] and to sums [samples, kSums], either of which may be null. A panel at a time over all samples:
// its part of total stays in the first-level cache, the rows of dY in the second.
template <typename S>
SK_CLONES void square_products(
    const Packed<S>& p, int64_t row, int64_t row_end, int64_t column, int64_t column_end, S* total, double* sums) {
  alignas(64) S edge[kRows * kPanel<S>];
  for (int64_t c = column; c < column_end; c += kPanel<S>) {
    const int64_t width = std::min(kPanel<S>, p.n - c), panel = round_up(width, kLanes<S>);
    for (int64_t b = 0; b < p.samples; ++b) {
      double* own = sums ? sums + b * kSums : nullptr;
      for (int64_t r = row; r < row_end; r += kRows) {
        S* to = total ? total + r * p.n + c : nullptr;
        if (r + kRows <= p.m && width == panel && p.tokens(b) <= kDepth) {
          const Columns<S> a{p.rows(b, r)};
          block(p.bytes, a, p.columns(b, c), p.tokens(b), panel, Square<S>{to, p.n, own});
          continue;
        }
        product(p, b, r, c, panel, edge, panel);
        for (int64_t i = 0; i < std::min(kRows, p.m - r); ++i) {
          add_squares(edge + i * panel, width, to ? to + i * p.n : nullptr, own);
        }
      }
    }
  }
}

// The same at `count` elements of rows [row, row_end): `at` are their places in `strip`, where products are made.
template <typename S>
SK_CLONES void square_selected(
    const Packed<S>& p, int64_t row, int64_t row_end, const int32_t* at, int64_t count, S* strip, S* total,
    double* sums) {
  const int64_t stride = round_up(p.n, kLanes<S>);
  alignas(64) S found[kGather];
  for (int64_t b = 0; b < p.samples; ++b) {
    for (int64_t c = 0; c < p.n; c += kPanel<S>) {
      const int64_t panel = std::min(kPanel<S>, stride - c);
      for (int64_t r = row; r < row_end; r += kRows) {
        product(p, b, r, c, panel, strip + (r - row) * stride + c, stride);
      }
    }
    for (int64_t k = 0; k < count; k += kGather) {
      const int64_t here = std::min(kGather, count - k);
      for (int64_t i = 0; i < here; ++i) found[i] = strip[at[k + i]];
      add_squares(found, here, total ? total + k : nullptr, sums ? sums + b * kSums : nullptr);
    }
  }
}

}  // namespace sk::cpu
