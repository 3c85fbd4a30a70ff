// Weight gradients of a Linear in whole rows or columns: the product A^T B of a few columns of one activation, A, with
// all of the other, B.
//
// A's columns are packed once, for all tokens. Then a panel of B at a time is packed, a chunk of tokens after another,
// and multiplied with all of A. Tokens are added in their order, a chunk at a time, so the result is deterministic.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common.h"
#include "blocks.h"

namespace sk::cpu {

// Panels [begin, end) of B. `packed` is A as [count / 8][tokens][8]; `panel` has room for kDepth tokens of B, `sums`
// for a panel of the product, [count rounded up to 8][kPanel]. The product is [count, width], or its transpose if
// `turned`.
template <typename S, typename T>
SK_CLONES void narrow_product(
    const S* __restrict__ packed, int64_t count, const T* __restrict__ wide, int64_t width, int64_t tokens, bool turned,
    S* __restrict__ panel, S* __restrict__ sums, S* __restrict__ out, int64_t begin, int64_t end) {
  const int32_t* all = nullptr;  // pack_blocks takes every column
  const int bytes = register_bytes();
  for (int64_t j = begin * kPanel<S>; j < std::min(width, end * kPanel<S>); j += kPanel<S>) {
    const int64_t columns = std::min(kPanel<S>, width - j), stride = round_up(columns, kLanes<S>);
    for (int64_t first = 0; first < tokens; first += kDepth) {
      const int64_t here = std::min(kDepth, tokens - first);
      const T* from = wide + first * width + j;
      pack_blocks<kPanel<S>, kLanes<S>>(from, width, nullptr, here, all, columns, panel, 0, columns, 0, here);
      for (int64_t r = 0; r < count; r += kRows) {
        const Columns<S> a{packed + r * tokens + first * kRows};
        S* to = sums + r * stride;
        if (first == 0) block(bytes, a, panel, here, stride, Store<S>{to, stride});
        else block(bytes, a, panel, here, stride, Add<S>{to, stride});
      }
    }
    if (!turned) {
      for (int64_t r = 0; r < count; ++r) std::copy_n(sums + r * stride, columns, out + r * width + j);
      continue;
    }
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < count; ++r) out[(j + c) * count + r] = sums[r * stride + c];
    }
  }
}

}  // namespace sk::cpu
