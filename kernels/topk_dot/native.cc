// Fused scores and top-k on a CPU, as XLA custom calls. The contract is that of ../topk_dot/reference.py.
//
// Scores never reach memory: a tile of queries x items lives in registers, is compared with each query's threshold, and only what
// passes is kept, in a buffer that is cut back to k whenever it is full. A score is one chain of fused multiply-adds over the width,
// whatever the tile, so equal item vectors have equal scores, and the two calls below agree bit for bit.

#include <algorithm>
#include <atomic>
#include <cmath>
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

constexpr float kInfinity = std::numeric_limits<float>::infinity();

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

// Bit j is set where a[j] > b[j].
inline uint32_t above(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ));
#else
  uint32_t bits = 0;
  for (int j = 0; j < kLanes; ++j) bits |= uint32_t(a[j] > b[j]) << j;
  return bits;
#endif
}

// An integer that orders as the score does.
inline int32_t key_of(float score) {
  int32_t bits;
  score += 0.0f;  // -0 becomes 0, which it equals
  std::memcpy(&bits, &score, 4);
  return bits ^ (bits >> 31 & 0x7fffffff);
}

inline float score_of(int32_t key) {
  key ^= key >> 31 & 0x7fffffff;
  float score;
  std::memcpy(&score, &key, 4);
  return score;
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

struct Problem {
  Problem(ffi::Buffer<ffi::F32> queries, ffi::Buffer<ffi::F32> items, ffi::Buffer<ffi::PRED> allowed, ffi::Buffer<ffi::S32> excluded,
          int64_t k)
      : items(items.typed_data()), queries(queries.typed_data()), allowed(allowed.element_count() ? allowed.typed_data() : nullptr),
        excluded(excluded.typed_data()), num_rows(items.dimensions()[0]), width(items.dimensions()[1]),
        num_queries(queries.dimensions()[0]), num_excluded(excluded.dimensions()[1]), k(k) {}

  const float* items;
  const float* queries;
  const bool* allowed;  // null where all items are but row 0
  const int32_t* excluded;
  int64_t num_rows, width, num_queries, num_excluded, k;

  bool exists(int64_t item) const { return allowed ? allowed[item] : item > 0; }

  bool is_allowed(int64_t query, int32_t item) const {
    const int32_t* first = excluded + query * num_excluded;
    return exists(item) && (num_excluded == 0 || std::find(first, first + num_excluded, item) == first + num_excluded);
  }

  int64_t num_dropped(int64_t query) const {
    const int32_t* first = excluded + query * num_excluded;
    return num_excluded - std::count(first, first + num_excluded, 0);
  }
};

// How threads share a call out: pieces of the queries if there are enough for all, else also pieces of the items. Twice as many pieces as
// threads where possible, so that a thread which the machine holds up does not hold up the call.
struct Shares {
  Shares(const ffi::ThreadPool& pool, int64_t num_queries, int64_t num_items, int64_t tile, int64_t lanes, int64_t least_items)
      : num_queries(num_queries), num_items(num_items) {
    int64_t threads = std::max<int64_t>(1, pool.num_threads());
    queries_each = std::max((num_queries + 2 * threads - 1) / (2 * threads), std::min(tile, num_queries));
    queries_each = (queries_each + lanes - 1) / lanes * lanes;
    query_pieces = (num_queries + queries_each - 1) / queries_each;
    item_pieces = std::max<int64_t>(1, std::min(threads / query_pieces, num_items / least_items));
    items_each = (num_items + item_pieces - 1) / item_pieces;
  }

  int64_t count() const { return query_pieces * item_pieces; }
  int64_t first_piece(int64_t query) const { return query / queries_each * item_pieces; }
  int64_t first_query(int64_t piece) const { return piece / item_pieces * queries_each; }
  int64_t last_query(int64_t piece) const { return std::min(first_query(piece) + queries_each, num_queries); }
  int64_t begin(int64_t piece) const { return piece % item_pieces * items_each; }
  int64_t end(int64_t piece) const { return std::min(begin(piece) + items_each, num_items); }

  int64_t num_queries, num_items, query_pieces, item_pieces, queries_each, items_each;
};

// A share of the items, evenly spaced pieces of them, from which a query's threshold is guessed: of a sample of s among n items about
// m = k s / n belong to the best k, give or take sqrt(m), so its item of rank m + 3 sqrt(m) + 3 almost surely does not. Who keeps only
// what exceeds that score keeps few items, and finds less than k once in some thousand queries; then he searches again without.
constexpr int64_t kSampleShare = 16, kMostSample = 8192, kLeastSample = 64;

// A bound that `rank` of the values exceed, and few more do; -inf where so many do not.
float bound_above(const float* values, int64_t count, int64_t rank) {
  float low = kInfinity, high = -kInfinity;
  for (int64_t i = 0; i < count; ++i) {
    high = values[i] > high ? values[i] : high;
    low = values[i] < low && values[i] > -kInfinity ? values[i] : low;
  }
  auto exceed = [&](float bound) {
    int64_t found = 0, i = 0;
    for (; i + kLanes <= count; i += kLanes) found += __builtin_popcount(above(load(values + i), bound - Vector{}));
    for (; i < count; ++i) found += values[i] > bound;
    return found;
  };
  int64_t above_low = exceed(low);
  for (int step = 0; step < 16 && above_low > rank + rank / 16; ++step) {
    float middle = 0.5f * low + 0.5f * high;
    int64_t above_middle = exceed(middle);
    if (above_middle >= rank)
      low = middle, above_low = above_middle;
    else
      high = middle;
  }
  return above_low >= rank ? low : -kInfinity;
}

float guess_threshold(const Problem& p, int64_t query, const float* sample, int64_t size, int64_t whole) {
  double expected = double(p.k + p.num_dropped(query)) * size / whole;
  return bound_above(sample, size, int64_t(std::ceil(expected + 3 * std::sqrt(expected) + 3)));
}

// The best k items seen so far of one query, and some more, by rising index.
class Best {
 public:
  explicit Best(int64_t k) : k_(k), capacity_(4 * k + 64), keys_(new int32_t[capacity_]), items_(new int32_t[capacity_]) {}

  bool full() const { return count_ == capacity_; }
  bool lacks() const { return count_ < k_; }
  void clear() { count_ = 0; }

  void add(int32_t key, int32_t item) {
    keys_[count_] = key;
    items_[count_++] = item;
  }

  void add_all(const Best& other) {
    for (int64_t i = 0; i < other.count_; ++i) {
      if (full()) cut(k_);
      add(other.keys_[i], other.items_[i]);
    }
  }

  // Keeps k to `most` items, among equals the lower index; returns the score that an item of higher index must exceed from now on.
  float cut(int64_t most) {
    if (count_ < k_) return -kInfinity;
    int32_t least = keys_[0], greatest = keys_[0];
    for (int64_t i = 1; i < count_; ++i) least = std::min(least, keys_[i]), greatest = std::max(greatest, keys_[i]);
    int64_t low = least, high = greatest;  // of the k-th largest key
    int64_t at_least = count_;  // keys of at least `low`
    while (low < high && at_least > most) {
      int64_t middle = (low + high + 1) >> 1, above = count(int32_t(middle));
      if (above >= k_)
        low = middle, at_least = above;
      else
        high = middle - 1;
    }
    int32_t bound = int32_t(low);
    int64_t equals = at_least > most ? k_ - (count_ - count_at_most(bound)) : count_;
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; ++i) {
      int32_t key = keys_[i], item = items_[i];
      keys_[kept] = key;
      items_[kept] = item;
      bool tie = key == bound;
      kept += key > bound || (tie && equals > 0);
      equals -= tie;
    }
    count_ = kept;
    return score_of(bound);
  }

  void write(int32_t* items, float* scores) {
    cut(k_);
    std::vector<int32_t> place(count_);
    if (count_ <= 1024) {
      // Counting who comes before is quadratic, and still several times as fast as sorting so few: it runs in vectors.
      for (int64_t j = 0; j < count_; ++j) {
        int32_t key = keys_[j];
        for (int64_t i = 0; i < j; ++i) place[i] += key > keys_[i];
        for (int64_t i = j + 1; i < count_; ++i) place[i] += key >= keys_[i];
      }
    } else {
      std::vector<int32_t> order(count_);
      for (int64_t i = 0; i < count_; ++i) order[i] = i;
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return keys_[a] > keys_[b]; });
      for (int64_t i = 0; i < count_; ++i) place[order[i]] = i;
    }
    for (int64_t i = 0; i < count_; ++i) {
      items[place[i]] = items_[i];
      scores[place[i]] = score_of(keys_[i]);
    }
    std::fill(items + count_, items + k_, 0);
    std::fill(scores + count_, scores + k_, -kInfinity);
  }

 private:
  int64_t count(int32_t bound) const {
    const int32_t* keys = keys_.get();
    int32_t found = 0;
    for (int64_t i = 0; i < count_; ++i) found += keys[i] >= bound;
    return found;
  }

  int64_t count_at_most(int32_t bound) const {
    const int32_t* keys = keys_.get();
    int32_t found = 0;
    for (int64_t i = 0; i < count_; ++i) found += keys[i] <= bound;
    return found;
  }

  int64_t k_, capacity_, count_ = 0;
  std::unique_ptr<int32_t[]> keys_, items_;
};

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

// Items in blocks of 16: codes [block, width, 16], and for each item its scale s, |e - s c| and |e|, rounded up.
constexpr int kBlock = 16;
typedef int8_t Codes __attribute__((vector_size(kBlock), aligned(1), may_alias));
typedef int32_t Whole __attribute__((vector_size(4 * kBlock)));
typedef float Scores __attribute__((vector_size(4 * kBlock), aligned(4), may_alias));

// Codes as the instructions want them, in steps of one or more channels: `pack` makes a step of 16 items, `advance` adds the products
// with a query's codes for the step, whose sum starts at `start_of`. Sums are whole numbers below 2^24, hence exact in float32 as well.
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
constexpr int kChannels = 4;  // of 16 items side by side, in bytes
typedef int8_t QueryCode;
typedef __m512i Packed;
typedef __m512i Sums;

inline Packed pack(const int8_t* codes) {
  alignas(64) static constexpr auto kOrder = [] {
    struct { int8_t at[64]; } order{};
    for (int i = 0; i < 64; ++i) order.at[i] = i % kChannels * kBlock + i / kChannels;
    return order;
  }();
  __m512i items = _mm512_permutexvar_epi8(_mm512_load_si512(&kOrder), _mm512_loadu_si512(codes));
  // The instruction wants one side unsigned: codes + 128, which adds 128 times the query's codes.
  return _mm512_xor_si512(items, _mm512_set1_epi8(-128));
}
inline Sums start_of(int32_t sum_of_codes) { return _mm512_set1_epi32(-128 * sum_of_codes); }
inline Sums advance(Sums sums, Packed items, const QueryCode* query) {
  int32_t step;
  std::memcpy(&step, query, sizeof(step));
  return _mm512_dpbusd_epi32(sums, items, _mm512_set1_epi32(step));
}
inline Sums both(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline Scores scores_of(Sums sums) { return (Scores)_mm512_cvtepi32_ps(sums); }
#else
constexpr int kChannels = 1;
typedef float QueryCode;
typedef Scores Packed;
typedef Scores Sums;

inline Packed pack(const int8_t* codes) {
#if defined(__AVX512F__)  // GCC takes __builtin_convertvector of bytes apart, number by number
  return (Packed)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
#elif defined(__AVX2__)
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  __m256 halves[2] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                      _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
  Packed packed;
  std::memcpy(&packed, halves, sizeof(packed));
  return packed;
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Codes*>(codes), Whole), Scores);
#endif
}
inline Sums start_of(int32_t) { return Sums{}; }
inline Sums advance(Sums sums, Packed items, const QueryCode* query) { return sums + items * *query; }
inline Sums both(Sums a, Sums b) { return a + b; }
inline Scores scores_of(Sums sums) { return sums; }
#endif
#if defined(__AVX512F__)
constexpr int kTileQueries = 8, kTileBlocks = 3;
#else
constexpr int kTileQueries = 4, kTileBlocks = 1;
#endif
constexpr int64_t kStep = kChannels * kBlock;  // bytes
constexpr int64_t kPackedBytes = 1 << 15;  // of items, which stay in the first-level cache while the queries pass over them

inline uint32_t above(const Scores& scores, float bound) {
  uint32_t bits = 0;
  for (int part = 0; part < kBlock / kLanes; ++part)
    bits |= above(load(reinterpret_cast<const float*>(&scores) + part * kLanes), bound - Vector{}) << part * kLanes;
  return bits;
}

struct Quantised {
  const int8_t* codes;
  const float *scales, *residuals, *norms;
  int64_t num_blocks;
};

// A query as codes: q = scale * codes + rest.
struct QueryCodes {
  QueryCodes(const float* query, int64_t width) : codes((width + kChannels - 1) / kChannels * kChannels) {
    double whole = 0, coded = 0, rest = 0;
    float largest = 0;
    for (int64_t x = 0; x < width; ++x) largest = std::max(largest, std::abs(query[x]));
    scale = largest / 127;
    for (int64_t x = 0; x < width; ++x) {
      float code = scale > 0 ? std::nearbyint(query[x] / scale) : 0.0f;
      codes[x] = QueryCode(code), sum_of_codes += int32_t(code);
      double value = double(scale) * code;
      whole += double(query[x]) * query[x], coded += value * value, rest += (query[x] - value) * (query[x] - value);
    }
    // |q . e - s_q s_i (c_q . c_i)| <= |s_q c_q| |e - s_i c_i| + |q - s_q c_q| |e|, by Cauchy-Schwarz. The last term of `per_norm` is the
    // rounding of the float32 score itself, and of the bound.
    per_residual = float(std::sqrt(coded) * 1.00001);
    per_norm = float(std::sqrt(rest) * 1.00001 + std::sqrt(whole) * (width + 16) * 0x1p-23);
  }
  std::vector<QueryCode> codes;
  int32_t sum_of_codes = 0;
  float scale, per_residual, per_norm;
};

struct Candidate {
  float lower, upper;  // of its float32 score
  int32_t item;
};

// What one piece found for one query.
struct Candidates {
  std::vector<Candidate> found;
  float guessed = -kInfinity, below = -kInfinity;  // an upper bound must exceed `below`
  size_t most = 0;

  // Drops what k others are certain to beat.
  void prune(int64_t k) {
    std::vector<float> lower(found.size());
    for (size_t i = 0; i < found.size(); ++i) lower[i] = found[i].lower;
    float reach = bound_above(lower.data(), lower.size(), k);
    found.erase(std::remove_if(found.begin(), found.end(), [=](const Candidate& each) { return each.upper <= reach; }), found.end());
    below = std::max(below, reach);
  }
};

// One step of a score, rounded as in `score_tile`; a plain loop may be compiled to products that are rounded before they are added.
inline float chained(float a, float b, float sum) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, sum);
#else
  return sum + a * b;
#endif
}

// The float32 scores of candidates, several at a time: one chain alone would wait for each of its sums.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-tree-slp-vectorize")))  // which would spend more on building vectors than on sums
#endif
void score_candidates(const Problem& p, int64_t query, Candidates& given, Best& best) {
  constexpr int64_t kTogether = 8;
  given.prune(p.k);
  const std::vector<Candidate>& candidates = given.found;
  const float* wanted = p.queries + query * p.width;
  for (size_t first = 0; first < candidates.size(); first += kTogether) {
    int64_t count = std::min<int64_t>(kTogether, candidates.size() - first);
    const float* rows[kTogether];
    float scores[kTogether] = {};
    for (int64_t j = 0; j < kTogether; ++j) rows[j] = p.items + candidates[first + std::min(j, count - 1)].item * p.width;
    for (size_t next = first + kTogether; next < std::min(first + 2 * kTogether, candidates.size()); ++next)
      for (int64_t x = 0; x < p.width; x += sizeof(Line) / sizeof(float)) __builtin_prefetch(p.items + candidates[next].item * p.width + x);
    for (int64_t x = 0; x < p.width; ++x)
      for (int64_t j = 0; j < kTogether; ++j) scores[j] = chained(rows[j][x], wanted[x], scores[j]);
    for (int64_t j = 0; j < count; ++j) {
      if (best.full()) best.cut(p.k);
      best.add(key_of(scores[j]), candidates[first + j].item);
    }
  }
}

// The codes of items against those of some queries of one piece.
class CodeScan {
 public:
  CodeScan(const Problem& p, const Quantised& table, int64_t first_query, int64_t last_query, int64_t begin, int64_t end,
           Candidates* found)
      : p_(p), table_(table), first_query_(first_query), begin_(begin), end_(end), found_(found), steps_((p.width + kChannels - 1) / kChannels),
        chunk_(std::max<int64_t>(1, kPackedBytes / sizeof(Packed) / steps_ / kTileBlocks) * kTileBlocks), packed_(chunk_ * steps_) {
    for (int64_t q = first_query; q < last_query; ++q) {
      queries_.emplace_back(p.queries + q * p.width, p.width);
      found[q - first_query].found.reserve(most_);
    }
    if (p.width % kChannels) {
      last_block_ = table.num_blocks - 1;
      last_codes_.resize(steps_ * kStep);
      std::memcpy(last_codes_.data(), table.codes + last_block_ * p.width * kBlock, p.width * kBlock);
    }
  }

  void run(bool with_guess) {
    if (with_guess) guess();
    auto use = [this](int64_t block, int64_t blocks, int64_t query, const Sums* sums) {
      const QueryCodes& asked = queries_[query];
      uint64_t passed = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        Scores error = of(table_.residuals, block + b) * asked.per_residual + of(table_.norms, block + b) * asked.per_norm;
        Scores upper = scores_of(sums[b]) * (of(table_.scales, block + b) * asked.scale) + error;
        passed |= uint64_t(above(upper, found_[query].below)) << b * kBlock;
      }
      if (passed) keep(block, query, passed, sums);
    };
    for (int64_t first = begin_; first < end_; first += chunk_) over(first, std::min(first + chunk_, end_), use);
  }

 private:
  // From the scores of codes themselves: it need not be sure, see `guess_threshold`.
  void guess() {
    int64_t blocks = end_ - begin_;
    int64_t tiles = std::min(blocks / kTileBlocks / kSampleShare, kMostSample / kBlock / kTileBlocks);
    int64_t size = tiles * kTileBlocks * kBlock;
    if (size < kLeastSample) return;
    std::vector<float> sample(queries_.size() * size);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      int64_t first = begin_ + blocks / tiles * tile, place = tile * kTileBlocks * kBlock;
      over(first, first + kTileBlocks, [&](int64_t block, int64_t blocks, int64_t query, const Sums* sums) {
        for (int64_t b = 0; b < blocks; ++b) {
          Scores scores = scores_of(sums[b]) * (of(table_.scales, block + b) * queries_[query].scale);
          std::memcpy(&sample[query * size + place + b * kBlock], &scores, sizeof(scores));
        }
      });
      for (int64_t i = 0; i < kTileBlocks * kBlock; ++i) {
        int64_t item = first * kBlock + i;
        if (item < p_.num_rows && p_.exists(item)) continue;
        for (size_t q = 0; q < queries_.size(); ++q) sample[q * size + place + i] = -kInfinity;
      }
    }
    for (size_t q = 0; q < queries_.size(); ++q)
      found_[q].guessed = found_[q].below = guess_threshold(p_, first_query_ + q, &sample[q * size], size, blocks * kBlock);
  }

  // Calls use(first block, number of blocks, query, sums of products of codes) for all blocks from `first` to `last` and every query.
  template <typename Use>
  void over(int64_t first, int64_t last, Use use) {
    int64_t count = queries_.size();
    for (int64_t block = first; block < last; ++block) {
      if (count == 1) {
        Sums sums = alone(block);
        use(block, 1, 0, &sums);
        continue;
      }
      for (int64_t step = 0; step < steps_; ++step) packed_.data()[(block - first) * steps_ + step] = pack(codes_of(block) + step * kStep);
    }
    for (int64_t block = first; count > 1 && block < last; block += kTileBlocks) {
      int64_t blocks = std::min<int64_t>(kTileBlocks, last - block), query = 0;
      const Packed* packed = packed_.data() + (block - first) * steps_;
      for (; query + kTileQueries <= count; query += kTileQueries) tile<kTileQueries>(packed, block, blocks, query, use);
      for (; query < count; ++query) tile<1>(packed, block, blocks, query, use);
    }
  }

  // Where a block has channels over after whole steps, the next codes are read, too; the query's are 0 there.
  const int8_t* codes_of(int64_t block) const {
    return block == last_block_ ? last_codes_.data() : table_.codes + block * p_.width * kBlock;
  }

  // The sums of a single query. It waits for memory, and so reads one block after the other, and nothing twice.
  Sums alone(int64_t block) const {
    const int8_t* codes = codes_of(block);
    const QueryCode* asked = queries_[0].codes.data();
    Sums sums[4] = {start_of(queries_[0].sum_of_codes), start_of(0), start_of(0), start_of(0)};
    int64_t step = 0;
    for (; step + 4 <= steps_; step += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) __builtin_prefetch(codes + (step + j) * kStep + 4096), sums[j] = advance(sums[j], pack(codes + (step + j) * kStep), asked + (step + j) * kChannels);
    for (; step < steps_; ++step) sums[0] = advance(sums[0], pack(codes + step * kStep), asked + step * kChannels);
    return both(both(sums[0], sums[1]), both(sums[2], sums[3]));
  }

  template <int kQueries, typename Use>
  void tile(const Packed* packed, int64_t block, int64_t blocks, int64_t query, Use use) {
    const QueryCodes* queries = queries_.data() + query;
    const Packed* items[kTileBlocks];
    for (int b = 0; b < kTileBlocks; ++b) items[b] = packed + std::min<int64_t>(b, blocks - 1) * steps_;
    const QueryCode* codes[kQueries];
    Sums sums[kQueries][kTileBlocks];
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      codes[q] = queries[q].codes.data();
#pragma GCC unroll 4
      for (int b = 0; b < kTileBlocks; ++b) sums[q][b] = start_of(queries[q].sum_of_codes);
    }
    for (int64_t step = 0; step < steps_; ++step)
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 4
        for (int b = 0; b < kTileBlocks; ++b) sums[q][b] = advance(sums[q][b], items[b][step], codes[q] + step * kChannels);
    Sums done[kQueries][kTileBlocks];  // apart from the sums, which must stay in registers
    std::memcpy(done, sums, sizeof(sums));
    for (int q = 0; q < kQueries; ++q) use(block, blocks, query + q, done[q]);
  }

  __attribute__((noinline)) void keep(int64_t block, int64_t query, uint64_t passed, const Sums* sums) {
    const QueryCodes& asked = queries_[query];
    Candidates& mine = found_[query];
    for (; passed; passed &= passed - 1) {
      int place = __builtin_ctzll(passed);
      int64_t item = block * kBlock + place;
      if (item >= p_.num_rows || !p_.is_allowed(first_query_ + query, item)) continue;
      float score = scores_of(sums[place / kBlock])[place % kBlock] * (table_.scales[item] * asked.scale);
      float error = table_.residuals[item] * asked.per_residual + table_.norms[item] * asked.per_norm;
      mine.found.push_back({score - error, score + error, int32_t(item)});
    }
    if (mine.found.size() < std::max<size_t>(mine.most, most_)) return;
    mine.prune(p_.k);
    mine.most = 2 * mine.found.size();
  }

  Scores of(const float* values, int64_t block) const { return *reinterpret_cast<const Scores*>(values + block * kBlock); }

  const Problem& p_;
  const Quantised& table_;
  int64_t first_query_, begin_, end_;  // of blocks
  Candidates* found_;
  int64_t steps_, chunk_, most_ = 4 * p_.k + 256;
  Lines<Packed> packed_;
  std::vector<QueryCodes> queries_;
  int64_t last_block_ = -1;  // whose codes are copied where what follows them would be read
  std::vector<int8_t> last_codes_;
};

ffi::Error topk_dot_int8(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> queries, ffi::Buffer<ffi::F32> items, ffi::Buffer<ffi::S8> codes,
                         ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::F32> residuals, ffi::Buffer<ffi::F32> norms,
                         ffi::Buffer<ffi::PRED> allowed, ffi::Buffer<ffi::S32> excluded, ffi::ResultBuffer<ffi::S32> found,
                         ffi::ResultBuffer<ffi::F32> scores) {
  Problem p(queries, items, allowed, excluded, found->dimensions()[1]);
  if (p.num_queries == 0) return ffi::Error::Success();
  int64_t blocks = codes.dimensions()[0];
  Quantised table{codes.typed_data(), scales.typed_data(), residuals.typed_data(), norms.typed_data(), blocks};
  Shares shares(pool, p.num_queries, blocks, 3 * kTileQueries, kTileQueries, 64);
  std::vector<std::vector<Candidates>> candidates(shares.count());
  auto write = [&](int64_t first_piece, int64_t query) {
    int64_t place = query - shares.first_query(first_piece);
    Candidates& all = candidates[first_piece][place];
    for (int64_t part = 1; part < shares.item_pieces; ++part) {
      const Candidates& other = candidates[first_piece + part][place];
      all.found.insert(all.found.end(), other.found.begin(), other.found.end());
      all.guessed = std::max(all.guessed, other.guessed);
    }
    Best best(p.k);
    score_candidates(p, query, all, best);
    if (best.cut(p.k) < all.guessed) {
      Candidates without_guess;
      CodeScan(p, table, query, query + 1, 0, blocks, &without_guess).run(false);
      best.clear();
      score_candidates(p, query, without_guess, best);
    }
    best.write(found->typed_data() + query * p.k, scores->typed_data() + query * p.k);
  };
  run_pieces(pool, shares.count(), [&](int64_t piece) {
    int64_t first_query = shares.first_query(piece), last_query = shares.last_query(piece);
    candidates[piece].resize(last_query - first_query);
    CodeScan(p, table, first_query, last_query, shares.begin(piece), shares.end(piece), candidates[piece].data()).run(true);
    for (int64_t q = first_query; shares.item_pieces == 1 && q < last_query; ++q) write(piece, q);
  });
  if (shares.item_pieces > 1) run_pieces(pool, p.num_queries, [&](int64_t q) { write(shares.first_piece(q), q); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(TopkDotInt8, topk_dot_int8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(TopkDot, topk_dot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
