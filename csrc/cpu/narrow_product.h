// Weight gradients of a Linear in whole rows or columns: the product A^T B of a few columns of one activation, A, with
// all of the other, B.
//
// Of so many tokens, A's columns are packed first. Then a panel of B at a time is packed, a chunk of tokens after
// another, and multiplied with up to kTaskRows columns of A. Tokens are added in their order, a chunk at a time, so the
// result is deterministic.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common.h"
#include "blocks.h"

namespace sk::cpu {

constexpr int64_t kTaskRows = 256;  // of the product that are made from one panel of B: their sums stay in the cache

// Adds `rows` rows and `columns` columns of the product, at most kTaskRows and kPanel, to out[r * down + c * across];
// one of these is 1. `packed` is A as [rows / 8][tokens][8]; `panel` has room for kDepth tokens of B, `sums` for a
// panel of the product.
template <typename S, typename T>
SK_CLONES void narrow_product(
    const S* __restrict__ packed, int64_t rows, const T* __restrict__ wide, int64_t width, int64_t columns,
    int64_t tokens, S* __restrict__ panel, S* __restrict__ sums, S* __restrict__ out, int64_t down, int64_t across) {
  const int32_t* all = nullptr;  // pack_blocks takes every column
  const int bytes = register_bytes();
  const int64_t stride = round_up(columns, kLanes<S>);
  for (int64_t first = 0; first < tokens; first += kDepth) {
    const int64_t here = std::min(kDepth, tokens - first);
    const T* from = wide + first * width;
    pack_blocks<kPanel<S>, kLanes<S>>(from, width, nullptr, here, all, columns, panel, 0, columns, 0, here);
    for (int64_t r = 0; r < rows; r += kRows) {
      const Columns<S> a{packed + r * tokens + first * kRows};
      S* to = sums + r * stride;
      if (first == 0) block(bytes, a, panel, here, stride, Store<S>{to, stride});
      else block(bytes, a, panel, here, stride, Add<S>{to, stride});
    }
  }
  if (across == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) out[r * down + c] += sums[r * stride + c];
    }
  } else {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < rows; ++r) out[c * across + r] += sums[r * stride + c];
    }
  }
}

}  // namespace sk::cpu
