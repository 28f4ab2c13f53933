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

struct Problem {
  const float* items;
  const float* queries;
  const bool* allowed;
  const int32_t* excluded;
  int64_t num_rows, width, num_queries, num_excluded, k;

  bool is_allowed(int64_t query, int32_t item) const {
    const int32_t* first = excluded + query * num_excluded;
    return allowed[item] && std::find(first, first + num_excluded, item) == first + num_excluded;
  }
};

// The best k items seen so far of one query, and some more, by rising index.
class Best {
 public:
  explicit Best(int64_t k) : k_(k), capacity_(2 * k + 64), keys_(capacity_), items_(capacity_) {}

  bool full() const { return count_ == capacity_; }

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
    auto [least, greatest] = std::minmax_element(keys_.begin(), keys_.begin() + count_);
    int64_t low = *least, high = *greatest;  // of the k-th largest key
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
    const int32_t* keys = keys_.data();
    int32_t found = 0;
    for (int64_t i = 0; i < count_; ++i) found += keys[i] >= bound;
    return found;
  }

  int64_t count_at_most(int32_t bound) const {
    const int32_t* keys = keys_.data();
    int32_t found = 0;
    for (int64_t i = 0; i < count_; ++i) found += keys[i] <= bound;
    return found;
  }

  int64_t k_, capacity_, count_ = 0;
  std::vector<int32_t> keys_, items_;
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

// Raises thresholds to a score that at least k of the first items exceed, so that few items pass only to be dropped later. Lanes from
// `last_query` on keep theirs, which nothing exceeds: the queries there are another piece's.
template <int kRows, int kColumns>
void seed_thresholds(const Problem& p, const float* packed, int64_t first_query, int64_t last_query, int64_t begin, int64_t end,
                     float* thresholds) {
  int64_t rows = (end - begin) / kRows * kRows, num_queries = std::min<int64_t>(kColumns * kLanes, last_query - first_query);
  std::vector<Vector> scores(rows * kColumns);
  Vector low[kColumns], high[kColumns];
  for (int c = 0; c < kColumns; ++c) low[c] = Vector{} + kInfinity, high[c] = Vector{} - kInfinity;
  for (int64_t r = 0; r < rows; r += kRows)
    score_tile<kRows, kColumns>(p, packed, begin + r, end, reinterpret_cast<Vector(*)[kColumns]>(scores.data() + r * kColumns));
  for (int64_t r = 0; r < rows; ++r)
    if (!p.allowed[begin + r])
      for (int c = 0; c < kColumns; ++c) scores[r * kColumns + c] = Vector{} - kInfinity;
  float* single = reinterpret_cast<float*>(scores.data());
  for (int64_t q = 0; q < num_queries; ++q)
    for (int64_t j = 0; j < p.num_excluded; ++j) {
      int64_t row = p.excluded[(first_query + q) * p.num_excluded + j] - begin;
      if (row >= 0 && row < rows) single[row * kColumns * kLanes + q] = -kInfinity;
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < kColumns; ++c) {
      Vector score = scores[r * kColumns + c];
      high[c] = score > high[c] ? score : high[c];
      low[c] = score < low[c] && score > -kInfinity ? score : low[c];
    }
  for (int step = 0; step < 12; ++step)
    for (int c = 0; c < kColumns; ++c) {
      Vector middle = 0.5f * low[c] + 0.5f * high[c], count = {};
      for (int64_t r = 0; r < rows; ++r) count += scores[r * kColumns + c] > middle ? Vector{} + 1.0f : Vector{};
      low[c] = count >= Vector{} + float(p.k) ? middle : low[c];
      high[c] = count >= Vector{} + float(p.k) ? high[c] : middle;
      if (step == 11) {
        count = Vector{};
        for (int64_t r = 0; r < rows; ++r) count += scores[r * kColumns + c] > low[c] ? Vector{} + 1.0f : Vector{};
        Vector seeded = count >= Vector{} + float(p.k) ? low[c] : Vector{} - kInfinity;
        for (int lane = 0; lane < kLanes; ++lane)
          if (c * kLanes + lane < num_queries) thresholds[c * kLanes + lane] = seeded[lane];
      }
    }
}

// One piece: items [begin, end) for queries [first_query, last_query).
template <int kRows, int kColumns>
void scan_piece(const Problem& p, int64_t first_query, int64_t last_query, int64_t begin, int64_t end, Best* best) {
  constexpr int kQueries = kColumns * kLanes;
  int64_t tiles = (last_query - first_query + kQueries - 1) / kQueries;
  std::vector<float> packed(tiles * p.width * kQueries, 0.0f), thresholds(tiles * kQueries, kInfinity);
  for (int64_t q = first_query; q < last_query; ++q) {
    int64_t tile = (q - first_query) / kQueries, lane = (q - first_query) % kQueries;
    thresholds[q - first_query] = -kInfinity;
    for (int64_t x = 0; x < p.width; ++x) packed[(tile * p.width + x) * kQueries + lane] = p.queries[q * p.width + x];
  }
  // Item vectors of one block stay in the second-level cache while all tiles of queries pass over them.
  int64_t block = std::max<int64_t>(kRows, (1 << 16) / std::max<int64_t>(p.width, 1) / kRows * kRows);
  if (int64_t sample = std::min<int64_t>(end - begin, 16 * p.k); p.k >= 8 && sample >= 8 * p.k)
    for (int64_t tile = 0; tile < tiles; ++tile)
      seed_thresholds<kRows, kColumns>(p, packed.data() + tile * p.width * kQueries, first_query + tile * kQueries, last_query,
                                       begin, begin + sample, thresholds.data() + tile * kQueries);
  for (int64_t start = begin; start < end; start += block)
    for (int64_t tile = 0; tile < tiles; ++tile)
      scan_tile<kRows, kColumns>(p, packed.data() + tile * p.width * kQueries, first_query + tile * kQueries, start,
                                 std::min(start + block, end), thresholds.data() + tile * kQueries, best + tile * kQueries);
}

ffi::Error topk_dot(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> queries, ffi::Buffer<ffi::F32> items, ffi::Buffer<ffi::PRED> allowed,
                    ffi::Buffer<ffi::S32> excluded, ffi::ResultBuffer<ffi::S32> found, ffi::ResultBuffer<ffi::F32> scores) {
  Problem p{items.typed_data(), queries.typed_data(), allowed.typed_data(), excluded.typed_data(),
            items.dimensions()[0], items.dimensions()[1], queries.dimensions()[0], excluded.dimensions()[1], found->dimensions()[1]};
  if (p.num_queries == 0) return ffi::Error::Success();
  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  int64_t query_pieces = std::min(threads, (p.num_queries + 4 * kLanes - 1) / (4 * kLanes));
  int64_t item_pieces = std::max<int64_t>(1, std::min(threads / query_pieces, p.num_rows / 1024));
  int64_t queries_each = (p.num_queries + query_pieces - 1) / query_pieces;
  int64_t items_each = (p.num_rows + item_pieces - 1) / item_pieces;
  std::vector<std::vector<Best>> best(item_pieces, std::vector<Best>(p.num_queries, Best(p.k)));
  run_pieces(pool, query_pieces * item_pieces, [&](int64_t piece) {
    int64_t first_query = piece / item_pieces * queries_each, last_query = std::min(first_query + queries_each, p.num_queries);
    int64_t begin = piece % item_pieces * items_each, end = std::min(begin + items_each, p.num_rows);
    if (first_query >= last_query || begin >= end) return;
    Best* own = best[piece % item_pieces].data() + first_query;
    int64_t count = last_query - first_query;
    if (count <= kLanes)
      scan_piece<8, 1>(p, first_query, last_query, begin, end, own);
    else if (count <= 2 * kLanes)
      scan_piece<6, 2>(p, first_query, last_query, begin, end, own);
    else
      scan_piece<6, kLanes == 8 ? 2 : 4>(p, first_query, last_query, begin, end, own);
  });
  run_pieces(pool, query_pieces, [&](int64_t piece) {
    for (int64_t q = piece * queries_each; q < std::min((piece + 1) * queries_each, p.num_queries); ++q) {
      for (int64_t part = 1; part < item_pieces; ++part) best[0][q].add_all(best[part][q]);
      best[0][q].write(found->typed_data() + q * p.k, scores->typed_data() + q * p.k);
    }
  });
  return ffi::Error::Success();
}

// Items in blocks of 16: codes [block, width, 16], and for each item its scale s, |e - s c| and |e|, rounded up.
constexpr int kBlock = 16;
typedef int8_t Codes __attribute__((vector_size(kBlock), aligned(1), may_alias));
typedef int32_t Whole __attribute__((vector_size(4 * kBlock)));
typedef float Scores __attribute__((vector_size(4 * kBlock), aligned(4), may_alias));

inline Scores widened(const int8_t* codes) {
#if defined(__AVX512F__)
  return (Scores)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Codes*>(codes), Whole), Scores);
#endif
}

struct Quantised {
  const int8_t* codes;
  const float *scales, *residuals, *norms;
};

// A query as codes: q = scale * codes + rest. Sums of products of codes are whole numbers below 2^24, hence exact in float32.
struct QueryCodes {
  QueryCodes(const float* query, int64_t width) : codes(width, 0.0f) {
    double largest = 0, whole = 0, coded = 0, rest = 0;
    for (int64_t x = 0; x < width; ++x) largest = std::max(largest, std::abs(double(query[x])));
    scale = float(largest / 127);
    for (int64_t x = 0; x < width; ++x) {
      codes[x] = scale > 0 ? std::nearbyint(query[x] / scale) : 0.0f;
      double value = double(scale) * codes[x];
      whole += double(query[x]) * query[x], coded += value * value, rest += (query[x] - value) * (query[x] - value);
    }
    // |q . e - s_q s_i (c_q . c_i)| <= |s_q c_q| |e - s_i c_i| + |q - s_q c_q| |e|, by Cauchy-Schwarz. The last term of `per_norm` is the
    // rounding of the float32 score itself, and of the bound.
    per_residual = float(std::sqrt(coded) * 1.00001);
    per_norm = float(std::sqrt(rest) * 1.00001 + std::sqrt(whole) * (width + 16) * 0x1p-23);
  }
  std::vector<float> codes;
  float scale, per_residual, per_norm;
};

struct Candidate {
  float lower, upper;  // of its float32 score
  int32_t item;
};

// Drops what k others are certain to beat; returns what a score must be able to reach.
float prune(std::vector<Candidate>& candidates, int64_t k) {
  if (int64_t(candidates.size()) < k) return -kInfinity;
  std::vector<float> lower(candidates.size());
  for (size_t i = 0; i < candidates.size(); ++i) lower[i] = candidates[i].lower;
  std::nth_element(lower.begin(), lower.begin() + (k - 1), lower.end(), std::greater<float>());
  float reach = lower[k - 1];
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(), [=](const Candidate& c) { return c.upper < reach; }),
                   candidates.end());
  return reach;
}

// One step of a score, rounded as in `score_tile`; a plain loop may be compiled to products that are rounded before they are added.
inline float chained(float a, float b, float sum) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, sum);
#else
  return sum + a * b;
#endif
}

// Candidates of one query among the blocks [begin, end), by rising index.
std::vector<Candidate> scan_codes(const Problem& p, const Quantised& table, const QueryCodes& query, int64_t number, int64_t begin,
                                  int64_t end) {
  std::vector<Candidate> found;
  size_t most = 2 * p.k + 256;
  float below = -kInfinity;  // an upper bound must exceed it
  for (int64_t block = begin; block < end; ++block) {
    const int8_t* codes = table.codes + block * p.width * kBlock;
    Scores sums[4] = {};
    int64_t x = 0;
    for (; x + 4 <= p.width; x += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        sums[j] += widened(codes + (x + j) * kBlock) * query.codes[x + j];
    for (; x < p.width; ++x)
      sums[0] += widened(codes + x * kBlock) * query.codes[x];
    auto of = [block](const float* values) { return *reinterpret_cast<const Scores*>(values + block * kBlock); };
    Scores score = (sums[0] + sums[1] + sums[2] + sums[3]) * (of(table.scales) * query.scale);
    Scores error = of(table.residuals) * query.per_residual + of(table.norms) * query.per_norm;
    Scores lower = score - error, upper = score + error;
    for (int part = 0; part < kBlock / kLanes; ++part) {
      uint32_t passed = above(load(reinterpret_cast<float*>(&upper) + part * kLanes), Vector{} + below);
      for (; passed; passed &= passed - 1) {
        int lane = part * kLanes + __builtin_ctz(passed);
        int64_t item = block * kBlock + lane;
        if (item < p.num_rows && p.is_allowed(number, item)) found.push_back({lower[lane], upper[lane], int32_t(item)});
      }
    }
    if (found.size() > most) {
      below = std::nextafter(prune(found, p.k), -kInfinity);
      most = std::max(most, 2 * found.size());
    }
  }
  return found;
}

ffi::Error topk_dot_int8(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> queries, ffi::Buffer<ffi::F32> items, ffi::Buffer<ffi::S8> codes,
                         ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::F32> residuals, ffi::Buffer<ffi::F32> norms,
                         ffi::Buffer<ffi::PRED> allowed, ffi::Buffer<ffi::S32> excluded, ffi::ResultBuffer<ffi::S32> found,
                         ffi::ResultBuffer<ffi::F32> scores) {
  Problem p{items.typed_data(), queries.typed_data(), allowed.typed_data(), excluded.typed_data(),
            items.dimensions()[0], items.dimensions()[1], queries.dimensions()[0], excluded.dimensions()[1], found->dimensions()[1]};
  if (p.num_queries == 0) return ffi::Error::Success();
  Quantised table{codes.typed_data(), scales.typed_data(), residuals.typed_data(), norms.typed_data()};
  int64_t blocks = codes.dimensions()[0], pieces = std::max<int64_t>(1, std::min(pool.num_threads(), blocks / 64));
  int64_t blocks_each = (blocks + pieces - 1) / pieces;
  std::vector<QueryCodes> coded;
  for (int64_t q = 0; q < p.num_queries; ++q) coded.emplace_back(p.queries + q * p.width, p.width);
  std::vector<std::vector<Candidate>> candidates(p.num_queries * pieces);
  run_pieces(pool, p.num_queries * pieces, [&](int64_t piece) {
    int64_t q = piece / pieces, begin = piece % pieces * blocks_each;
    candidates[piece] = scan_codes(p, table, coded[q], q, begin, std::min(begin + blocks_each, blocks));
  });
  run_pieces(pool, p.num_queries, [&](int64_t q) {
    std::vector<Candidate> all;
    for (int64_t piece = q * pieces; piece < (q + 1) * pieces; ++piece) all.insert(all.end(), candidates[piece].begin(), candidates[piece].end());
    prune(all, p.k);
    Best best(p.k);
    for (const Candidate& candidate : all) {
      float score = 0.0f;
      for (int64_t x = 0; x < p.width; ++x) score = chained(p.items[candidate.item * p.width + x], p.queries[q * p.width + x], score);
      if (best.full()) best.cut(p.k);
      best.add(key_of(score), candidate.item);
    }
    best.write(found->typed_data() + q * p.k, scores->typed_data() + q * p.k);
  });
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
