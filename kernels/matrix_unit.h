// Products of float32 matrices on Intel's matrix unit (AMX), which multiplies numbers of 16 bits some twenty times as fast as vectors do
// numbers of 32.
//
// Each number is split into two bfloat16, x = high + low, which keep 17 of its 24 bits, and three products are added in float32: high
// high + high low + low high. This is what jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3 does.

#pragma once

#include "native.h"

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define CDA4REC_MATRIX_UNIT 1

#include <sys/syscall.h>
#include <unistd.h>

namespace {

// A tile of the left side is 16 rows x 32 of depth, of the right side 32 of depth x 16 columns, of the sums 16 x 16.
constexpr int64_t kUnit = 16, kUnitDepth = 32;
constexpr int64_t kRowBytes = 64, kTileNumbers = 256;  // of 32 bits, each two bfloat16

// The operating system lends the unit to a process that asks.
inline bool has_matrix_unit() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// Everything that was written is in memory: headers of compilers do not tell what instructions of the unit read (GCC's name 8 of the
// configuration's 64 bytes, and nothing of a tile).
inline void finish_writes(const void* read) { asm volatile("" : : "r"(read) : "memory"); }

// Sets the unit up for this thread, and gives it back.
class MatrixUnit {
 public:
  MatrixUnit() {
    struct { uint8_t palette = 1, start_row = 0, reserved[14] = {}; uint16_t row_bytes[16] = {}; uint8_t rows[16] = {}; } shape;
    for (int tile = 0; tile < 8; ++tile) shape.row_bytes[tile] = kRowBytes, shape.rows[tile] = kUnit;
    finish_writes(&shape);
    _tile_loadconfig(&shape);
  }
  ~MatrixUnit() { _tile_release(); }
};

inline int64_t units(int64_t count) { return (count + kUnit - 1) / kUnit; }
inline int64_t depth_steps(int64_t depth) { return (depth + kUnitDepth - 1) / kUnitDepth; }

// The numbers of 32 bits that one side takes: for each of its tiles all steps of depth, each high and low.
inline int64_t side_size(int64_t count, int64_t depth) { return units(count) * depth_steps(depth) * 2 * kTileNumbers; }

// Two vectors as one of pairs (a[i], b[i]) of the high parts, and one of the low parts. The unit adds up over pairs, so a tile holds the
// depths i and i + 16 side by side, on the left and on the right.
struct Pairs {
  __m512i high, low;
};

inline Pairs split(Vector a, Vector b) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000));
  auto rounded = [&](Vector x) { return _mm512_and_si512(_mm512_add_epi32((__m512i)x, half), upper); };
  auto pairs = [](__m512i first, __m512i second) { return _mm512_or_si512(_mm512_srli_epi32(first, 16), second); };
  __m512i high_a = rounded(a), high_b = rounded(b);
  return {pairs(high_a, high_b), pairs(rounded(a - (Vector)high_a), rounded(b - (Vector)high_b))};
}

inline void put_pairs(Pairs pairs, int64_t row, uint32_t* tiles) {
  _mm512_storeu_si512(tiles + row * kUnit, pairs.high);
  _mm512_storeu_si512(tiles + kTileNumbers + row * kUnit, pairs.low);
}

// A left side of `rows` x depth (in whole vectors); vector(row, x) has what begins at depth x.
template <typename Get>
void pack_left(int64_t rows, int64_t depth, Get vector, uint32_t* tiles) {
  for (int64_t first = 0; first < rows; first += kUnit)
    for (int64_t x = 0; x < depth; x += kUnitDepth, tiles += 2 * kTileNumbers)
      for (int64_t r = 0; r < kUnit; ++r) {
        bool real = first + r < rows;
        put_pairs(split(real ? vector(first + r, x) : Vector{}, real && x + kUnit < depth ? vector(first + r, x + kUnit) : Vector{}), r,
                  tiles);
      }
}

// A right side of depth x `columns` (in whole vectors); vector(x, column) has what begins at that column.
template <typename Get>
void pack_right(int64_t depth, int64_t columns, Get vector, uint32_t* tiles) {
  for (int64_t column = 0; column < columns; column += kUnit)
    for (int64_t first = 0; first < depth; first += kUnitDepth, tiles += 2 * kTileNumbers)
      for (int64_t x = first; x < first + kUnit; ++x)
        put_pairs(split(x < depth ? vector(x, column) : Vector{}, x + kUnit < depth ? vector(x + kUnit, column) : Vector{}), x - first,
                  tiles);
}

inline void transpose_tile(uint32_t* tile) {
  __m512i row[16], half[16];
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(tile + i * kUnit);
  for (int i = 0; i < 16; i += 4) {
    __m512i low01 = _mm512_unpacklo_epi32(row[i], row[i + 1]), high01 = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    __m512i low23 = _mm512_unpacklo_epi32(row[i + 2], row[i + 3]), high23 = _mm512_unpackhi_epi32(row[i + 2], row[i + 3]);
    half[i] = _mm512_unpacklo_epi64(low01, low23), half[i + 1] = _mm512_unpackhi_epi64(low01, low23);
    half[i + 2] = _mm512_unpacklo_epi64(high01, high23), half[i + 3] = _mm512_unpackhi_epi64(high01, high23);
  }
  for (int i = 0; i < 4; ++i) {
    __m512i even_a = _mm512_shuffle_i32x4(half[i], half[i + 4], 0x88), odd_a = _mm512_shuffle_i32x4(half[i], half[i + 4], 0xdd);
    __m512i even_b = _mm512_shuffle_i32x4(half[i + 8], half[i + 12], 0x88), odd_b = _mm512_shuffle_i32x4(half[i + 8], half[i + 12], 0xdd);
    _mm512_storeu_si512(tile + i * kUnit, _mm512_shuffle_i32x4(even_a, even_b, 0x88));
    _mm512_storeu_si512(tile + (i + 4) * kUnit, _mm512_shuffle_i32x4(odd_a, odd_b, 0x88));
    _mm512_storeu_si512(tile + (i + 8) * kUnit, _mm512_shuffle_i32x4(even_a, even_b, 0xdd));
    _mm512_storeu_si512(tile + (i + 12) * kUnit, _mm512_shuffle_i32x4(odd_a, odd_b, 0xdd));
  }
}

// A left side into a right side of its transpose, and back.
inline void transpose_side(uint32_t* tiles, int64_t size) {
  for (int64_t tile = 0; tile < size; tile += kTileNumbers) transpose_tile(tiles + tile);
}

// As `pack_left` of the transpose: a left side of `columns` x depth; vector(x, column) has the columns that begin there, at depth x.
template <typename Get>
void pack_transposed(int64_t depth, int64_t columns, Get vector, uint32_t* tiles) {
  pack_right(depth, columns, vector, tiles);
  transpose_side(tiles, side_size(columns, depth));
}

// Sums 0 to 3 += left sides 4 and 5, each times right sides 6 and 7.
inline void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// out[r][c] (+)= sum_x left[r, x] right[x, c], in whole tiles.
inline void multiply_sides(const uint32_t* left, const uint32_t* right, int64_t rows, int64_t columns, int64_t depth, float* out,
                           int64_t stride, bool add) {
  const int64_t each = depth_steps(depth) * 2 * kTileNumbers, bytes = stride * sizeof(float);
  finish_writes(out);
  for (int64_t row = 0; row < units(rows); row += 2) {
    for (int64_t column = 0; column < units(columns); column += 2) {
      const bool lower = row + 1 < units(rows), wider = column + 1 < units(columns);
      const uint32_t *top = left + row * each, *bottom = lower ? top + each : top, *first = right + column * each;
      const uint32_t* second = wider ? first + each : first;
      float *to = out + row * kUnit * stride + column * kUnit, *below = to + kUnit * stride;
      if (add) {
        _tile_loadd(0, to, bytes);
        if (wider) _tile_loadd(1, to + kUnit, bytes);
        if (lower) _tile_loadd(2, below, bytes);
        if (lower && wider) _tile_loadd(3, below + kUnit, bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t high = 0; high < each; high += 2 * kTileNumbers) {
        const int64_t low = high + kTileNumbers;
        _tile_loadd(4, top + high, kRowBytes);
        _tile_loadd(5, bottom + high, kRowBytes);
        _tile_loadd(6, first + low, kRowBytes);
        _tile_loadd(7, second + low, kRowBytes);
        add_products();
        _tile_loadd(6, first + high, kRowBytes);
        _tile_loadd(7, second + high, kRowBytes);
        add_products();
        _tile_loadd(4, top + low, kRowBytes);
        _tile_loadd(5, bottom + low, kRowBytes);
        add_products();
      }
      _tile_stored(0, to, bytes);
      if (wider) _tile_stored(1, to + kUnit, bytes);
      if (lower) _tile_stored(2, below, bytes);
      if (lower && wider) _tile_stored(3, below + kUnit, bytes);
    }
  }
}

}  // namespace
#else
#define CDA4REC_MATRIX_UNIT 0
#endif
