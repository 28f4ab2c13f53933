// What both custom calls share: shares of the work, thresholds, and the best k of one query.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../native.h"

namespace {

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

// How threads share a call out: pieces of the queries if there are enough for all, else also pieces of the items. Four times as many
// pieces as threads where possible, so that a thread which the machine holds up does not hold up the call.
struct Shares {
  Shares(const ffi::ThreadPool& pool, int64_t num_queries, int64_t num_items, int64_t tile, int64_t lanes, int64_t least_items)
      : num_queries(num_queries), num_items(num_items) {
    int64_t threads = std::max<int64_t>(1, pool.num_threads());
    queries_each = std::max((num_queries + 4 * threads - 1) / (4 * threads), std::min(tile, num_queries));
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

// A bound that `rank` of the values exceed, and few more do; -inf where so many do not, or all are equal.
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

}  // namespace
