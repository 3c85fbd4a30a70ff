// Which tokens of a lookup hit selected rows of the table, and in which order their gradients are added.
#pragma once
#include <algorithm>
#include <functional>
#include <limits>

#include "../common.h"
#include "positions.h"
#include "radix.h"

namespace sk {

// A token whose id is selected: entries [from, to) of the positions lie in its row.
struct Hit {
  int64_t token, from, to;
};

// By `from`, stably: sums run in the order of the tokens.
inline void sort_hits(std::vector<Hit>& hits) {
  sort_stably(hits, [](const Hit& hit) { return hit.from; });
}

inline bool same_row(const std::vector<Hit>& hits, int64_t i) {
  return i > 0 && i < int64_t(hits.size()) && hits[i].from == hits[i - 1].from;
}
// Hits of one row follow each other and are of one thread: the range is moved on to where rows change.
inline void keep_rows_whole(const std::vector<Hit>& hits, int64_t& begin, int64_t& end) {
  while (begin < end && same_row(hits, begin)) ++begin;
  while (end > begin && same_row(hits, end)) ++end;
}

// The hits in order of position, then of token. Bisection looks at few of many positions: to check them all would cost
// more than the rest. Where they are not sorted, a hit may list positions of other rows: see check_hits. At most
// `per_row` positions lie in a row: 1, or the row's width. Where `height` is given, so many rows of the table count as
// one: those of a block.
template <typename Id, typename I>
std::vector<Hit> find_hits(
    const Id* ids, int64_t tokens, const I* index, int64_t count, int64_t per_row, int64_t padding_idx,
    int64_t height = 1) {
  if (count == 0) return {};
  STD_TORCH_CHECK(per_row > 0, "rows without elements have no positions");
  check_ends(index, count, std::numeric_limits<int64_t>::max() - per_row);  // there is a row after the last
  const int64_t first_row = index[0] / per_row, last_row = index[count - 1] / per_row;
  std::vector<Hit> hits(tokens);
  parallel_for(0, tokens, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      hits[t] = {t, 0, 0};
      if (ids[t] == padding_idx || ids[t] < 0) continue;
      const int64_t id = ids[t] / height;
      if (id < first_row || id > last_row) continue;
      const I* from = std::lower_bound(index, index + count, id * per_row);
      const int64_t at = from - index, left = std::min(per_row, count - at);
      if (left == 0) continue;
      const I* to = per_row == 1 ? from + (*from == id) : std::lower_bound(from, from + left, (id + 1) * per_row);
      hits[t] = {t, at, to - index};
    }
  });
  hits.erase(std::remove_if(hits.begin(), hits.end(), [](const Hit& hit) { return hit.from == hit.to; }), hits.end());
  sort_hits(hits);
  return hits;
}

// Whether the positions of each hit ascend and lie in one row.
template <typename I>
void check_hits(const std::vector<Hit>& hits, const I* index, int64_t per_row) {
  for (size_t i = 0; i < hits.size(); ++i) {
    if (same_row(hits, int64_t(i))) continue;
    const I *from = index + hits[i].from, *to = index + hits[i].to;
    const bool ascends = std::adjacent_find(from, to, std::greater_equal<I>()) == to;
    STD_TORCH_CHECK(ascends && *from / per_row == to[-1] / per_row, kUnsorted);
  }
}

}  // namespace sk
