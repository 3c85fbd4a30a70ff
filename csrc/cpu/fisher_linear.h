// Squares of the per-sample weight gradients of a Linear.
//
// The product of one sample, dY^T X, is made a register block at a time: 8 rows of the weight by up to 3 lines of
// columns, over all tokens of the sample. Squared there and then, it never exists. For that both factors are packed as
// the blocks read them, dY as [row / 8][token][8] and X as [column / panel][token][panel], in the dtype of the sum.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common.h"
#include "fisher.h"
#include "masked_grad.h"

namespace sk::cpu {

constexpr int64_t kRows = 8;  // rows of a register block
template <typename S>
constexpr int64_t kLanes = 64 / int64_t(sizeof(S));
template <typename S>
constexpr int64_t kPanel = 3 * kLanes<S>;  // columns of a register block
constexpr int64_t kGather = 512;           // values gathered before they are squared

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Bytes of a vector register. Wider ones are only there where SK_CLONES makes code that uses them.
inline int register_bytes() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
  if (__builtin_cpu_supports("x86-64-v4")) return 64;
  if (__builtin_cpu_supports("x86-64-v3")) return 32;
#endif
  return 16;
}

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

// Columns [begin, end) of `count` tokens of x, or the ones that `rows` lists, as [column / panel][token][panel]. The
// last panel is narrower, a multiple of `unit`, and filled up with zeros.
template <int64_t panel, int64_t unit, typename S, typename T, typename I>
SK_CLONES void pack_blocks(
    const T* __restrict__ x, int64_t width, const int64_t* tokens, int64_t count, const I* rows, int64_t columns,
    S* __restrict__ to, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += panel) {
    const int64_t real = std::min(panel, columns - c), stride = std::min(panel, round_up(columns - c, unit));
    S* line = to + c * count;
    for (int64_t t = 0; t < count; ++t, line += stride) {
      const T* row = x + tokens[t] * width;
      if (rows) {
        for (int64_t j = 0; j < real; ++j) line[j] = S(row[rows[c + j]]);
      } else if (real == panel) {
        for (int64_t j = 0; j < panel; ++j) line[j] = S(row[c + j]);
        continue;
      } else {
        for (int64_t j = 0; j < real; ++j) line[j] = S(row[c + j]);
      }
      for (int64_t j = real; j < stride; ++j) line[j] = S(0);
    }
  }
}

template <typename S, int bytes>
struct Vector {
  typedef S type __attribute__((vector_size(bytes)));
  typedef S loose __attribute__((vector_size(bytes), aligned(alignof(S)), may_alias));  // total begins anywhere
};

// What becomes of a product: stored in `out`, added there, or its squares added there and to `sums`, if not null.
enum Then { kStore, kAdd, kSquare };

// R rows by C vectors of the product, in registers.
template <Then then, int bytes, int R, int C, typename S>
SK_INLINE void multiply(const S* a, const S* x, int64_t tokens, int64_t panel, S* out, int64_t stride, double* sums) {
  using V = typename Vector<S, bytes>::type;
  using Loose = typename Vector<S, bytes>::loose;
  constexpr int lanes = bytes / sizeof(S);
  V sum[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = V{};
  }
  for (int64_t t = 0; t < tokens; ++t, a += kRows, x += panel) {
    V in[C];
    for (int c = 0; c < C; ++c) in[c] = *reinterpret_cast<const V*>(x + c * lanes);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) sum[r][c] += a[r] * in[c];
    }
  }
  if (then != kSquare || out) {
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) {
        Loose* to = reinterpret_cast<Loose*>(out + r * stride + c * lanes);
        if (then == kStore) *to = sum[r][c];
        if (then == kAdd) *to += sum[r][c];
        if (then == kSquare) *to += sum[r][c] * sum[r][c];
      }
    }
  }
  if (then != kSquare || !sums) return;
  // Converting costs more than adding: the few squares of a column come together in S, all others in fp64.
  for (int c = 0; c < C; ++c) {
    V column{};
    for (int r = 0; r < R; ++r) column += sum[r][c] * sum[r][c];
    for (int lane = 0; lane < lanes; ++lane) sums[lane] += double(column[lane]);
  }
}

// A register block of C lines, R rows by C registers at a time.
template <Then then, int bytes, int R, int C, typename S>
SK_INLINE void block(const S* a, const S* x, int64_t tokens, S* out, int64_t stride, double* sums) {
  constexpr int64_t panel = C * kLanes<S>, step = panel * bytes / 64;
  for (int64_t r = 0; r < kRows; r += R) {
    for (int64_t c = 0; c < panel; c += step) {
      multiply<then, bytes, R, C>(a + r, x + c, tokens, panel, out ? out + r * stride + c : out, stride, sums);
    }
  }
}

// AVX-512 has 32 registers, and so does NEON; with 16 of them, 4 rows by 3 registers are what fits.
template <Then then, int C, typename S>
SK_INLINE void block(int bytes, const S* a, const S* x, int64_t tokens, S* out, int64_t stride, double* sums) {
  switch (bytes) {
    case 64: return block<then, 64, kRows, C>(a, x, tokens, out, stride, sums);
    case 32: return block<then, 32, 4, C>(a, x, tokens, out, stride, sums);
    default: return block<then, 16, 4, C>(a, x, tokens, out, stride, sums);
  }
}

template <Then then, typename S>
SK_INLINE void block(
    int bytes, const S* a, const S* x, int64_t tokens, int64_t panel, S* out, int64_t stride, double* sums) {
  switch (panel / kLanes<S>) {
    case 1: return block<then, 1>(bytes, a, x, tokens, out, stride, sums);
    case 2: return block<then, 2>(bytes, a, x, tokens, out, stride, sums);
    default: return block<then, 3>(bytes, a, x, tokens, out, stride, sums);
  }
}

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

// The block of sample b at row r and column c, stored. Long samples are summed kDepth tokens at a time: that is as
// accurate as a blocked matmul.
constexpr int64_t kDepth = 256;
template <typename S>
SK_INLINE void product(const Packed<S>& p, int64_t b, int64_t r, int64_t c, int64_t panel, S* out, int64_t stride) {
  const S *a = p.rows(b, r), *x = p.columns(b, c);
  block<kStore>(p.bytes, a, x, std::min(kDepth, p.tokens(b)), panel, out, stride, nullptr);
  for (int64_t t = kDepth; t < p.tokens(b); t += kDepth) {
    const int64_t here = std::min(kDepth, p.tokens(b) - t);
    block<kAdd>(p.bytes, a + t * kRows, x + t * panel, here, panel, out, stride, nullptr);
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
          block<kSquare>(p.bytes, p.rows(b, r), p.columns(b, c), p.tokens(b), panel, to, p.n, own);
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
