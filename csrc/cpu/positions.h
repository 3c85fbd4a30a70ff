// Positions are addresses: all of them are checked before anything is read or written, and nothing may move them after.
#pragma once
#include <algorithm>
#include <atomic>

#include "../common.h"

namespace sk {

// Whether each of positions [begin, end) is above the one before it.
template <typename I>
SK_CLONES bool ascend(const I* positions, int64_t begin, int64_t end) {
  I all = -1;
  for (int64_t k = std::max<int64_t>(begin, 1); k < end; ++k) all &= positions[k] > positions[k - 1] ? I(-1) : I(0);
  return all != 0;
}

// Calls f with a typed pointer to positions, int32 or int64.
template <typename F>
void with_positions(const Tensor& positions, const F& f) {
  STD_TORCH_CHECK(positions.dim() == 1 && positions.is_contiguous(), "positions must be contiguous, of one dimension");
  if (positions.scalar_type() == ScalarType::Int) {
    f(data<int32_t>(positions, "positions"));
  } else {
    STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Long, "positions must be int32 or int64");
    f(data<int64_t>(positions, "positions"));
  }
}

constexpr char kUnsorted[] = "positions must be sorted and unique; pass positions.unique()";

// Of sorted ones, the first and the last tell whether all stay inside.
template <typename I>
void check_ends(const I* positions, int64_t count, int64_t limit) {
  STD_TORCH_CHECK(
      count == 0 || (positions[0] >= 0 && positions[count - 1] < limit), "positions out of range for a size of ", limit,
      ": ", int64_t(positions[0]), " to ", int64_t(positions[count - 1]));
}

template <typename I>
void check_positions(const I* positions, int64_t count, int64_t limit) {
  if (count == 0) return;
  check_ends(positions, count, limit);
  constexpr int64_t kGrain = 1 << 16;  // positions that are worth a thread
  std::atomic<bool> sorted{true};
  if (count <= kGrain) {
    sorted = ascend(positions, 0, count);
  } else {
    parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      if (!ascend(positions, begin, end)) sorted = false;
    });
  }
  STD_TORCH_CHECK(sorted, kUnsorted);
}

// Memory that is read after it was checked must not be written by the same call.
struct Span {
  uintptr_t begin, end;

  Span(const void* data, int64_t bytes) : begin(uintptr_t(data)), end(begin + uintptr_t(bytes)) {}
  bool meets(const Span& other) const { return std::max(begin, other.begin) < std::min(end, other.end); }
};

inline void check_apart(const Span& read, const Span& written, const char* name) {
  STD_TORCH_CHECK(!read.meets(written), name, " must not share memory with what is changed");
}

// The same for lists of them, each against each.
inline void check_apart(std::vector<Span> read, const std::vector<Span>& written, const char* name) {
  std::sort(read.begin(), read.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < read.size(); ++i) read[i].end = std::max(read[i].end, read[i - 1].end);
  for (const Span& own : written) {
    const auto past =
        std::lower_bound(read.begin(), read.end(), own.end, [](const Span& a, uintptr_t end) { return a.begin < end; });
    if (past != read.begin()) check_apart(*(past - 1), own, name);
  }
}

}  // namespace sk
