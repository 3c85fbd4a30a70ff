// Products of matrices, made a register block at a time: 8 rows by up to 3 lines of columns, over some depth.
//
// The right factor is packed as such blocks read it, as [column / panel][depth][panel]. The left one is packed too, as
// [row / 8][depth][8], or read row by row as it lies. What becomes of a block is the caller's: a struct that is handed
// its registers.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common.h"

namespace sk::cpu {

constexpr int64_t kRows = 8;  // rows of a register block
template <typename S>
constexpr int64_t kLanes = 64 / int64_t(sizeof(S));
template <typename S>
constexpr int64_t kPanel = 3 * kLanes<S>;  // columns of a register block
// Long sums are taken so many terms at a time: that is as accurate as a blocked matmul.
constexpr int64_t kDepth = 256;

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Bytes of a vector register. Wider ones are only there where SK_CLONES makes code that uses them.
inline int register_bytes() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
  if (__builtin_cpu_supports("x86-64-v4")) return 64;
  if (__builtin_cpu_supports("x86-64-v3")) return 32;
#endif
  return 16;
}

// Columns [begin, end) and tokens [first, last) of `count` tokens of x, or of those that `tokens` and `rows` list, as
// [column / panel][token][panel]. The last panel is narrower, a multiple of `unit`, and filled up with zeros.
template <int64_t panel, int64_t unit, typename S, typename T, typename I>
SK_CLONES void pack_blocks(
    const T* __restrict__ x, int64_t width, const int64_t* tokens, int64_t count, const I* rows, int64_t columns,
    S* __restrict__ to, int64_t begin, int64_t end, int64_t first, int64_t last) {
  for (int64_t c = begin; c < end; c += panel) {
    const int64_t real = std::min(panel, columns - c), stride = std::min(panel, round_up(columns - c, unit));
    S* line = to + c * count + first * stride;
    for (int64_t t = first; t < last; ++t, line += stride) {
      const T* row = x + (tokens ? tokens[t] : t) * width;
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
  typedef S loose __attribute__((vector_size(bytes), aligned(alignof(S)), may_alias));  // results begin anywhere
};

// A left factor that is packed as [depth][8].
template <typename S>
struct Columns {
  const S* at;
  SK_INLINE S operator()(int64_t r, int64_t k) const { return at[k * kRows + r]; }
  SK_INLINE Columns from(int64_t r, int64_t k) const { return {at + k * kRows + r}; }
};

// One whose rows lie `stride` apart. Even a power of two costs nothing: each line of a row serves sixteen steps.
template <typename S>
struct Lines {
  const S* at;
  int64_t stride;
  SK_INLINE S operator()(int64_t r, int64_t k) const { return at[r * stride + k]; }
  SK_INLINE Lines from(int64_t r, int64_t k) const { return {at + r * stride + k, stride}; }
};

// The product is stored in `out`, or added there.
template <typename S, bool add>
struct Write {
  S* out;
  int64_t stride;
  SK_INLINE Write from(int64_t r, int64_t c) const { return {out + r * stride + c, stride}; }

  template <int bytes, int R, int C, typename V>
  SK_INLINE void take(const V (&sum)[R][C]) const {
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) {
        auto* to = reinterpret_cast<typename Vector<S, bytes>::loose*>(out + r * stride + c * (bytes / sizeof(S)));
        if (add) *to += sum[r][c];
        else *to = sum[r][c];
      }
    }
  }
};
template <typename S>
using Store = Write<S, false>;
template <typename S>
using Add = Write<S, true>;

// R rows by C vectors of the product, in registers.
template <int bytes, int R, int C, typename A, typename S, typename Then>
SK_INLINE void multiply(A a, const S* x, int64_t depth, int64_t panel, Then then) {
  using V = typename Vector<S, bytes>::type;
  constexpr int lanes = bytes / sizeof(S);
  V sum[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = V{};
  }
  for (int64_t k = 0; k < depth; ++k, x += panel) {
    V in[C];
    for (int c = 0; c < C; ++c) in[c] = *reinterpret_cast<const V*>(x + c * lanes);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) sum[r][c] += a(r, k) * in[c];
    }
  }
  then.template take<bytes>(sum);
}

// A register block of C lines, R rows by C registers at a time.
template <int bytes, int R, int C, typename A, typename S, typename Then>
SK_INLINE void block(A a, const S* x, int64_t depth, Then then) {
  constexpr int64_t panel = C * kLanes<S>, step = panel * bytes / 64;
  for (int64_t r = 0; r < kRows; r += R) {
    for (int64_t c = 0; c < panel; c += step) {
      multiply<bytes, R, C>(a.from(r, 0), x + c, depth, panel, then.from(r, c));
    }
  }
}

// AVX-512 has 32 registers, and so does NEON; with 16 of them, 4 rows by 3 registers are what fits.
template <int C, typename A, typename S, typename Then>
SK_INLINE void block(int bytes, A a, const S* x, int64_t depth, Then then) {
  switch (bytes) {
    case 64: return block<64, kRows, C>(a, x, depth, then);
    case 32: return block<32, 4, C>(a, x, depth, then);
    default: return block<16, 4, C>(a, x, depth, then);
  }
}

template <typename A, typename S, typename Then>
SK_INLINE void block(int bytes, A a, const S* x, int64_t depth, int64_t panel, Then then) {
  switch (panel / kLanes<S>) {
    case 1: return block<1>(bytes, a, x, depth, then);
    case 2: return block<2>(bytes, a, x, depth, then);
    default: return block<3>(bytes, a, x, depth, then);
  }
}

}  // namespace sk::cpu
