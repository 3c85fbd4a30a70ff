// The units of a tensor, as host code gets them: checked.
#pragma once
#include "common.h"
#include "rules/units.h"

namespace sk {

// Of `matrices` matrices of m x n.
inline Units units_of(int64_t matrices, int64_t m, int64_t n, int64_t height, int64_t width) {
  const auto fits = [](int64_t of, int64_t size) { return of >= 1 || (of == 0 && size == 0); };
  STD_TORCH_CHECK(
      fits(height, m) && fits(width, n), "units of ", height, " x ", width, " do not fit matrices of ", m, " x ", n);
  product(height, width);  // fits
  const auto tiles = [](int64_t size, int64_t of) { return of == 0 ? 1 : size / of + (size % of != 0); };
  const int64_t down = tiles(m, height), across = tiles(n, width);
  return {m, n, height, width, down, across, product(matrices, product(down, across))};
}

inline Units units_of(const Tensor& dense, int64_t height, int64_t width) {
  STD_TORCH_CHECK(dense.is_contiguous(), "the dense tensor must be contiguous");
  const int64_t dims = dense.dim();
  int64_t matrices = 1;
  for (int64_t i = 0; i < dims - 2; ++i) matrices = product(matrices, dense.size(i));
  if (dims < 2) return units_of(1, dims == 1 ? dense.size(0) : 1, 1, height, width);
  return units_of(matrices, dense.size(dims - 2), dense.size(dims - 1), height, width);
}

// The same from an operator's argument.
inline Units units_of(const Tensor& dense, const std::vector<int64_t>& tile) {
  STD_TORCH_CHECK(tile.size() == 2, "tile must be the height and width of a unit");
  return units_of(dense, tile[0], tile[1]);
}
inline Units units_of(int64_t m, int64_t n, const std::vector<int64_t>& tile) {
  STD_TORCH_CHECK(tile.size() == 2, "tile must be the height and width of a unit");
  return units_of(1, m, n, tile[0], tile[1]);
}

}  // namespace sk
