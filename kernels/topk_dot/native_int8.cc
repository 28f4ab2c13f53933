// Exact search by way of 8-bit codes on a CPU, as an XLA custom call; see quantised.py. It finds what native.cc finds, bit for bit.
//
// Products of codes bound each score from both sides. What the bounds cannot rule out is scored in float32, as native.cc does.

#include "search.h"

namespace {

// Items in blocks of 16: codes [block, width, 16], and for each item its scale s, |e - s c| and |e|, rounded up.
constexpr int kBlock = 16, kParts = kBlock / kLanes;

// A number for each item of a block, in as many vectors as that takes: the compiler keeps longer ones in memory.
struct Scores {
  Vector part[kParts];
};

template <typename Part>
inline Scores by_part(Part part) {
  Scores all;
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) all.part[p] = part(p);
  return all;
}
inline Scores operator+(const Scores& a, const Scores& b) { return by_part([&](int p) { return a.part[p] + b.part[p]; }); }
inline Scores operator*(const Scores& a, const Scores& b) { return by_part([&](int p) { return a.part[p] * b.part[p]; }); }
inline Scores operator*(const Scores& a, float b) { return by_part([&](int p) { return a.part[p] * b; }); }

inline uint32_t above(const Scores& scores, float bound) {
  uint32_t bits = 0;
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) bits |= above(scores.part[p], bound - Vector{}) << p * kLanes;
  return bits;
}

// Codes as the instructions want them, in steps of one or more channels: `pack` makes a step of 16 items, `advance` adds the products
// with a query's codes for the step, whose sum starts at `start_of`. Sums are whole numbers below 2^24, hence exact in float32 as well.
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
constexpr int kChannels = 4;  // of 16 items side by side, in bytes
typedef int8_t QueryCode;
typedef __m512i Packed;
typedef __m512i Sums;
typedef int32_t Sum __attribute__((may_alias));

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
inline Scores scores_of(Sums sums) { return {(Vector)_mm512_cvtepi32_ps(sums)}; }
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kChannels = 2;  // of 8 items side by side, in 16 bits each: one instruction makes and adds the products of both
typedef int16_t QueryCode;
struct Packed {
  __m256i part[kParts];
};
typedef Packed Sums;
typedef int32_t Sum __attribute__((may_alias));

inline Packed pack(const int8_t* codes) {
  __m128i one = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  __m128i other = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + kBlock));
  return {_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(one, other)), _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(one, other))};
}
inline Sums start_of(int32_t) { return {}; }
inline Sums both(const Sums& a, const Sums& b) {
  return {_mm256_add_epi32(a.part[0], b.part[0]), _mm256_add_epi32(a.part[1], b.part[1])};
}
inline Sums advance(const Sums& sums, const Packed& items, const QueryCode* query) {
  int32_t step;
  std::memcpy(&step, query, sizeof(step));
  __m256i asked = _mm256_set1_epi32(step);
  return both(sums, {_mm256_madd_epi16(items.part[0], asked), _mm256_madd_epi16(items.part[1], asked)});
}
inline Scores scores_of(const Sums& sums) {
  return {(Vector)_mm256_cvtepi32_ps(sums.part[0]), (Vector)_mm256_cvtepi32_ps(sums.part[1])};
}
#else
constexpr int kChannels = 1;
typedef float QueryCode;
typedef Scores Packed;
typedef Scores Sums;
typedef float Sum __attribute__((may_alias));

inline Packed pack(const int8_t* codes) {
#if defined(__AVX512F__)  // which GCC would take apart, number by number
  return {(Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))))};
#else
  typedef int8_t Codes __attribute__((vector_size(kLanes), aligned(1), may_alias));
  return by_part([&](int p) { return __builtin_convertvector(*reinterpret_cast<const Codes*>(codes + p * kLanes), Vector); });
#endif
}
inline Sums start_of(int32_t) { return {}; }
inline Sums both(const Sums& a, const Sums& b) { return a + b; }
inline Sums advance(const Sums& sums, const Packed& items, const QueryCode* query) { return sums + items * *query; }
inline Scores scores_of(const Sums& sums) { return sums; }
#endif
#if defined(__AVX512F__)
constexpr int kTileQueries = 8, kTileBlocks = 3;
#else
constexpr int kTileQueries = 4, kTileBlocks = 1;
#endif
constexpr int64_t kStep = kChannels * kBlock;  // bytes

constexpr int64_t kAhead = 4096;  // bytes to fetch ahead; half and twice as much were slower
constexpr int64_t kPackedBytes = 1 << 15;  // of items, which stay in the first-level cache while the queries pass over them

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

// What one piece found for one query: items, and bounds of their float32 scores from both sides.
struct Candidates {
  std::vector<float> lower, upper;
  std::vector<int32_t> items;
  float guessed = -kInfinity, below = -kInfinity;  // an upper bound must exceed `below`
  size_t most = 0;

  size_t size() const { return items.size(); }

  void add(float least, float greatest, int32_t item) { lower.push_back(least), upper.push_back(greatest), items.push_back(item); }

  void add_all(const Candidates& other) {
    lower.insert(lower.end(), other.lower.begin(), other.lower.end());
    upper.insert(upper.end(), other.upper.begin(), other.upper.end());
    items.insert(items.end(), other.items.begin(), other.items.end());
    guessed = std::max(guessed, other.guessed);
  }

  // Drops what k others are certain to beat; without branches, which nothing could predict.
  void prune(int64_t k) {
    float reach = bound_above(lower.data(), lower.size(), k);
    size_t kept = 0;
    for (size_t i = 0; i < size(); ++i) {
      lower[kept] = lower[i], upper[kept] = upper[i], items[kept] = items[i];
      kept += upper[i] > reach;
    }
    resize(kept);
    below = std::max(below, reach);
  }

  void reserve(size_t count) { lower.reserve(count), upper.reserve(count), items.reserve(count); }

 private:
  void resize(size_t count) { lower.resize(count), upper.resize(count), items.resize(count); }
};

// One step of a score, rounded as in `score_tile`; a plain loop may be compiled to products that are rounded before they are added.
inline float chained(float a, float b, float sum) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, sum);
#else
  return sum + a * b;
#endif
}

// The float32 scores of as many items as there are lanes. One chain alone would wait for each of its sums.
#if defined(__AVX512F__)
inline Vector score_rows(const float* const* rows, const float* wanted, int64_t width) {
  Vector sums = {};
  int64_t x = 0;
  for (; x + 4 <= width; x += 4) {
    // Four numbers of each row, rows i, i + 4, i + 8 and i + 12 side by side; then transposed within each quarter.
    __m512 part[4];
    for (int i = 0; i < 4; ++i) {
      __m512 row = _mm512_castps128_ps512(_mm_loadu_ps(rows[i] + x));
      row = _mm512_insertf32x4(row, _mm_loadu_ps(rows[i + 4] + x), 1);
      row = _mm512_insertf32x4(row, _mm_loadu_ps(rows[i + 8] + x), 2);
      part[i] = _mm512_insertf32x4(row, _mm_loadu_ps(rows[i + 12] + x), 3);
    }
    __m512d low01 = (__m512d)_mm512_unpacklo_ps(part[0], part[1]), high01 = (__m512d)_mm512_unpackhi_ps(part[0], part[1]);
    __m512d low23 = (__m512d)_mm512_unpacklo_ps(part[2], part[3]), high23 = (__m512d)_mm512_unpackhi_ps(part[2], part[3]);
    sums += (Vector)_mm512_unpacklo_pd(low01, low23) * wanted[x];
    sums += (Vector)_mm512_unpackhi_pd(low01, low23) * wanted[x + 1];
    sums += (Vector)_mm512_unpacklo_pd(high01, high23) * wanted[x + 2];
    sums += (Vector)_mm512_unpackhi_pd(high01, high23) * wanted[x + 3];
  }
  for (; x < width; ++x)
    for (int j = 0; j < kLanes; ++j) sums[j] = chained(rows[j][x], wanted[x], sums[j]);
  return sums;
}
#else
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-tree-slp-vectorize")))  // which would spend more on building vectors than on sums
#endif
inline Vector score_rows(const float* const* rows, const float* wanted, int64_t width) {
  float scores[kLanes] = {};
  for (int64_t x = 0; x < width; ++x)
    for (int64_t j = 0; j < kLanes; ++j) scores[j] = chained(rows[j][x], wanted[x], scores[j]);
  return load(scores);
}
#endif

void score_candidates(const Problem& p, int64_t query, Candidates& given, Best& best) {
  given.prune(p.k);
  const std::vector<int32_t>& candidates = given.items;
  const float* wanted = p.queries + query * p.width;
  for (size_t first = 0; first < candidates.size(); first += kLanes) {
    int64_t count = std::min<int64_t>(kLanes, candidates.size() - first);
    const float* rows[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) rows[j] = p.items + candidates[first + std::min(j, count - 1)] * p.width;
    for (size_t next = first + kLanes; next < std::min(first + 2 * kLanes, candidates.size()); ++next)
      for (int64_t x = 0; x < p.width; x += sizeof(Line) / sizeof(float))
        __builtin_prefetch(p.items + candidates[next] * p.width + x);
    Vector scores = score_rows(rows, wanted, p.width);
    for (int64_t j = 0; j < count; ++j) {
      if (best.full()) best.cut(p.k);
      best.add(key_of(scores[j]), candidates[first + j]);
    }
  }
}

// The codes of items against those of some queries of one piece.
class CodeScan {
 public:
  CodeScan(const Problem& p, const Quantised& table, int64_t first_query, int64_t last_query, int64_t begin, int64_t end,
           Candidates* found)
      : p_(p), table_(table), first_query_(first_query), begin_(begin), end_(end), found_(found),
        steps_((p.width + kChannels - 1) / kChannels),
        chunk_(std::max<int64_t>(1, kPackedBytes / sizeof(Packed) / steps_ / kTileBlocks) * kTileBlocks), packed_(chunk_ * steps_) {
    for (int64_t q = first_query; q < last_query; ++q) {
      queries_.emplace_back(p.queries + q * p.width, p.width);
      found[q - first_query].reserve(most_);
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
          std::memcpy(&sample[query * size + place + (block - first + b) * kBlock], &scores, sizeof(scores));
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
      Packed* packed = packed_.data() + (block - first) * steps_;
      for (int64_t step = 0; step < steps_; ++step) packed[step] = pack(codes_of(block) + step * kStep);
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
      for (int j = 0; j < 4; ++j) {
        const int8_t* next = codes + (step + j) * kStep;
        __builtin_prefetch(next + kAhead);
        sums[j] = advance(sums[j], pack(next), asked + (step + j) * kChannels);
      }
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
    const Sum* each_sum = reinterpret_cast<const Sum*>(sums);
    for (; passed; passed &= passed - 1) {
      int place = __builtin_ctzll(passed);
      int64_t item = block * kBlock + place;
      if (item >= p_.num_rows || !p_.is_allowed(first_query_ + query, item)) continue;
      float score = float(each_sum[place]) * (table_.scales[item] * asked.scale);
      float error = table_.residuals[item] * asked.per_residual + table_.norms[item] * asked.per_norm;
      mine.add(score - error, score + error, int32_t(item));
    }
    if (mine.size() < std::max<size_t>(mine.most, most_)) return;
    mine.prune(p_.k);
    mine.most = 2 * mine.size();
  }

  Scores of(const float* values, int64_t block) const {
    return by_part([=](int p) { return load(values + block * kBlock + p * kLanes); });
  }

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
    for (int64_t part = 1; part < shares.item_pieces; ++part) all.add_all(candidates[first_piece + part][place]);
    Best best(p.k);
    score_candidates(p, query, all, best);
    if (all.guessed > -kInfinity && best.cut(p.k) <= all.guessed) {
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
