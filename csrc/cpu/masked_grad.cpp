// masked_grad_linear and masked_grad_embedding: checks, scratch memory, CPU registrations.
#include "masked_grad.h"

#include <algorithm>
#include <limits>

#include "../common.h"
#include "../units.h"
#include "block_product.h"
#include "hits.h"
#include "narrow_product.h"
#include "positions.h"
#include "scratch.h"

namespace sk {
namespace {

constexpr int64_t kTokens = 256;    // tokens whose panels exist at a time
constexpr int64_t kPackedTokens = 2048;  // of whole rows and columns
constexpr int64_t kGrain = 1 << 15;  // sums that are worth a thread
constexpr int64_t kBlockWork = 1 << 18;  // products in blocks that are worth a thread

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
  const int64_t parts = ceil_div(tokens, chunk), blocks = ceil_div(width, cpu::kLine);
  parallel_for(0, parts * blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t part = at / blocks, first = at - part * blocks, last = std::min(blocks, first + end - at);
      const int64_t t = part * chunk;
      cpu::pack(
          from + t * width, nullptr, panels + part * width * chunk, width, chunk, std::min(chunk, tokens - t),
          first * cpu::kLine, std::min(width, last * cpu::kLine));
      at += last - first;
    }
  });
}

template <typename S, typename T>
void sum_tokens(
    const T* dy, const T* x, int64_t tokens, int64_t m, int64_t n, const int32_t* row, const int32_t* column, S* out,
    int64_t count) {
  const int64_t chunk = cpu::chunk_for(n, tokens, sizeof(S));
  const int64_t parts = ceil_div(std::min(tokens, kTokens), chunk);
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

template <typename S, typename T, typename I>
void sum_blocks(const T* dy, const T* x, int64_t tokens, const Units& units, const I* index, int64_t count, S* out) {
  const int64_t work = units.size() * std::max<int64_t>(tokens, 1);
  parallel_for(0, count, kBlockWork / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    const auto dy_panel = scratch<S>(cpu::kDepth * cpu::round_up(units.height, cpu::kRows));
    const auto x_panel = scratch<S>(cpu::kDepth * cpu::round_up(units.width, cpu::kLanes<S>));
    // A panel of one line of columns is slow: four lines are two panels of two, not of three and one.
    const int64_t lines = ceil_div(units.width, cpu::kLanes<S>);
    const auto products = lines % 3 == 1 && lines % 2 == 0 ? cpu::block_products<2 * cpu::kLanes<S>, S, T, I>
                                                           : cpu::block_products<cpu::kPanel<S>, S, T, I>;
    products(dy, x, tokens, units, index, dy_panel.get(), x_panel.get(), out, begin, end);
  });
}

// Whole columns of the weight are a product with those columns of x, and whole rows one with those of dy; if all of
// them are selected, whichever is narrower is the left factor.
template <typename S, typename T, typename I>
void sum_lines(const T* dy, const T* x, int64_t tokens, const Units& units, const I* index, int64_t count, S* out) {
  const bool every = count == units.limit, turned = every ? units.n <= units.m : units.side_by_side();
  const T *narrow = turned ? x : dy, *wide = turned ? dy : x;
  const int64_t from = turned ? units.n : units.m, width = turned ? units.m : units.n;
  if (every) {
    index = nullptr;
    count = from;
  }
  const int64_t most = std::min(tokens, kPackedTokens);
  const int64_t panels = ceil_div(width, cpu::kPanel<S>), tasks = panels * ceil_div(count, cpu::kTaskRows);
  const auto packed = scratch<S>(product(cpu::round_up(count, cpu::kRows), most));
  for (int64_t first = 0; first < tokens; first += most) {
    const int64_t here = std::min(most, tokens - first);
    parallel_for(0, here, kGrain / (count + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t += cpu::kLine) {  // so that lines of `narrow` stay in the nearest cache
        cpu::pack_blocks<cpu::kRows, cpu::kRows>(
            narrow + first * from, from, nullptr, here, index, count, packed.get(), 0, count, t,
            std::min(t + cpu::kLine, end));
      }
    });
    for_each_task(tasks, [&] {
      return [&, panel = scratch<S>(cpu::kDepth * cpu::kPanel<S>),
              sums = scratch<S>(cpu::kTaskRows * cpu::kPanel<S>)](int64_t task) {
        const int64_t r = task / panels * cpu::kTaskRows, c = task % panels * cpu::kPanel<S>;
        cpu::narrow_product(
            packed.get() + r * here, std::min(cpu::kTaskRows, count - r), wide + first * width + c, width,
            std::min(cpu::kPanel<S>, width - c), here, panel.get(), sums.get(),
            out + (turned ? c * count + r : r * width + c), turned ? 1 : width, turned ? count : 1);
      };
    });
  }
}

Tensor masked_grad_linear(
    const Tensor& grad_output, const Tensor& input, const Tensor& positions, std::vector<int64_t> tile) {
  STD_TORCH_CHECK(
      grad_output.dim() == 2 && input.dim() == 2 && grad_output.size(0) == input.size(0) &&
          grad_output.scalar_type() == input.scalar_type() && grad_output.is_contiguous() && input.is_contiguous(),
      "grad_output [T, M] and input [T, N] must be contiguous and of one dtype");
  const int64_t tokens = input.size(0), m = grad_output.size(1), n = input.size(1), count = positions.numel();
  STD_TORCH_CHECK(std::max(m, n) <= std::numeric_limits<int32_t>::max(), "rows and columns must be below 2^31");
  const Units units = units_of(m, n, tile);
  Tensor result;
  with_floating(input.scalar_type(), "masked_grad_linear", [&](auto zero) {
    using T = decltype(zero);
    using S = opmath_t<T>;
    result = torch::stable::new_zeros(input, {product(count, units.size())}, scalar_type<S>());
    auto* out = static_cast<S*>(result.mutable_data_ptr());
    const T *dy = data<T>(grad_output, "grad_output"), *x = data<T>(input, "input");
    with_positions(positions, [&](const auto* index) {
      check_positions(index, count, units.limit);
      if (result.numel() == 0 || tokens == 0) return;
      if (units.size() != 1 && (units.side_by_side() || units.one_run())) {
        return sum_lines(dy, x, tokens, units, index, count, out);
      }
      if (units.size() != 1) return sum_blocks(dy, x, tokens, units, index, count, out);
      auto row = scratch<int32_t>(count);
      auto column = scratch<int32_t>(count);
      split_positions(index, count, n, row.get(), column.get());
      sum_tokens<S>(dy, x, tokens, m, n, row.get(), column.get(), out, count);
    });
  });
  return result;
}

// Hits of one row, or of one row of blocks, follow each other and are summed by one thread: [begin, end) is moved on to
// where these change.
template <typename S, typename T, typename I, typename Id>
void sum_hits(
    const std::vector<Hit>& hits, int64_t begin, int64_t end, const T* dy, const Id* ids, const I* index,
    const Units& units, S* out) {
  keep_rows_whole(hits, begin, end);
  for (int64_t i = begin; i < end; ++i) {
    const Hit& hit = hits[i];
    const T* row = dy + hit.token * units.n;
    const int64_t down = ids[hit.token] / units.height, first = down * units.across;
    if (units.size() == 1) {
      for (int64_t p = hit.from; p < hit.to; ++p) out[p] += S(row[index[p] - first]);
      continue;
    }
    S* sums = out + (ids[hit.token] - down * units.height) * units.width;
    for (int64_t p = hit.from; p < hit.to; ++p) {
      const int64_t column = (index[p] - first) * units.width, count = std::min(units.width, units.n - column);
      S* sum = sums + p * units.size();
      for (int64_t j = 0; j < count; ++j) sum[j] += S(row[column + j]);
    }
  }
}

Tensor masked_grad_embedding(
    const Tensor& grad_output, const Tensor& ids, const Tensor& positions, std::vector<int64_t> tile,
    int64_t padding_idx) {
  STD_TORCH_CHECK(
      grad_output.dim() == 2 && ids.dim() == 1 && grad_output.size(0) == ids.size(0) && grad_output.is_contiguous() &&
          ids.is_contiguous(),
      "grad_output [T, D] and ids [T] must be contiguous");
  const int64_t tokens = ids.size(0), width = grad_output.size(1), count = positions.numel();
  const Units units = units_of(1, width, tile);  // of one row of the table, whose height is not known
  Tensor result;
  with_floating(grad_output.scalar_type(), "masked_grad_embedding", [&](auto zero) {
    using T = decltype(zero);
    using S = opmath_t<T>;
    result = torch::stable::new_zeros(grad_output, {product(count, units.size())}, scalar_type<S>());
    auto* out = static_cast<S*>(result.mutable_data_ptr());
    const T* dy = data<T>(grad_output, "grad_output");
    with_positions(positions, [&](const auto* index) {
      with_positions(ids, [&](const auto* id) {
        const auto hits = find_hits(id, tokens, index, count, units.across, padding_idx, units.height);
        if (units.across != 1) check_hits(hits, index, units.across);
        parallel_for(0, int64_t(hits.size()), kGrain / (width + 1) + 1, [&](int64_t begin, int64_t end) {
          sum_hits(hits, begin, end, dy, id, index, units, out);
        });
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
