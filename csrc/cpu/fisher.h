// Squares of gradients, elementwise or of sums over the tokens of a sample, added to a total and to the sample's norm.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common.h"
#include "masked_grad.h"
#include "prefetch.h"

namespace sk::cpu {

constexpr int64_t kSums = 16;       // fp64 partial sums of a norm: as many as lanes
constexpr int64_t kColumns = 1024;  // columns that are summed together

// total[i] += g[i]^2, and the squares into sums, where they are wanted.
template <typename S>
SK_INLINE void add_squares(const S* __restrict__ g, int64_t count, S* __restrict__ total, double* __restrict__ sums) {
  if (total) {
    for (int64_t i = 0; i < count; ++i) total[i] += g[i] * g[i];
  }
  if (!sums) return;
  int64_t i = 0;
  double own[kSums] = {};
  for (; i + kSums <= count; i += kSums) {
    for (int64_t lane = 0; lane < kSums; ++lane) own[lane] += double(g[i + lane] * g[i + lane]);
  }
  for (; i < count; ++i) own[i % kSums] += double(g[i] * g[i]);
  for (int64_t lane = 0; lane < kSums; ++lane) sums[lane] += own[lane];
}

template <typename S, typename T>
SK_CLONES void squares(const T* __restrict__ grad, S* __restrict__ total, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] += S(grad[i]) * S(grad[i]);
}

// Squares of what has been summed already.
template <typename S>
SK_CLONES void square_sums(const S* g, int64_t count, S* total, double* sums) {
  add_squares(g, count, total, sums);
}

// The gradient of element `at` of the activations: for a bias dy, for the weight of a norm dy times what it multiplies.
template <bool scaled, typename S, typename T>
SK_INLINE S term(const T* dy, const T* x, int64_t at) {
  if constexpr (scaled) return S(dy[at]) * S(x[at]);
  else return S(dy[at]);
}

// sums[j] = the sum over tokens of term(j) for `count` columns, kColumns at most. Four tokens are read at once: so many
// streams keep memory busy. Sixteen are summed in S, these sums in fp64: long samples stay accurate.
template <bool scaled, typename S, typename T>
SK_CLONES void sum_columns(
    const T* __restrict__ dy, const T* __restrict__ x, int64_t tokens, int64_t width, S* __restrict__ sums,
    int64_t count) {
  alignas(64) S part[kColumns];
  alignas(64) double whole[kColumns];
  for (int64_t j = 0; j < count; ++j) whole[j] = 0;
  for (int64_t t = 0; t < tokens;) {
    for (int64_t j = 0; j < count; ++j) part[j] = S(0);
    const int64_t last = std::min(tokens, t + 16);
    for (; t + 4 <= last; t += 4) {
      for (int64_t j = 0, at = t * width; j < count; ++j, ++at) {
        part[j] += (term<scaled, S>(dy, x, at) + term<scaled, S>(dy, x, at + width)) +
                   (term<scaled, S>(dy, x, at + 2 * width) + term<scaled, S>(dy, x, at + 3 * width));
      }
    }
    for (; t < last; ++t) {
      for (int64_t j = 0; j < count; ++j) part[j] += term<scaled, S>(dy, x, t * width + j);
    }
    for (int64_t j = 0; j < count; ++j) whole[j] += double(part[j]);
  }
  for (int64_t j = 0; j < count; ++j) sums[j] = S(whole[j]);
}

// sum (+)= one token's gradient: of a whole row, or of the columns that `index` lists, less `start`.
template <typename S, typename T, typename I>
SK_CLONES void add_token(
    const T* __restrict__ row, const I* index, int64_t start, int64_t count, bool first, S* __restrict__ sum) {
  if (first) {
    for (int64_t j = 0; j < count; ++j) sum[j] = S(row[index ? index[j] - start : j]);
  } else {
    for (int64_t j = 0; j < count; ++j) sum[j] += S(row[index ? index[j] - start : j]);
  }
}

// Inlined, as what calls it must be: to GCC a function that only prefetches does nothing, and its calls are dropped.
template <typename T>
SK_INLINE void prefetch_row(const T* row, int64_t width) {
  for (int64_t j = 0; j < width; j += 64 / int64_t(sizeof(T))) prefetch(row + j);
}

}  // namespace sk::cpu
