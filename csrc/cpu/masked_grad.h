// Weight gradients at selected elements of a Linear; narrow_product.h and block_product.h have those of larger units.
//
// Tokens are packed, a chunk at a time, into panels: X^T as [N][chunk] and dY^T as [M][chunk], in the dtype of the sum.
// A position is then a dot product of two contiguous runs, and the chunk is as long as X's panel fits the second-level
// cache. Positions are summed in groups whose lanes one tree of shuffles folds together: ordered, so the result is
// deterministic.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common.h"
#include "blocks.h"

#define SK_SHUFFLE __builtin_shufflevector

namespace sk::cpu {

constexpr int64_t kLine = 16;  // chunks are multiples of this many tokens
constexpr int64_t kPanelBytes = 1 << 19;  // what X's panel may take of the second-level cache
constexpr int kGroup = 8;  // positions that share a reduction

template <int bytes>
using Floats = typename Vector<float, bytes>::type;

inline int64_t chunk_for(int64_t n, int64_t tokens, int64_t itemsize) {
  const int64_t fits = kPanelBytes / (std::max<int64_t>(n, 1) * itemsize);
  const int64_t wanted = std::clamp<int64_t>(fits / kLine * kLine, 4 * kLine, 16 * kLine);
  return std::min(wanted, (tokens + kLine - 1) / kLine * kLine);
}

// A square block of floats, one row a vector, transposed in registers: at each level, rows 2^l apart exchange runs of
// 2^l lanes.
SK_INLINE void transpose(Floats<64>* r) {
  for (int i = 0; i < 16; i += 2) {
    const Floats<64> a = r[i], b = r[i + 1];
    r[i] = SK_SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    r[i + 1] = SK_SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 16; i += (i & 1) ? 3 : 1) {
    const Floats<64> a = r[i], b = r[i + 2];
    r[i] = SK_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    r[i + 2] = SK_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 16; i += (i & 3) == 3 ? 5 : 1) {
    const Floats<64> a = r[i], b = r[i + 4];
    r[i] = SK_SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    r[i + 4] = SK_SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  for (int i = 0; i < 8; ++i) {
    const Floats<64> a = r[i], b = r[i + 8];
    r[i] = SK_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    r[i + 8] = SK_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
}
SK_INLINE void transpose(Floats<32>* r) {
  for (int i = 0; i < 8; i += 2) {
    const Floats<32> a = r[i], b = r[i + 1];
    r[i] = SK_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
    r[i + 1] = SK_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += (i & 1) ? 3 : 1) {
    const Floats<32> a = r[i], b = r[i + 2];
    r[i] = SK_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
    r[i + 2] = SK_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    const Floats<32> a = r[i], b = r[i + 4];
    r[i] = SK_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = SK_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// to[b * chunk + a] = token(t + a)[j + b] for a line of tokens and a line of columns.
template <int bytes, typename T, typename F>
SK_INLINE void pack_line(const F& token, int64_t t, int64_t j, float* to, int64_t chunk) {
  constexpr int64_t lanes = bytes / 4;
  for (int64_t down = 0; down < kLine; down += lanes) {
    for (int64_t across = 0; across < kLine; across += lanes) {
      Floats<bytes> block[lanes];
      for (int64_t a = 0; a < lanes; ++a) {
        const T* row = token(t + down + a) + j + across;
        for (int64_t b = 0; b < lanes; ++b) block[a][b] = float(row[b]);
      }
      transpose(block);
      for (int64_t b = 0; b < lanes; ++b) {
        *reinterpret_cast<Floats<bytes>*>(to + (across + b) * chunk + down) = block[b];
      }
    }
  }
}

// panel[j * chunk + t] = from[t * width + j] for columns [begin, end) and tokens [0, tokens); zero past the last token.
// Where `order` is given, order[t] is used instead of t on the right.
template <typename S, typename T>
SK_CLONES void pack(
    const T* __restrict__ from, const int64_t* order, S* __restrict__ panel, int64_t width, int64_t chunk,
    int64_t tokens, int64_t begin, int64_t end) {
  const auto token = [&](int64_t t) { return from + (order ? order[t] : t) * width; };
  const int bytes = register_bytes();
  for (int64_t t = 0; t < chunk; t += kLine) {
    const int64_t rows = std::clamp<int64_t>(tokens - t, 0, kLine);
    for (int64_t j = begin; j < end; j += kLine) {
      const int64_t columns = std::min(kLine, end - j);
      S* to = panel + j * chunk + t;
      if constexpr (std::is_same_v<S, float>) {
        if (rows == kLine && columns == kLine && bytes >= 32) {
          if (bytes == 64) pack_line<64, T>(token, t, j, to, chunk);
          else pack_line<32, T>(token, t, j, to, chunk);
          continue;
        }
      }
      for (int64_t b = 0; b < columns; ++b) {
        for (int64_t a = 0; a < kLine; ++a) to[b * chunk + a] = a < rows ? S(token(t + a)[j + b]) : S(0);
      }
    }
  }
}

// out[g] += the sum of the lanes of sums[g]; each level halves the lanes of every accumulator and joins two in one.
SK_INLINE void fold(const Floats<64>* s, float* out) {
  Floats<64> a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    a[i] = SK_SHUFFLE(s[2 * i], s[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SK_SHUFFLE(s[2 * i], s[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    b[i] = SK_SHUFFLE(a[2 * i], a[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SK_SHUFFLE(a[2 * i], a[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  const Floats<64> c = SK_SHUFFLE(b[0], b[1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
                       SK_SHUFFLE(b[0], b[1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  for (int g = 0; g < kGroup; ++g) out[g] += c[2 * g] + c[2 * g + 1];
}
SK_INLINE void fold(const Floats<32>* s, float* out) {
  Floats<32> a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    a[i] = SK_SHUFFLE(s[2 * i], s[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11) +
           SK_SHUFFLE(s[2 * i], s[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 2; ++i) {
    b[i] = SK_SHUFFLE(a[2 * i], a[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13) +
           SK_SHUFFLE(a[2 * i], a[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15);
  }
  const Floats<32> c =
      SK_SHUFFLE(b[0], b[1], 0, 2, 4, 6, 8, 10, 12, 14) + SK_SHUFFLE(b[0], b[1], 1, 3, 5, 7, 9, 11, 13, 15);
  for (int g = 0; g < kGroup; ++g) out[g] += c[g];
}
template <typename V, typename S>
SK_INLINE void fold(const V* s, S* out) {
  constexpr int lanes = sizeof(V) / sizeof(S);
  for (int g = 0; g < kGroup; ++g) {
    S half[lanes];
    for (int l = 0; l < lanes; ++l) half[l] = s[g][l];
    for (int l = lanes / 2; l > 0; l /= 2) {
      for (int i = 0; i < l; ++i) half[i] += half[i + l];
    }
    out[g] += half[0];
  }
}

template <int bytes, typename S>
SK_INLINE void dot_panel_with(
    const S* __restrict__ x, const S* __restrict__ dy, int64_t chunk, const int32_t* row, const int32_t* column,
    S* __restrict__ out, int64_t begin, int64_t end) {
  using V = typename Vector<S, bytes>::type;
  const int64_t steps = chunk * int64_t(sizeof(S)) / bytes;
  for (int64_t k = begin; k < end; k += kGroup) {
    const int count = int(std::min<int64_t>(kGroup, end - k));
    V sums[kGroup];
    for (int g = 0; g < kGroup; ++g) {
      const int64_t at = k + (g < count ? g : 0);  // a short group repeats its first position
      const V* a = reinterpret_cast<const V*>(dy + row[at] * chunk);
      const V* b = reinterpret_cast<const V*>(x + column[at] * chunk);
      V sum = a[0] * b[0];
      for (int64_t s = 1; s < steps; ++s) sum += a[s] * b[s];
      sums[g] = sum;
    }
    if (count == kGroup) {
      fold(sums, out + k);
    } else {
      S found[kGroup] = {};
      fold(sums, found);
      for (int g = 0; g < count; ++g) out[k + g] += found[g];
    }
  }
}

// out[k] += the sum over the tokens of one panel, for positions [begin, end).
template <typename S>
SK_CLONES void dot_panel(
    const S* __restrict__ x, const S* __restrict__ dy, int64_t chunk, const int32_t* row, const int32_t* column,
    S* __restrict__ out, int64_t begin, int64_t end) {
  switch (register_bytes()) {
    case 64: return dot_panel_with<64>(x, dy, chunk, row, column, out, begin, end);
    case 32: return dot_panel_with<32>(x, dy, chunk, row, column, out, begin, end);
    default: return dot_panel_with<16>(x, dy, chunk, row, column, out, begin, end);
  }
}

}  // namespace sk::cpu
