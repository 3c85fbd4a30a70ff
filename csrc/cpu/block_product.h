// Weight gradients of a Linear in whole blocks: small products dY^T X, one for each block.
//
// What a block needs of dY and X is packed, a chunk of tokens at a time, as register blocks read it. Tokens are added
// in their order, a chunk at a time, so the result is deterministic.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common.h"
#include "../rules/units.h"
#include "blocks.h"

namespace sk::cpu {

// Adds to blocks [begin, end) of `out`, which is zero to start with, in panels of so many columns. Packed ones have
// room for kDepth tokens.
template <int64_t kWidth, typename S, typename T, typename I>
SK_CLONES void block_products(
    const T* __restrict__ dy, const T* __restrict__ x, int64_t tokens, const Units& units, const I* index,
    S* __restrict__ dy_panel, S* __restrict__ x_panel, S* __restrict__ out, int64_t begin, int64_t end) {
  const int32_t* all = nullptr;  // pack_blocks takes every column
  const int bytes = register_bytes();
  alignas(64) S edge[kRows * kPanel<S>];
  for (int64_t first = 0; first < tokens; first += kDepth) {
    const int64_t here = std::min(kDepth, tokens - first);
    int64_t packed = -1;  // the first row of the block whose dY is in the panel
    for (int64_t k = begin; k < end; ++k) {
      const auto tile = units.tile(index[k]);
      const int64_t i = tile.begin / units.n, j = tile.begin - i * units.n;
      if (i != packed) {
        const T* from = dy + first * units.m + i;
        pack_blocks<kRows, kRows>(from, units.m, nullptr, here, all, tile.rows, dy_panel, 0, tile.rows, 0, here);
        packed = i;
      }
      const T* from = x + first * units.n + j;
      pack_blocks<kWidth, kLanes<S>>(
          from, units.n, nullptr, here, all, tile.columns, x_panel, 0, tile.columns, 0, here);
      for (int64_t c = 0; c < tile.columns; c += kWidth) {
        const int64_t width = std::min(kWidth, tile.columns - c), panel = round_up(width, kLanes<S>);
        for (int64_t r = 0; r < tile.rows; r += kRows) {
          S* to = out + k * units.size() + r * units.width + c;
          const Columns<S> a{dy_panel + r * here};
          const S* b = x_panel + c * here;
          if (r + kRows <= tile.rows && width == panel) {
            block(bytes, a, b, here, panel, Add<S>{to, units.width});
            continue;
          }
          block(bytes, a, b, here, panel, Store<S>{edge, panel});
          for (int64_t row = 0; row < std::min(kRows, tile.rows - r); ++row) {
            for (int64_t l = 0; l < width; ++l) to[row * units.width + l] += edge[row * panel + l];
          }
        }
      }
    }
  }
}

}  // namespace sk::cpu
