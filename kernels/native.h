// What the C++ custom calls share: vectors, and threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// A tile of sums, kTileRows x kTileColumns vectors, fills the registers and leaves some for operands.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileColumns = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileColumns = 2;
#else
constexpr int kLanes = 4, kTileColumns = 2;
#endif
constexpr int kTileRows = 6;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
inline Vector largest(Vector a, Vector b) { return a > b ? a : b; }
// NaN stays NaN.
inline Vector cut(Vector x, float low, float high) {
  x = x < Vector{} + low ? Vector{} + low : x;
  return x > Vector{} + high ? Vector{} + high : x;
}

// e^x to 2 units in the last place, x cut to [-87, 88]: 2^n e^r with |r| <= ln(2) / 2, e^r by its series to r^7.
inline Vector exponential(Vector x) {
  constexpr float kRound = 12582912.0f;  // adding it leaves the nearest whole number in the low bits
  x = cut(x, -87.0f, 88.0f);
  Vector shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120, y = y * r + 1.0f / 24, y = y * r + 1.0f / 6, y = y * r + 0.5f, y = y * r + 1.0f, y = y * r + 1.0f;
  Whole power = ((Whole)shifted << 23) + (127 << 23);
  return y * (Vector)power;
}

// out[r][c] = sum_x a[r, x] b[x, c]; rows of a from `rows` on repeat the last one.
template <int kColumns>
inline void multiply_tile(const float* a, int64_t row_stride, int64_t step, int64_t rows, int64_t depth, const float* b, int64_t b_stride,
                          Vector (*out)[kColumns]) {
  const float* at[kTileRows];
  for (int r = 0; r < kTileRows; ++r) at[r] = a + std::min<int64_t>(r, rows - 1) * row_stride;
  Vector sums[kTileRows][kColumns] = {};
  for (int64_t x = 0; x < depth; ++x) {
    Vector right[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) right[c] = load(b + x * b_stride + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sums[r][c] += at[r][x * step] * right[c];
  }
  // Apart from the sums, which must stay in registers.
  std::memcpy(out, sums, sizeof(sums));
}

// Runs work(0), ..., work(count - 1) on the pool and on the calling thread, which takes every piece that no other thread has begun:
// waiting for a piece that nobody runs would hang where all threads of the pool wait in calls like this one.
template <typename Work>
void run_pieces(ffi::ThreadPool& pool, int64_t count, Work work) {
  struct State {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
  };
  auto state = std::make_shared<State>();
  auto take = [state, count](auto& piece_work) {
    for (int64_t piece; (piece = state->next.fetch_add(1)) < count;) {
      piece_work(piece);
      std::lock_guard<std::mutex> lock(state->mutex);
      if (++state->done == count) state->all_done.notify_all();
    }
  };
  // A helper that starts late finds no piece left, and must not touch what `work` refers to: it only calls it for a piece.
  for (int64_t helper = 1; helper < std::min(count, pool.num_threads()); ++helper) pool.Schedule([take, work]() mutable { take(work); });
  take(work);
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == count; });
}

struct alignas(64) Line {
  char bytes[64];
};

// Values that begin with a cache line: a vector that crosses into the next one is read twice.
template <typename Value>
struct Lines {
  explicit Lines(int64_t count) : lines((count * sizeof(Value) + sizeof(Line) - 1) / sizeof(Line)) {}
  Value* data() { return reinterpret_cast<Value*>(lines.data()); }
  std::vector<Line> lines;
};

}  // namespace
