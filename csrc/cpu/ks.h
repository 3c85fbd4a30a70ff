// The largest differences of two empirical distribution functions, by branch and bound over a histogram.
//
// A difference is counted in units of 1/lcm(n, m): each element of x lifts it by `up`, each of y lowers it by `down`.
// Both samples are counted in buckets of the same width. The difference is known where a bucket ends, and bounded by
// the counts inside: only buckets that could hold the largest one are looked into, which are a few in hundred. Small
// ones are sorted, crowded ones counted again, in buckets that follow the magnitudes of what they hold.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../common.h"

namespace sk::cpu {

constexpr int64_t kLanes = 16;          // stretches of the histogram that are summed side by side
constexpr int64_t kMostBuckets = 1 << 15;
constexpr int64_t kSortAtOnce = 128;    // elements that are not worth a histogram
constexpr int kLevels = 3;              // of histograms within a bucket: one by value, the others by key

struct Steps {
  int64_t up, down;
  bool high, low;  // whether the largest difference is wanted, and the smallest
};

// The largest and the smallest difference so far, seen in ascending order of values, and where scipy finds them: at the
// first of the tied values, all of x before all of y. The largest difference is first reached at a value of x.
template <typename F>
struct Extremes {
  int64_t high = -1, low = 1;
  F high_at = 0, low_at = 0;
  bool low_in_x = true;

  void see(int64_t difference, F value, bool in_x) {
    if (difference > high) {
      high = difference;
      high_at = value;
    }
    if (difference < low || (difference == low && in_x && !low_in_x)) {
      low = difference;
      low_at = value;
      low_in_x = in_x;
    }
  }

  // Forget what is no better than a difference that is known to be reached.
  void raise(const Steps& steps, int64_t most, int64_t least) {
    if (steps.high && steps.low) most = std::max(most, -least), least = -most;
    if (steps.high && most > high) high = most - 1;
    if (steps.low && least < low) low = least + 1, low_in_x = true;
  }

  // What it takes to change the outcome; of the two sides, the largest difference wins ties.
  int64_t least_high(const Steps& steps) const {
    if (!steps.high) return std::numeric_limits<int64_t>::max();
    return steps.low ? std::max(high + 1, -low) : high + 1;
  }
  int64_t most_low(const Steps& steps) const {
    if (!steps.low) return std::numeric_limits<int64_t>::min();
    const int64_t own = low - low_in_x;
    return steps.high ? std::min(own, -high - 1) : own;
  }
};

// A bucket that could hold what is looked for: where its elements go, and the difference before it.
template <typename F>
struct Candidate {
  F *x, *y;
  int64_t n, m, difference;
};

// Scratch of one histogram. Two counts share a number of type C: elements of x in its lower half, of y in its upper.
template <typename F, typename C>
struct Level {
  uint16_t *x_places, *y_places, *slots, *rows;
  uint8_t *marks, *any;
  C *counts, *before;
  F* gathered;
  Candidate<F>* candidates;
};

template <typename C>
constexpr int kHalf = 4 * sizeof(C);
template <typename C>
constexpr C kMask = ~(~C(0) << kHalf<C>);

template <typename F>
struct Range {
  F least, most;
  bool nan;
};

template <typename F>
Range<F> joined(const Range<F>& a, const Range<F>& b) {
  return {std::min(a.least, b.least), std::max(a.most, b.most), a.nan || b.nan};
}

template <typename F>
SK_CLONES Range<F> range(const F* v, int64_t n, bool finite) {
  constexpr F infinity = std::numeric_limits<F>::infinity();
  F least[kLanes], most[kLanes];
  int nan[kLanes] = {};
  for (int64_t l = 0; l < kLanes; ++l) least[l] = infinity, most[l] = -infinity;
  const auto take = [&](F value, int64_t l) {
    const bool skip = finite && !(value > -infinity && value < infinity);
    least[l] = !skip && value < least[l] ? value : least[l];
    most[l] = !skip && value > most[l] ? value : most[l];
    nan[l] |= value != value;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) take(v[i + l], l);
  }
  for (; i < n; ++i) take(v[i], 0);
  Range<F> all{least[0], most[0], nan[0] != 0};
  for (int64_t l = 1; l < kLanes; ++l) { all = joined(all, {least[l], most[l], nan[l] != 0}); }
  return all;
}

// Bucket b lies at (b % stretch) * kLanes + b / stretch: the next stretch is in the next lane. `shift` is
// log2(stretch).
inline __attribute__((always_inline)) int32_t place_of(int32_t bucket, int shift) {
  return (bucket & ((1 << shift) - 1)) * int32_t(kLanes) + (bucket >> shift);
}

// Buckets of equal width from `least` on. Each step rounds monotonically, so no bucket holds a value that is smaller
// than one of the bucket before; what lies outside goes to the first and to the last.
template <typename F>
SK_CLONES void find_places(const F* v, int64_t n, F least, F scale, int shift, uint16_t* places) {
  const F last = F((kLanes << shift) - 1);
  for (int64_t i = 0; i < n; ++i) {
    F at = (v[i] - least) * scale;
    at = at > F(0) ? at : F(0);
    at = at < last ? at : last;
    places[i] = uint16_t(place_of(int32_t(at), shift));
  }
}

// Integers in the order of floats; both zeros are one.
template <typename F>
inline __attribute__((always_inline)) auto key_of(F value) {
  using K = std::conditional_t<sizeof(F) == 4, int32_t, int64_t>;
  value += 0;
  K bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits ^ ((bits >> (8 * sizeof(K) - 1)) & std::numeric_limits<K>::max());
}

// The same by keys: buckets are wider the further they are from zero, as values are that spread over many magnitudes.
template <typename F>
SK_CLONES void find_places_by_key(const F* v, int64_t n, F least, F most, int shift, uint16_t* places) {
  using K = decltype(key_of(least));
  using U = std::make_unsigned_t<K>;
  const K low = key_of(least), high = std::max(key_of(most), low);
  int drop = 0;
  while (((U(high) - U(low)) >> drop) > U((kLanes << shift) - 1)) ++drop;
  for (int64_t i = 0; i < n; ++i) {
    const K key = std::min(std::max(key_of(v[i]), low), high);
    places[i] = uint16_t(place_of(int32_t((U(key) - U(low)) >> drop), shift));
  }
}

template <typename C>
void count(const uint16_t* places, int64_t n, C one, C* counts) {
  for (int64_t i = 0; i < n; ++i) counts[places[i]] += one;
}

// Sums before each bucket, and the extremes of the differences where buckets end.
template <typename C, typename D>
SK_CLONES void sum_up(const C* counts, C* before, int64_t stretch, D up, D down, D start, D* most, D* least) {
  C sums[kLanes] = {};
  for (int64_t q = 0; q < stretch; ++q) {
    for (int64_t l = 0; l < kLanes; ++l) sums[l] += counts[q * kLanes + l];
  }
  C total = 0;
  for (int64_t l = 0; l < kLanes; ++l) {
    const C own = sums[l];
    sums[l] = total;
    total += own;
  }
  D highs[kLanes], lows[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) highs[l] = lows[l] = start;
  for (int64_t q = 0; q < stretch; ++q) {
    for (int64_t l = 0; l < kLanes; ++l) {
      before[q * kLanes + l] = sums[l];
      sums[l] += counts[q * kLanes + l];
      const D difference = start + up * D(sums[l] & kMask<C>) - down * D(sums[l] >> kHalf<C>);
      highs[l] = highs[l] > difference ? highs[l] : difference;
      lows[l] = lows[l] < difference ? lows[l] : difference;
    }
  }
  *most = *std::max_element(highs, highs + kLanes);
  *least = *std::min_element(lows, lows + kLanes);
}

// Marks buckets in which a difference of at least `high`, or of at most `low`, is possible; `whole` where a bucket is
// one value, and the difference where it ends all there is. Returns whether there are any for each row of lanes.
template <bool whole, typename C, typename D>
SK_CLONES void mark(
    const C* counts, const C* before, int64_t stretch, D up, D down, D start, D high, D low, uint8_t* marks,
    uint8_t* any) {
  for (int64_t q = 0; q < stretch; ++q) {
    D found[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {
      const C here = counts[q * kLanes + l], past = before[q * kLanes + l];
      const D lift = up * D(here & kMask<C>), drop = down * D(here >> kHalf<C>);
      const D first = start + up * D(past & kMask<C>) - down * D(past >> kHalf<C>);
      const D end = first + lift - drop;
      const D top = whole ? end : first + lift, bottom = whole ? end : first - drop;
      found[l] = D((lift > 0) & (top >= high)) | D((drop > 0) & (bottom <= low));
      if (whole) found[l] |= D((lift > 0) & (bottom <= low));
    }
    D some = 0;
    for (int64_t l = 0; l < kLanes; ++l) {
      marks[q * kLanes + l] = uint8_t(found[l]);
      some |= found[l];
    }
    any[q] = uint8_t(some);
  }
}

// Moves the elements of candidates to where slots[place] - 1 says.
template <typename F>
void gather(
    const F* v, const uint16_t* places, int64_t n, const uint16_t* slots, F* Candidate<F>::* to,
    Candidate<F>* candidates) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t slot = slots[places[i]];
    if (slot) *(candidates[slot - 1].*to)++ = v[i];
  }
}

// Both samples sorted, and the difference at each distinct value.
template <typename F>
SK_CLONES void merge(F* x, int64_t n, F* y, int64_t m, int64_t difference, const Steps& steps, Extremes<F>& found) {
  std::sort(x, x + n);
  std::sort(y, y + m);
  int64_t i = 0, j = 0;
  while (i < n || j < m) {
    const F value = j == m || (i < n && x[i] < y[j]) ? x[i] : y[j];
    const bool in_x = i < n && x[i] == value;
    for (; i < n && x[i] == value; ++i) difference += steps.up;
    for (; j < m && y[j] == value; ++j) difference -= steps.down;
    found.see(difference, value, in_x);
  }
}

template <typename D>
D clamped(int64_t difference) {
  return D(std::clamp<int64_t>(difference, std::numeric_limits<D>::min(), std::numeric_limits<D>::max()));
}

// Counts both samples, whose places are known, and calls visit(place, bucket, counts in it, difference before it) for
// each bucket that matters, in ascending order.
template <bool whole, typename D, typename F, typename C, typename Visit>
void visit_candidates(
    const Level<F, C>& at, int64_t n, int64_t m, int shift, int64_t start, const Steps& steps, Extremes<F>& found,
    const Visit& visit) {
  const int64_t stretch = int64_t(1) << shift;
  std::memset(at.counts, 0, stretch * kLanes * sizeof(C));
  count(at.x_places, n, C(1), at.counts);
  count(at.y_places, m, C(C(1) << kHalf<C>), at.counts);
  const D up = D(steps.up), down = D(steps.down);
  D most, least;
  sum_up(at.counts, at.before, stretch, up, down, D(start), &most, &least);
  found.raise(steps, most, least);
  mark<whole>(
      at.counts, at.before, stretch, up, down, D(start), clamped<D>(found.least_high(steps)),
      clamped<D>(found.most_low(steps)), at.marks, at.any);
  int64_t rows = 0;
  for (int64_t q = 0; q < stretch; ++q) {
    at.rows[rows] = uint16_t(q);
    rows += at.any[q];
  }
  for (int64_t l = 0; l < kLanes; ++l) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t place = at.rows[r] * kLanes + l;
      if (!at.marks[place]) continue;
      const C past = at.before[place];
      visit(
          place, l * stretch + at.rows[r], at.counts[place],
          start + steps.up * int64_t(past & kMask<C>) - steps.down * int64_t(past >> kHalf<C>));
    }
  }
}

// About two elements a bucket.
inline int shift_for(int64_t elements) {
  int shift = 2;
  while ((kLanes << shift) < std::min(elements / 2, kMostBuckets)) ++shift;
  return shift;
}

// Adds what is found among n elements of x and m of y, given the difference before all of them, and their range.
template <typename D, typename F, typename C>
void search(
    const F* x, int64_t n, const F* y, int64_t m, Range<F> within, int64_t start, const Steps& steps,
    const Level<F, C>* levels, int left, Extremes<F>& found) {
  const Level<F, C>& at = levels[0];
  const int shift = shift_for(n + m);
  if (left == kLevels) {
    constexpr F largest = std::numeric_limits<F>::max();
    if (!(within.most - within.least <= largest)) {
      within.least /= 2;
      within.most /= 2;
    }
    const F scale = std::min(F((kLanes << shift) - 1) / (within.most - within.least), largest);
    find_places(x, n, within.least, scale, shift, at.x_places);
    find_places(y, m, within.least, scale, shift, at.y_places);
  } else {
    find_places_by_key(x, n, within.least, within.most, shift, at.x_places);
    find_places_by_key(y, m, within.least, within.most, shift, at.y_places);
  }

  std::memset(at.slots, 0, (kLanes << shift) * sizeof(uint16_t));
  int64_t candidates = 0;
  F* next = at.gathered;
  visit_candidates<false, D>(at, n, m, shift, start, steps, found, [&](int64_t place, int64_t, C here, int64_t before) {
    Candidate<F>& c = at.candidates[candidates++];
    c = {next, next + int64_t(here & kMask<C>), int64_t(here & kMask<C>), int64_t(here >> kHalf<C>), before};
    next = c.y + c.m;
    at.slots[place] = uint16_t(candidates);
  });
  gather(x, at.x_places, n, at.slots, &Candidate<F>::x, at.candidates);
  gather(y, at.y_places, m, at.slots, &Candidate<F>::y, at.candidates);
  for (int64_t k = 0; k < candidates; ++k) {
    const Candidate<F>& c = at.candidates[k];
    if (c.difference + steps.up * c.n < found.least_high(steps) &&
        c.difference - steps.down * c.m > found.most_low(steps)) {
      continue;
    }
    F *own_x = c.x - c.n, *own_y = c.y - c.m;  // gathering moved them to the ends
    if (left > 1 && c.n + c.m > kSortAtOnce) {
      const Range<F> inside = joined(range(own_x, c.n, true), range(own_y, c.m, true));
      search<D>(own_x, c.n, own_y, c.m, inside, c.difference, steps, levels + 1, left - 1, found);
    } else {
      merge(own_x, c.n, own_y, c.m, c.difference, steps, found);
    }
  }
}

template <typename T, typename F>
SK_CLONES void widen(const T* from, int64_t n, F* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = F(from[i]);
}

}  // namespace sk::cpu
