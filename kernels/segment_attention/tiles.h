// Tiles of products over columns that begin anywhere, and what goes with them: sums over lanes, and vectors of tokens as columns.

#pragma once

#include <type_traits>

#include "../native.h"

namespace {

constexpr int64_t kPanel = kTileColumns * kLanes;

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__)
#define CHOSEN(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t FourWhole __attribute__((vector_size(16)));
#define CHOSEN(a, b, ...) __builtin_shuffle(a, b, FourWhole{__VA_ARGS__})
#endif

inline int64_t floor_to(int64_t x, int64_t multiple) { return x / multiple * multiple; }
inline int64_t ceil_to(int64_t x, int64_t multiple) { return floor_to(x + multiple - 1, multiple); }

inline Whole ascending() {
  Whole lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

// Combines all lanes: halves of halves, since one lane after the other would wait for each sum.
template <int kCount, typename Combine>
inline float reduce(const float* lanes, Combine combine) {
  if constexpr (kCount == 2) {
    return combine(lanes[0], lanes[1]);
  } else {
    typedef float Half __attribute__((vector_size(2 * kCount), aligned(4), may_alias));
    const Half* halves = reinterpret_cast<const Half*>(lanes);
    Half combined = combine(halves[0], halves[1]);
    return reduce<kCount / 2>(reinterpret_cast<const float*>(&combined), combine);
  }
}
inline float sum_of(Vector x) {
  return reduce<kLanes>(reinterpret_cast<const float*>(&x), [](auto a, auto b) { return a + b; });
}
inline float largest_of(Vector x) {
  return reduce<kLanes>(reinterpret_cast<const float*>(&x), [](auto a, auto b) { return a > b ? a : b; });
}

// Columns of whole vectors that hold [begin, end): from `begin` on, if all of them lie in one panel, else from a multiple of kLanes on.
struct Columns {
  Columns(int64_t from, int64_t to) : begin(from), end(from) {
    if (from >= to) return;
    if (from % kPanel + ceil_to(to - from, kLanes) > kPanel) begin = floor_to(from, kLanes);
    end = begin + ceil_to(to - begin, kLanes);
  }
  int64_t begin, end;
};

// Calls work(number of vectors, first column) for all columns, never across the border of a panel.
template <typename Work>
inline void each_tile(Columns columns, Work work) {
  int64_t begin = columns.begin, end = columns.end;
  while (begin < end) {
    int64_t stop = std::min(floor_to(begin, kPanel) + kPanel, end);
    for (; begin + kPanel <= stop; begin += kPanel) work(std::integral_constant<int, kTileColumns>(), begin);
    for (; begin + kPanel / 2 <= stop; begin += kPanel / 2) work(std::integral_constant<int, kTileColumns / 2>(), begin);
    for (; begin < stop; begin += kLanes) work(std::integral_constant<int, 1>(), begin);
  }
}

// Calls put(row, column, vector) for every vector of a b, which has up to kTileRows rows.
template <typename Put>
inline void multiply(const float* a, int64_t row_stride, int64_t step, int64_t rows, int64_t depth, const float* b, int64_t b_stride,
                     int64_t columns, Put put) {
  each_tile({0, columns}, [&](auto width, int64_t column) {
    Vector sums[kTileRows][width];
    multiply_tile<width>(a, row_stride, step, rows, depth, b + column, b_stride, sums);
    for (int64_t r = 0; r < rows; ++r)
      for (int c = 0; c < width; ++c) put(r, column + c * kLanes, sums[r][c]);
  });
}

// Vectors of tokens, `stride` apart, as panels [size, kPanel] of tokens. Up to three tokens beyond the last one repeat it.
inline void transpose(const float* from, int64_t stride, int64_t length, int64_t size, float* panels) {
  for (int64_t t = 0; t < length; t += 4) {
    const Four* tokens[4];
    for (int64_t i = 0; i < 4; ++i) tokens[i] = reinterpret_cast<const Four*>(from + std::min(t + i, length - 1) * stride);
    float* to = panels + floor_to(t, kPanel) * size + t % kPanel;
    for (int64_t x = 0; x < size / 4; ++x, to += 4 * kPanel) {
      Four a = tokens[0][x], b = tokens[1][x], c = tokens[2][x], d = tokens[3][x];
      Four ab = CHOSEN(a, b, 0, 4, 1, 5), cd = CHOSEN(c, d, 0, 4, 1, 5);
      Four above_ab = CHOSEN(a, b, 2, 6, 3, 7), above_cd = CHOSEN(c, d, 2, 6, 3, 7);
      *reinterpret_cast<Four*>(to) = CHOSEN(ab, cd, 0, 1, 4, 5);
      *reinterpret_cast<Four*>(to + kPanel) = CHOSEN(ab, cd, 2, 3, 6, 7);
      *reinterpret_cast<Four*>(to + 2 * kPanel) = CHOSEN(above_ab, above_cd, 0, 1, 4, 5);
      *reinterpret_cast<Four*>(to + 3 * kPanel) = CHOSEN(above_ab, above_cd, 2, 3, 6, 7);
    }
  }
}
inline const float* panel_of(Lines<float>& panels, int64_t column, int64_t size) {
  return panels.data() + floor_to(column, kPanel) * size + column % kPanel;
}

}  // namespace
