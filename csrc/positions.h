// Positions are addresses: all of them are checked before anything is read or written, and nothing may move them after.
#pragma once
#include <algorithm>
#include <atomic>

#include "common.h"

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

// Ascending ones stay inside if the first and the last do.
template <typename I>
void check_positions(const I* positions, int64_t count, int64_t limit) {
  if (count == 0) return;
  STD_TORCH_CHECK(
      positions[0] >= 0 && positions[count - 1] < limit, "positions out of range for a size of ", limit, ": ",
      int64_t(positions[0]), " to ", int64_t(positions[count - 1]));
  constexpr int64_t kGrain = 1 << 16;  // positions that are worth a thread
  std::atomic<bool> sorted{true};
  if (count <= kGrain) {
    sorted = ascend(positions, 0, count);
  } else {
    parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      if (!ascend(positions, begin, end)) sorted = false;
    });
  }
  STD_TORCH_CHECK(sorted, "positions must be sorted and unique; pass positions.unique()");
}

// Memory that is read after it was checked must not be written by the same call.
struct Span {
  uintptr_t begin, end;

  explicit Span(const Tensor& x) : begin(uintptr_t(x.const_data_ptr())), end(begin + uintptr_t(bytes_of(x))) {}
  bool meets(const Span& other) const { return std::max(begin, other.begin) < std::min(end, other.end); }
};

constexpr char kShared[] = " must not share memory with what is changed";

inline void check_apart(const Tensor& read, const Tensor& written, const char* name) {
  STD_TORCH_CHECK(!Span(read).meets(Span(written)), name, kShared);
}

// The same for lists of tensors, each against each.
class Apart {
 public:
  void read(const Tensor& x) { if (x.numel() > 0) read_.emplace_back(x); }
  void written(const Tensor& x) { if (x.numel() > 0) written_.emplace_back(x); }

  void check(const char* name) {
    std::sort(read_.begin(), read_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    for (size_t i = 1; i < read_.size(); ++i) read_[i].end = std::max(read_[i].end, read_[i - 1].end);
    for (const Span& own : written_) {
      const auto past = std::lower_bound(
          read_.begin(), read_.end(), own.end, [](const Span& a, uintptr_t end) { return a.begin < end; });
      STD_TORCH_CHECK(past == read_.begin() || !(past - 1)->meets(own), name, kShared);
    }
  }

 private:
  std::vector<Span> read_, written_;
};

}  // namespace sk
