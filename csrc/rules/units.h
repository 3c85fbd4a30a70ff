// Where selected entries lie: one addressing rule for single elements, rows, columns and blocks, on the CPU and the
// GPU.
//
// The last two dimensions of a tensor are matrices of m x n; a vector is one of m x 1. Tiles of height x width cover
// each, row by row; those at the lower and right edges may be cut. A position is the number of a tile: 1 x 1 is an
// element, 1 x n a row, m x 1 a column, anything else a block.
//
// A compact tensor has one tile after another, [count, height, width], with zeros in what is cut off. Columns lie side
// by side instead, [m, count], as in the matrix itself.
#pragma once
#include <cstdint>

#include "rule.h"

namespace sk {

struct Units {
  int64_t m, n, height, width;
  int64_t down, across;  // tiles of one matrix
  int64_t limit;         // tiles of all matrices: the number of possible positions

  SK_RULE int64_t size() const { return height * width; }
  // Whether a position times its size is where it begins: of elements and rows.
  SK_RULE bool one_run() const { return height == 1 && (width == 1 || width == n); }
  // Whether units lie side by side in the compact tensor.
  SK_RULE bool side_by_side() const { return width == 1 && height > 1 && height == m; }

  struct Tile {
    int64_t begin, rows, columns;  // offset of its first element; how much of it there is
  };

  SK_RULE Tile tile(int64_t position) const {
    const int64_t all = down * across, matrix = position / all, in_matrix = position - matrix * all;
    const int64_t line = in_matrix / across, i = line * height, j = (in_matrix - line * across) * width;
    return {(matrix * m + i) * n + j, height < m - i ? height : m - i, width < n - j ? width : n - j};
  }
};

}  // namespace sk
