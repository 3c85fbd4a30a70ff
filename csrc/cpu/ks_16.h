// The same for dtypes of 16 bits: where a row has few magnitudes, a bucket for each number makes the histogram exact.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "ks.h"

namespace sk::cpu {

// Magnitudes, without those of zeros, and whether there is a NaN.
struct Magnitudes {
  uint16_t least, most;
  bool nan;
};

SK_CLONES inline Magnitudes magnitudes(const uint16_t* bits, int64_t n, uint16_t infinity) {
  uint16_t least = 0xffff, most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t magnitude = bits[i] & 0x7fff;
    least = std::min(least, uint16_t(magnitude - 1));  // of a zero: the largest there is
    most = std::max(most, magnitude);
  }
  return {uint16_t(least + 1), most, most > infinity};
}

// One bucket a number: zero in the middle, as many as there are magnitudes on either side of it.
SK_CLONES inline void find_places(
    const uint16_t* bits, int64_t n, int32_t least, int32_t middle, int shift, uint16_t* places) {
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = bits[i] & 0x7fff;
    const int32_t from_zero = magnitude ? magnitude - least + 1 : 0;
    places[i] = uint16_t(place_of(bits[i] & 0x8000 ? middle - from_zero : middle + from_zero, shift));
  }
}

// Of two rows of few magnitudes: exact at once, for no bucket holds two values.
template <typename D, typename F, typename C, typename Value>
void search_whole(
    const uint16_t* x, int64_t n, const uint16_t* y, int64_t m, int32_t least, int32_t middle, int shift,
    const Steps& steps, const Level<F, C>& at, Extremes<F>& found, const Value& value) {
  find_places(x, n, least, middle, shift, at.x_places);
  find_places(y, m, least, middle, shift, at.y_places);
  visit_candidates<true, D>(at, n, m, shift, 0, steps, found, [&](int64_t, int64_t bucket, C here, int64_t before) {
    const int64_t here_x = here & kMask<C>, here_y = here >> kHalf<C>;
    const int64_t from_zero = std::abs(bucket - middle), magnitude = from_zero ? from_zero + least - 1 : 0;
    found.see(
        before + steps.up * here_x - steps.down * here_y, value(uint16_t(magnitude | (bucket < middle ? 0x8000 : 0))),
        here_x > 0);
  });
}

}  // namespace sk::cpu
