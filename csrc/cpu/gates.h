// Loops over gates, over the rows of a weight that they scale, and over the tokens that their gradient is summed from.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common.h"
#include "../rules/philox.h"
#include "gate_rule.h"

namespace sk::cpu {

constexpr int64_t kGates = 64;  // whole vectors always: a gate has the same bits wherever it lies among others
constexpr int64_t kTokens = 64, kColumns = 1024;  // what is summed in the dtype of the products

// The first two words of counters first, first + 1, ... Round by round, or GCC makes no vectors of them.
SK_INLINE void draw_words(
    uint64_t key, uint64_t first, uint32_t stream, uint32_t* __restrict__ u, uint32_t* __restrict__ v) {
  alignas(64) uint32_t c2[kGates], c3[kGates];
  for (int64_t j = 0; j < kGates; ++j)
    u[j] = uint32_t(first) + uint32_t(j);  // kGates divides first: nothing is carried
  for (int64_t j = 0; j < kGates; ++j) v[j] = uint32_t(first >> 32);
  for (int64_t j = 0; j < kGates; ++j) c2[j] = stream;
  for (int64_t j = 0; j < kGates; ++j) c3[j] = 0;
  for (int round = 0; round < 10; ++round) {
    const uint32_t k0 = philox_key0(key, round), k1 = philox_key1(key, round);
    for (int64_t j = 0; j < kGates; ++j) philox_round(u[j], v[j], c2[j], c3[j], k0, k1);
  }
}

// Blocks [begin, end) of `count` gates: prepare(number of the first gate), then run(logit, place in the block) is the
// Gate of one.
template <typename S, typename P, typename F>
SK_INLINE void for_gates(
    const S* logits, int64_t count, int64_t begin, int64_t end, S* values, S* slopes, const P& prepare, const F& run) {
  alignas(64) S x[kGates], v[kGates], d[kGates];
  for (int64_t first = begin * kGates; first < std::min(count, end * kGates); first += kGates) {
    const int64_t here = std::min(kGates, count - first);
    std::copy_n(logits + first, here, x);
    std::fill(x + here, x + kGates, S(0));
    prepare(first);
    for (int64_t j = 0; j < kGates; ++j) {
      const Gate<S> gate = run(x[j], j);
      v[j] = gate.value;
      d[j] = gate.slope;
    }
    std::copy_n(v, here, values + first);
    if (slopes) std::copy_n(d, here, slopes + first);
  }
}

template <int kind, bool drawn, typename S>
SK_CLONES void draw_gates(
    const S* logits, S noise, uint64_t key, uint32_t stream, int64_t count, int64_t begin, int64_t end, S* values,
    S* slopes) {
  alignas(64) uint32_t words[2][kGates] = {};
  for_gates(
      logits, count, begin, end, values, slopes,
      [&](int64_t first) __attribute__((always_inline)) {
        if (drawn) draw_words(key, uint64_t(first), stream, words[0], words[1]);
      },
      [&](S x, int64_t j)
          __attribute__((always_inline)) { return draw_gate<kind, drawn>(x, noise, words[0][j], words[1][j]); });
}

template <int kind, typename S>
SK_CLONES void open_gates(
    const S* logits, S noise, S shift, int64_t count, int64_t begin, int64_t end, S* values, S* slopes) {
  for_gates(
      logits, count, begin, end, values, slopes, [](int64_t) __attribute__((always_inline)) {},
      [&](S x, int64_t) __attribute__((always_inline)) { return open_gate<kind>(x, noise, shift); });
}

// out[i, j] = weight[i, j] * outer[i] * inner[j] for rows [begin, end) as they lie in memory.
template <typename O, typename T, typename S>
SK_CLONES void scale_rows(
    const T* __restrict__ weight, const S* __restrict__ outer, const S* __restrict__ inner, O* __restrict__ out,
    int64_t width, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* from = weight + i * width;
    O* to = out + i * width;
    const S scale = outer[i];
    for (int64_t j = 0; j < width; ++j) to[j] = O(S(from[j]) * scale * inner[j]);
  }
}

// products[j] = sum of a[t, j] b[t, j], sums[j] = sum of a[t, j], over kTokens tokens and kColumns columns at most.
// Eight tokens at once: sixteen streams keep memory busy, and sums are loaded and stored an eighth as often.
template <typename S, typename T>
SK_CLONES void sum_tokens(
    const T* __restrict__ a, int64_t a_stride, const T* __restrict__ b, int64_t b_stride, int64_t tokens, int64_t count,
    S* __restrict__ products, S* __restrict__ sums) {
  for (int64_t j = 0; j < count; ++j) products[j] = sums[j] = S(0);
  int64_t t = 0;
  for (; t + 8 <= tokens; t += 8) {
    const T *x = a + t * a_stride, *y = b + t * b_stride;
    for (int64_t j = 0; j < count; ++j) {
      const T *p = x + j, *q = y + j;
      const S p0 = S(p[0]), p1 = S(p[a_stride]), p2 = S(p[2 * a_stride]), p3 = S(p[3 * a_stride]);
      const S p4 = S(p[4 * a_stride]), p5 = S(p[5 * a_stride]), p6 = S(p[6 * a_stride]), p7 = S(p[7 * a_stride]);
      sums[j] += ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7));
      products[j] +=
          ((p0 * S(q[0]) + p1 * S(q[b_stride])) + (p2 * S(q[2 * b_stride]) + p3 * S(q[3 * b_stride]))) +
          ((p4 * S(q[4 * b_stride]) + p5 * S(q[5 * b_stride])) + (p6 * S(q[6 * b_stride]) + p7 * S(q[7 * b_stride])));
    }
  }
  for (; t < tokens; ++t) {
    const T *x = a + t * a_stride, *y = b + t * b_stride;
    for (int64_t j = 0; j < count; ++j) {
      sums[j] += S(x[j]);
      products[j] += S(x[j]) * S(y[j]);
    }
  }
}

// out[j] = the sum over blocks of parts[block * stride + j], for columns [begin, end).
template <typename S>
SK_CLONES void add_parts(
    const S* __restrict__ parts, int64_t blocks, int64_t stride, double* __restrict__ out, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) out[j] = 0;
  for (int64_t k = 0; k < blocks; ++k) {
    for (int64_t j = begin; j < end; ++j) out[j] += double(parts[k * stride + j]);
  }
}

}  // namespace sk::cpu
