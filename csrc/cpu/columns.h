// Columns of rows closed up, or spread with zeros between them: one sorted list of columns for all rows.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
// The compiler finds no use for instructions that compress and expand by itself: the one place for intrinsics.
#define SK_COMPRESSES 1
#define SK_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2")))
#else
#define SK_COMPRESSES 0
#endif

namespace sk::cpu {

// The columns among the lanes of one vector: which they are, and how many there are before it.
struct Lanes {
  uint32_t mask, count;
  int64_t before;
};

inline bool compresses() {
#if SK_COMPRESSES
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi2");
#else
  return false;
#endif
}

// Lanes of all `vectors`, each of so many elements.
template <int64_t lanes, typename I>
void find_lanes(const I* columns, int64_t count, int64_t vectors, Lanes* out) {
  static_assert(lanes <= 32);
  std::fill_n(out, vectors, Lanes{0, 0, 0});
  for (int64_t k = 0; k < count; ++k) out[columns[k] / lanes].mask |= uint32_t(1) << (columns[k] % lanes);
  int64_t before = 0;
  for (int64_t i = 0; i < vectors; ++i) {
    out[i].count = uint32_t(__builtin_popcount(out[i].mask));
    out[i].before = before;
    before += out[i].count;
  }
}

#if SK_COMPRESSES
// Vectors of elements of 2, 4 and 8 bytes. Where `whole`, memory behind the lanes that count may be touched as well.
template <int bytes>
struct Vector {
  static constexpr int64_t kLanes = 64 / bytes;

  SK_VBMI2 static inline __m512i load(const void* p, bool whole, uint32_t mask) {
    if (whole) return _mm512_loadu_si512(p);
    if constexpr (bytes == 2) return _mm512_maskz_loadu_epi16(mask, p);
    if constexpr (bytes == 4) return _mm512_maskz_loadu_epi32(__mmask16(mask), p);
    return _mm512_maskz_loadu_epi64(__mmask8(mask), p);
  }
  SK_VBMI2 static inline void store(void* p, __m512i x, bool whole, uint32_t mask) {
    if (whole) return _mm512_storeu_si512(p, x);
    if constexpr (bytes == 2) _mm512_mask_storeu_epi16(p, mask, x);
    if constexpr (bytes == 4) _mm512_mask_storeu_epi32(p, __mmask16(mask), x);
    if constexpr (bytes == 8) _mm512_mask_storeu_epi64(p, __mmask8(mask), x);
  }
  SK_VBMI2 static inline __m512i compress(uint32_t mask, __m512i x) {
    if constexpr (bytes == 2) return _mm512_maskz_compress_epi16(mask, x);
    if constexpr (bytes == 4) return _mm512_maskz_compress_epi32(__mmask16(mask), x);
    return _mm512_maskz_compress_epi64(__mmask8(mask), x);
  }
  SK_VBMI2 static inline __m512i expand(uint32_t mask, __m512i x) {
    if constexpr (bytes == 2) return _mm512_maskz_expand_epi16(mask, x);
    if constexpr (bytes == 4) return _mm512_maskz_expand_epi32(__mmask16(mask), x);
    return _mm512_maskz_expand_epi64(__mmask8(mask), x);
  }
};

constexpr uint32_t first_lanes(int64_t count) { return count >= 32 ? ~uint32_t(0) : (uint32_t(1) << count) - 1; }

// Vectors of a row that may be read and written whole, on the wide side and on the narrow one: all but the last few.
template <int bytes>
int64_t whole_vectors(const Lanes* lanes, int64_t count, int64_t width) {
  int64_t i = width / Vector<bytes>::kLanes;
  while (i > 0 && lanes[i - 1].before + Vector<bytes>::kLanes > count) --i;
  return i;
}

template <int bytes>
SK_VBMI2 void compress_rows(
    const char* __restrict__ x, int64_t stride, const Lanes* lanes, int64_t count, int64_t width,
    char* __restrict__ out, int64_t begin, int64_t end) {
  using V = Vector<bytes>;
  const int64_t whole = whole_vectors<bytes>(lanes, count, width), all = (width + V::kLanes - 1) / V::kLanes;
  for (int64_t t = begin; t < end; ++t) {
    const char* from = x + t * stride * bytes;
    char* to = out + t * count * bytes;
    // What a store leaves behind the columns of one vector, those of the next one cover.
    for (int64_t i = 0; i < whole; ++i) {
      V::store(to + lanes[i].before * bytes, V::compress(lanes[i].mask, V::load(from + i * 64, true, 0)), true, 0);
    }
    for (int64_t i = whole; i < all; ++i) {
      const __m512i found = V::compress(lanes[i].mask, V::load(from + i * 64, false, lanes[i].mask));
      V::store(to + lanes[i].before * bytes, found, false, first_lanes(lanes[i].count));
    }
  }
}

template <int bytes>
SK_VBMI2 void expand_rows(
    const char* __restrict__ x, int64_t stride, const Lanes* lanes, int64_t count, int64_t width,
    char* __restrict__ out, int64_t begin, int64_t end) {
  using V = Vector<bytes>;
  const int64_t whole = whole_vectors<bytes>(lanes, count, width), all = (width + V::kLanes - 1) / V::kLanes;
  for (int64_t t = begin; t < end; ++t) {
    const char* from = x + t * stride * bytes;
    char* to = out + t * width * bytes;
    for (int64_t i = 0; i < whole; ++i) {
      V::store(to + i * 64, V::expand(lanes[i].mask, V::load(from + lanes[i].before * bytes, true, 0)), true, 0);
    }
    for (int64_t i = whole; i < all; ++i) {
      const __m512i found = V::load(from + lanes[i].before * bytes, false, first_lanes(lanes[i].count));
      V::store(to + i * 64, V::expand(lanes[i].mask, found), false, first_lanes(width - i * V::kLanes));
    }
  }
}
#endif

// out[t, k] = x[t, columns[k]] for rows [begin, end) and all `count` columns. Elements of any dtype move as integers of
// their size; with `lanes`, which are null where the machine does not compress, a vector at a time.
template <typename U, typename I>
void take_columns(
    const U* __restrict__ x, int64_t stride, const I* columns, [[maybe_unused]] const Lanes* lanes, int64_t count,
    int64_t width, U* __restrict__ out, int64_t begin, int64_t end) {
#if SK_COMPRESSES
  if (lanes) return compress_rows<sizeof(U)>((const char*)x, stride, lanes, count, width, (char*)out, begin, end);
#endif
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t k = 0; k < count; ++k) out[t * count + k] = x[t * stride + int64_t(columns[k])];
  }
}

// out[t, columns[k]] = x[t, k], and 0 elsewhere among `width` columns.
template <typename U, typename I>
void put_columns(
    const U* __restrict__ x, int64_t stride, const I* columns, [[maybe_unused]] const Lanes* lanes, int64_t count,
    int64_t width, U* __restrict__ out, int64_t begin, int64_t end) {
#if SK_COMPRESSES
  if (lanes) return expand_rows<sizeof(U)>((const char*)x, stride, lanes, count, width, (char*)out, begin, end);
#endif
  for (int64_t t = begin; t < end; ++t) {
    U* to = out + t * width;
    std::memset(to, 0, width * sizeof(U));  // a row at a time stays in the nearest cache
    for (int64_t k = 0; k < count; ++k) to[int64_t(columns[k])] = x[t * stride + k];
  }
}

}  // namespace sk::cpu
