// Scratch memory, and tasks that threads take one by one.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "../common.h"

namespace sk {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename S>
using Scratch = std::unique_ptr<S[], Free>;

// Uninitialized, aligned for whole vectors.
template <typename S>
Scratch<S> scratch(int64_t count) {
  const int64_t bytes = product(std::max<int64_t>(count, 1), sizeof(S));
  void* p = std::aligned_alloc(64, (size_t(bytes) + 63) / 64 * 64);
  STD_TORCH_CHECK(p != nullptr, "out of memory for ", bytes, " bytes of scratch");
  return Scratch<S>(static_cast<S*>(p));
}

// Calls make() once for each thread, and what it returns, which may own scratch of that thread, with task numbers. A
// thread that is done takes the next one: what a task computes must not depend on who runs it.
template <typename F>
void for_each_task(int64_t count, const F& make) {
  std::atomic<int64_t> next{0};
  parallel_for(0, count, 1, [&](int64_t, int64_t) {
    int64_t task = next++;
    if (task >= count) return;
    for (auto run = make(); task < count; task = next++) run(task);
  });
}

}  // namespace sk
