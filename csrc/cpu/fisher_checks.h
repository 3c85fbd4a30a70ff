// Checks that the fisher ops share.
#pragma once
#include "positions.h"

namespace sk {

// Memory of total or norms, which must have `numel` elements; null where it is not wanted.
template <typename S>
S* sum_pointer(const MaybeTensor& sum, int64_t numel, const char* name) {
  if (!sum) return nullptr;
  STD_TORCH_CHECK(
      sum->is_contiguous() && sum->scalar_type() == scalar_type<S>() && sum->numel() == numel, name,
      " must be contiguous, of ", numel, " elements in fp32 (fp64 for fp64 activations)");
  return mutable_data<S>(*sum, name);
}

// Calls f with a typed pointer to positions, null where all are selected; not at all where none is. What is changed are
// `total`, of `elements`, and `norms`, one for each of `samples`.
template <typename S, typename F>
void with_selection(
    const MaybeTensor& positions, const S* total, int64_t elements, const S* norms, int64_t samples, const F& f) {
  if (!positions) return f(static_cast<const int64_t*>(nullptr));
  with_positions(*positions, [&](const auto* index) {
    const int64_t count = positions->numel();
    const Span own(index, count * int64_t(sizeof(*index)));
    if (total) check_apart(own, {total, elements * int64_t(sizeof(S))}, "positions");
    if (norms) check_apart(own, {norms, samples * int64_t(sizeof(S))}, "positions");
    if (count > 0) f(index);
  });
}

}  // namespace sk
