// Fused scores and top-k on a CPU, as an XLA custom call. The contract is that of ../topk_dot/reference.py.
//
// Scores never reach memory: a tile of queries x items lives in registers, is compared with each query's threshold, and only what
// passes is kept, in a buffer that is cut back to k whenever it is full. A score is one chain of fused multiply-adds over the width,
// whatever the tile, so equal item vectors have equal scores, and native_int8.cc, which computes the same chain, the same ones.

#include "search.h"

namespace {

// Keeps the scores of one item whose bit in `passed` is set. Apart from the loop over tiles, whose sums must stay in registers.
__attribute__((noinline)) void keep(const Problem& p, uint32_t passed, Vector sums, int64_t first_query, int32_t item, float* thresholds,
                                    Best* best) {
  float scores[kLanes];
  std::memcpy(scores, &sums, sizeof(sums));
  for (; passed; passed &= passed - 1) {
    int lane = __builtin_ctz(passed);
    if (!p.is_allowed(first_query + lane, item)) continue;
    best[lane].add(key_of(scores[lane]), item);
    if (best[lane].full()) thresholds[lane] = best[lane].cut(p.k + p.k / 4);
  }
}

// Scores of items [first, first + kRows) for kColumns * kLanes queries, packed as [width, kColumns * kLanes]. Rows from `end` on repeat
// the last one, and are not read.
template <int kRows, int kColumns>
inline void score_tile(const Problem& p, const float* packed, int64_t first, int64_t end, Vector (*scores)[kColumns]) {
  const float* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = p.items + std::min(first + r, end - 1) * p.width;
  Vector sums[kRows][kColumns] = {};
  for (int64_t x = 0; x < p.width; ++x) {
    Vector query[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) query[c] = load(packed + (x * kColumns + c) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sums[r][c] += rows[r][x] * query[c];
  }
  // Apart from the sums, which must stay in registers.
  std::memcpy(scores, sums, sizeof(sums));
}

template <int kRows, int kColumns>
void scan_tile(const Problem& p, const float* packed, int64_t first_query, int64_t begin, int64_t end, float* thresholds, Best* best) {
  Vector scores[kRows][kColumns];
  for (int64_t first = begin; first < end; first += kRows) {
    score_tile<kRows, kColumns>(p, packed, first, end, scores);
    for (int r = 0; r < kRows && first + r < end; ++r) {
      for (int c = 0; c < kColumns; ++c) {
        uint32_t passed = above(scores[r][c], load(thresholds + c * kLanes));
        if (passed) keep(p, passed, scores[r][c], first_query + c * kLanes, first + r, thresholds + c * kLanes, best + c * kLanes);
      }
    }
  }
}

template <int kRows, int kColumns>
void guess_thresholds(const Problem& p, const float* packed, int64_t first_query, int64_t num_queries, int64_t begin, int64_t end,
                      float* thresholds) {
  int64_t tiles = std::min((end - begin) / kRows / kSampleShare, kMostSample / kRows), size = tiles * kRows;
  if (size < kLeastSample) return;
  int64_t spacing = (end - begin) / tiles;
  std::vector<float> sample(num_queries * size);
  Vector scores[kRows][kColumns];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    int64_t first = begin + tile * spacing;
    score_tile<kRows, kColumns>(p, packed, first, end, scores);
    for (int r = 0; r < kRows; ++r) {
      const float* row = reinterpret_cast<const float*>(scores[r]);
      bool exists = p.exists(first + r);
      for (int64_t q = 0; q < num_queries; ++q) sample[q * size + tile * kRows + r] = exists ? row[q] : -kInfinity;
    }
  }
  for (int64_t q = 0; q < num_queries; ++q)
    thresholds[q] = guess_threshold(p, first_query + q, sample.data() + q * size, size, end - begin);
}

// One piece: items [begin, end) for queries [first_query, last_query).
template <int kRows, int kColumns>
void scan_piece(const Problem& p, int64_t first_query, int64_t last_query, int64_t begin, int64_t end, Best* best) {
  constexpr int64_t kQueries = kColumns * kLanes;
  int64_t num_queries = last_query - first_query, tiles = (num_queries + kQueries - 1) / kQueries;
  Lines<float> packed_lines(tiles * p.width * kQueries), threshold_lines(tiles * kQueries);
  float *packed = packed_lines.data(), *thresholds = threshold_lines.data();
  // Lanes without a query of their own: nothing exceeds their thresholds.
  std::fill_n(thresholds, tiles * kQueries, kInfinity);
  std::fill_n(thresholds, num_queries, -kInfinity);
  for (int64_t q = 0; q < num_queries; ++q)
    for (int64_t x = 0; x < p.width; ++x)
      packed[(q / kQueries * p.width + x) * kQueries + q % kQueries] = p.queries[(first_query + q) * p.width + x];
  // Item vectors of one block stay in the second-level cache while all tiles of queries pass over them.
  int64_t block = std::max<int64_t>(kRows, (1 << 16) / std::max<int64_t>(p.width, 1) / kRows * kRows);
  auto scan = [&](int64_t first_tile, int64_t last_tile) {
    for (int64_t start = begin; start < end; start += block)
      for (int64_t tile = first_tile; tile < last_tile; ++tile)
        scan_tile<kRows, kColumns>(p, packed + tile * p.width * kQueries, first_query + tile * kQueries, start,
                                   std::min(start + block, end), thresholds + tile * kQueries, best + tile * kQueries);
  };
  for (int64_t q = 0; q < num_queries; q += kQueries)
    guess_thresholds<kRows, kColumns>(p, packed + q * p.width, first_query + q, std::min(kQueries, num_queries - q), begin, end,
                                      thresholds + q);
  scan(0, tiles);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    bool again = false;
    for (int64_t q = tile * kQueries; q < std::min((tile + 1) * kQueries, num_queries); ++q) {
      bool guessed_too_high = best[q].lacks() && thresholds[q] > -kInfinity;
      thresholds[q] = guessed_too_high ? -kInfinity : kInfinity;
      if (guessed_too_high) best[q].clear();
      again |= guessed_too_high;
    }
    if (again) scan(tile, tile + 1);
  }
}

ffi::Error topk_dot(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> queries, ffi::Buffer<ffi::F32> items, ffi::Buffer<ffi::PRED> allowed,
                    ffi::Buffer<ffi::S32> excluded, ffi::ResultBuffer<ffi::S32> found, ffi::ResultBuffer<ffi::F32> scores) {
  Problem p(queries, items, allowed, excluded, found->dimensions()[1]);
  if (p.num_queries == 0) return ffi::Error::Success();
  constexpr int kColumns = kLanes == 8 ? 2 : 4;
  Shares shares(pool, p.num_queries, p.num_rows, kColumns * kLanes, kLanes, 1024);
  std::vector<std::vector<Best>> best(shares.count());
  auto write = [&](int64_t first_piece, int64_t query) {
    int64_t place = query - shares.first_query(first_piece);
    Best& whole = best[first_piece][place];
    for (int64_t part = 1; part < shares.item_pieces; ++part) whole.add_all(best[first_piece + part][place]);
    whole.write(found->typed_data() + query * p.k, scores->typed_data() + query * p.k);
  };
  run_pieces(pool, shares.count(), [&](int64_t piece) {
    int64_t first_query = shares.first_query(piece), last_query = shares.last_query(piece), count = last_query - first_query;
    int64_t begin = shares.begin(piece), end = shares.end(piece);
    best[piece].reserve(count);
    for (int64_t q = 0; q < count; ++q) best[piece].emplace_back(p.k);
    if (count <= kLanes)
      scan_piece<8, 1>(p, first_query, last_query, begin, end, best[piece].data());
    else if (count <= 2 * kLanes)
      scan_piece<6, 2>(p, first_query, last_query, begin, end, best[piece].data());
    else
      scan_piece<6, kColumns>(p, first_query, last_query, begin, end, best[piece].data());
    for (int64_t q = first_query; shares.item_pieces == 1 && q < last_query; ++q) write(piece, q);
  });
  if (shares.item_pieces > 1) run_pieces(pool, p.num_queries, [&](int64_t q) { write(shares.first_piece(q), q); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(TopkDot, topk_dot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
