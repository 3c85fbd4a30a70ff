// masked_grad_linear and masked_grad_embedding: checks, scratch memory, CPU registrations.
#include "cpu/masked_grad.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>

#include "common.h"

namespace sk {
namespace {

constexpr int64_t kTokens = 256;  // tokens whose panels exist at a time

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Scratch, aligned for whole vectors.
template <typename S>
std::unique_ptr<S[], Free> scratch(int64_t count) {
  void* p = std::aligned_alloc(64, (std::max<int64_t>(count, 1) * sizeof(S) + 63) / 64 * 64);
  STD_TORCH_CHECK(p != nullptr, "out of memory for ", count * int64_t(sizeof(S)), " bytes of scratch");
  return std::unique_ptr<S[], Free>(static_cast<S*>(p));
}

// positions -> row and column of the [M, N] weight.
template <typename I>
void split_positions(const I* index, int64_t count, int64_t n, int32_t* row, int32_t* column) {
  parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      row[k] = int32_t(index[k] / n);
      column[k] = int32_t(index[k] - row[k] * n);
    }
  });
}

// Panels of `parts` chunks, one after the other: panels[part][column][token].
template <typename S, typename T>
void pack_panels(const T* from, S* panels, int64_t width, int64_t chunk, int64_t tokens) {
  const int64_t parts = (tokens + chunk - 1) / chunk;
  const int64_t blocks = (width + cpu::kLine - 1) / cpu::kLine;
  parallel_for(0, parts * blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t part = at / blocks, first = at - part * blocks, last = std::min(blocks, first + end - at);
      const int64_t t = part * chunk;
      cpu::pack(
          from + t * width, panels + part * width * chunk, width, chunk, std::min(chunk, tokens - t), first * cpu::kLine,
          std::min(width, last * cpu::kLine));
      at += last - first;
    }
  });
}

template <typename S, typename T>
void sum_tokens(
    const T* dy, const T* x, int64_t tokens, int64_t m, int64_t n, const int32_t* row, const int32_t* column, S* out,
    int64_t count) {
  const int64_t chunk = cpu::chunk_for(n, tokens, sizeof(S));
  const int64_t parts = (std::min(tokens, kTokens) + chunk - 1) / chunk;
  auto x_panels = scratch<S>(parts * n * chunk);
  auto dy_panels = scratch<S>(parts * m * chunk);
  for (int64_t first = 0; first < tokens; first += parts * chunk) {
    const int64_t here = std::min(parts * chunk, tokens - first);
    pack_panels(x + first * n, x_panels.get(), n, chunk, here);
    pack_panels(dy + first * m, dy_panels.get(), m, chunk, here);
    parallel_for(0, count, 512, [&](int64_t begin, int64_t end) {
      for (int64_t part = 0; part * chunk < here; ++part) {
        cpu::dot_panel<S>(
            x_panels.get() + part * n * chunk, dy_panels.get() + part * m * chunk, chunk, row, column, out, begin, end);
      }
    });
  }
}

Tensor masked_grad_linear(const Tensor& grad_output, const Tensor& input, const Tensor& positions) {
  STD_TORCH_CHECK(
      grad_output.dim() == 2 && input.dim() == 2 && grad_output.size(0) == input.size(0) &&
          grad_output.scalar_type() == input.scalar_type() && grad_output.is_contiguous() && input.is_contiguous(),
      "grad_output [T, M] and input [T, N] must be contiguous and of one dtype");
  const int64_t tokens = input.size(0), m = grad_output.size(1), n = input.size(1), count = positions.numel();
  Tensor result;
  with_floating(input.scalar_type(), "masked_grad_linear", [&](auto zero) {
    using T = decltype(zero);
    using S = opmath_t<T>;
    result = torch::stable::new_zeros(input, {count}, scalar_type<S>());
    auto row = scratch<int32_t>(count);
    auto column = scratch<int32_t>(count);
    with_positions(positions, [&](const auto* index) {
      check_bounds(index, count, m * n);
      split_positions(index, count, n, row.get(), column.get());
    });
    if (count == 0) return;
    sum_tokens<S>(
        static_cast<const T*>(grad_output.const_data_ptr()), static_cast<const T*>(input.const_data_ptr()), tokens, m, n,
        row.get(), column.get(), static_cast<S*>(result.mutable_data_ptr()), count);
  });
  return result;
}

// Tokens sorted by id (stable), as runs: tokens order[starts[r], starts[r + 1]) share ids[order[starts[r]]].
template <typename I>
void sort_tokens(const I* ids, int64_t tokens, std::vector<int64_t>& order, std::vector<int64_t>& starts) {
  order.resize(tokens);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  for (int64_t i = 0; i < tokens; ++i) {
    if (i == 0 || ids[order[i]] != ids[order[i - 1]]) starts.push_back(i);
  }
  starts.push_back(tokens);
}

Tensor masked_grad_embedding(
    const Tensor& grad_output, const Tensor& ids, const Tensor& positions, bool rows, int64_t padding_idx) {
  STD_TORCH_CHECK(
      grad_output.dim() == 2 && ids.dim() == 1 && grad_output.size(0) == ids.size(0) && grad_output.is_contiguous() &&
          ids.is_contiguous(),
      "grad_output [T, D] and ids [T] must be contiguous");
  const int64_t tokens = ids.size(0), width = grad_output.size(1), count = positions.numel();
  Tensor result;
  std::vector<int64_t> order, starts;
  const auto id_of = [&](int64_t t) -> int64_t {
    return ids.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(ids.const_data_ptr())[t]
                                                : static_cast<const int64_t*>(ids.const_data_ptr())[t];
  };
  with_positions(ids, [&](const auto* id) { sort_tokens(id, tokens, order, starts); });
  with_floating(grad_output.scalar_type(), "masked_grad_embedding", [&](auto zero) {
      using scalar_t = decltype(zero);
    using S = opmath_t<scalar_t>;
    std::vector<int64_t> shape{count};
    if (rows) shape.push_back(width);
    result = torch::stable::new_zeros(grad_output, shape, scalar_type<S>());
    auto* out = static_cast<S*>(result.mutable_data_ptr());
    const auto* dy = static_cast<const scalar_t*>(grad_output.const_data_ptr());
    with_positions(positions, [&](const auto* index) {
      const auto* last = index + count;
      // A run of tokens with one id owns the positions of its row, so no two threads meet.
      parallel_for(0, int64_t(starts.size()) - 1, 16, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t id = id_of(order[starts[r]]);
          if (id == padding_idx) continue;
          const int64_t per_row = rows ? 1 : width;
          const auto* from = std::lower_bound(index, last, id * per_row);
          const auto* to = std::lower_bound(from, last, (id + 1) * per_row);
          if (from == to) continue;
          for (int64_t i = starts[r]; i < starts[r + 1]; ++i) {
            const scalar_t* row = dy + order[i] * width;
            if (rows) {
              S* sum = out + (from - index) * width;
              for (int64_t j = 0; j < width; ++j) sum[j] += S(row[j]);
            } else {
              for (const auto* p = from; p < to; ++p) out[p - index] += S(row[*p - id * width]);
            }
          }
        }
      });
    });
  });
  return result;
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekernels, CPU, m) {
  m.impl("masked_grad_linear", TORCH_BOX(&sk::masked_grad_linear));
  m.impl("masked_grad_embedding", TORCH_BOX(&sk::masked_grad_embedding));
}
