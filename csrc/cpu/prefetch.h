// Fetching scattered lines early.
#pragma once
#include <cstdint>

namespace sk::cpu {

constexpr int64_t kAhead = 256;  // positions between a prefetch and its use

// Into the second-level cache, also for lines that will be written: its miss queue is several times longer than the
// first level's (measured on Zen 4, 1 % of 50M floats: gather 3.8 -> 1.2 ms, scatter 3.4 -> 1.0 ms on one core).
inline __attribute__((always_inline)) void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

}  // namespace sk::cpu
