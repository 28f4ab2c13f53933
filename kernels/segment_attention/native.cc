// Attention over packed rows on a CPU, as XLA custom calls. The contract is that of ../segment_attention/reference.py.
//
// A thread takes one row and one key-value head at a time, so that no two add to the same gradient. It goes through the queries in tiles as
// high as its registers hold sums, each against the keys from the first that one of its queries reads: the logits of a tile stay in
// cache, and what other segments and later tokens would give is not computed. The backward pass makes the weights again (FlashAttention,
// arXiv 2205.14135) from each query's maximum and sum.

#include "tiles.h"

namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
constexpr int64_t kBlockQueries = 4 * kTileRows;  // of the backward pass: gradients of keys are read and written once for so many

struct Problem {
  int64_t rows, length, heads, kv_heads, size;
  const float *query, *key, *value;
  const int32_t* segment_ids;
  const float* bias;  // or null; `bias_count` batches of it for the rows
  int64_t bias_count;
  const uint32_t* seeds;  // or null
  bool silu;
  uint32_t threshold;
  float scale;  // of the weights that are kept

  int64_t query_stride() const { return heads * size; }
  int64_t key_stride() const { return kv_heads * size; }
  int64_t query_at(int64_t row, int64_t token, int64_t head) const { return ((row * length + token) * heads + head) * size; }
  int64_t key_at(int64_t row, int64_t token, int64_t head) const { return ((row * length + token) * kv_heads + head) * size; }
  int64_t of_query(int64_t row, int64_t head) const { return (row * heads + head) * length; }
};

// What one thread needs for one row and one key-value head.
struct Piece {
  Piece(const Problem& p, int64_t tile_rows, bool backward)
      : p(p), stride(ceil_to(p.length, kPanel) + kLanes), keys(ceil_to(p.length, kPanel) * p.size),
        values(backward ? ceil_to(p.length, kPanel) * p.size : 0), weights(tile_rows * stride),
        d_logits(backward ? tile_rows * stride : 0), bias(p.bias ? stride + kPanel : 0), d_bias(p.bias && backward ? stride + kPanel : 0),
        key_ids(stride), first(p.length), last(p.length) {}

  void take(int64_t row, int64_t kv_head) {
    this->row = row, this->kv_head = kv_head;
    transpose(p.key + p.key_at(row, 0, kv_head), p.key_stride(), p.length, p.size, keys.data());
    if (!values.lines.empty()) transpose(p.value + p.key_at(row, 0, kv_head), p.key_stride(), p.length, p.size, values.data());
    // Where ids rise, as they do in packed rows, a segment begins with an id higher than all before; others are searched for.
    const int32_t* ids = p.segment_ids + row * p.length;
    int32_t highest = 0, *key_id = key_ids.data();
    for (int64_t t = 0; t < p.length; ++t) {
      int32_t id = key_id[t] = std::max(ids[t], 0);
      first[t] = t, last[t] = t;
      if (t > 0 && id == key_id[t - 1]) first[t] = first[t - 1];
      else if (id > highest) highest = id;
      else first[t] = std::find(key_id, key_id + t, id) - key_id;
      last[first[t]] = t;
    }
    for (int64_t t = 0; t < p.length; ++t) last[t] = last[first[t]];
  }

  void take_head(int64_t head) {
    this->head = head;
    seeds = p.seeds ? p.seeds + (row * p.heads + head) * 2 : nullptr;
    if (!p.bias) return;
    // Turned round, the biases of one query lie as its keys do.
    const float* of_head = p.bias + (row * p.bias_count / p.rows * p.heads + head) * p.length;
    std::reverse_copy(of_head, of_head + p.length, bias.data());
  }

  // The first key that a query of [begin, end) reads, or `end`.
  int64_t first_key(int64_t begin, int64_t end) const {
    int64_t found = end;
    for (int64_t t = begin; t < end; ++t)
      if (p.segment_ids[row * p.length + t] > 0) found = std::min(found, first[t]);
    return found;
  }

  // Logits from their products, minus infinity where the query reads nothing.
  Vector logits(Vector products, int64_t query, int64_t column) {
    if (p.bias) products += load(bias.data() + p.length - 1 - query + column);
    const Whole ids = *reinterpret_cast<const Whole*>(key_ids.data() + column);
    int32_t id = key_ids.data()[query];
    Whole reads = (ids == Whole{} + (id > 0 ? id : -1)) & (ascending() + int32_t(column) <= Whole{} + int32_t(query));
    return reads ? products : Vector{} - kInfinity;
  }

  // The same hash as in dropout.py.
  Vector dropped(Vector weights, int64_t query, int64_t column) const {
    Bits bits = ((Bits{} + (uint32_t(query) << 16)) | (Bits)(ascending() + int32_t(column))) ^ seeds[0];
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352Du) ^ seeds[1];
    bits = (bits ^ (bits >> 15)) * 0x846CA68Bu;
    return bits >= Bits{} + p.threshold ? weights : Vector{};
  }

  const Problem& p;
  int64_t stride;
  Lines<float> keys, values, weights, d_logits, bias, d_bias;
  Lines<int32_t> key_ids;
  std::vector<int64_t> first, last;  // token of each token's segment
  int64_t row = 0, kv_head = 0, head = 0;
  const uint32_t* seeds = nullptr;
};

void attend(Piece& piece, int64_t begin, float* out, float* maxima, float* sums) {
  const Problem& p = piece.p;
  int64_t rows = std::min<int64_t>(kTileRows, p.length - begin), end = begin + rows, from = piece.first_key(begin, end);
  float* weights = piece.weights.data();
  Vector most[kTileRows];
  std::fill_n(most, kTileRows, Vector{} - kInfinity);
  const Columns columns(from, end);
  each_tile(columns, [&](auto width, int64_t column) {
    Vector products[kTileRows][width];
    multiply_tile<width>(p.query + p.query_at(piece.row, begin, piece.head), p.query_stride(), 1, rows, p.size,
                         panel_of(piece.keys, column, p.size), kPanel, products);
    for (int64_t r = 0; r < rows; ++r)
      for (int c = 0; c < width; ++c) {
        Vector logits = piece.logits(products[r][c], begin + r, column + c * kLanes);
        store(weights + r * piece.stride + column + c * kLanes, logits);
        most[r] = largest(logits, most[r]);
      }
  });
  float scales[kTileRows];
  for (int64_t r = 0; r < rows; ++r) {
    float greatest = largest_of(most[r]);
    Vector total = {};
    for (int64_t column = columns.begin; column < columns.end; column += kLanes) {
      float* at = weights + r * piece.stride + column;
      Vector logits = load(at), weight;
      if (p.silu) {
        weight = logits / (1.0f + exponential(-logits));
        total += logits == -kInfinity ? Vector{} : Vector{} + 1.0f;
      } else {
        weight = exponential(logits - greatest);
      }
      weight = logits == -kInfinity ? Vector{} : weight;
      if (!p.silu) total += weight;
      store(at, piece.seeds ? piece.dropped(weight, begin + r, column) : weight);
    }
    maxima[begin + r] = greatest, sums[begin + r] = sum_of(total);
    scales[r] = sums[begin + r] == 0.0f ? 0.0f : p.scale / sums[begin + r];
  }
  multiply(weights + from, piece.stride, 1, rows, std::max<int64_t>(end - from, 0), p.value + p.key_at(piece.row, from, piece.kv_head),
           p.key_stride(), p.size,
           [&](int64_t r, int64_t x, Vector sum) { store(out + p.query_at(piece.row, begin + r, piece.head) + x, scales[r] * sum); });
}

struct Gradients {
  const float *out, *maxima, *sums, *d_out;
  float *d_query, *d_key, *d_value;
};

// One block of queries: their gradients, and what they add to those of keys, values and biases.
void differentiate(Piece& piece, const Gradients& g, int64_t block) {
  const Problem& p = piece.p;
  int64_t block_end = std::min(block + kBlockQueries, p.length), block_from = piece.first_key(block, block_end);
  float *weights = piece.weights.data(), *d_logits = piece.d_logits.data();
  for (int64_t begin = block; begin < block_end; begin += kTileRows) {
    int64_t rows = std::min<int64_t>(kTileRows, block_end - begin), end = begin + rows, from = piece.first_key(begin, end);
    const Columns columns(from, end);
    int64_t at_query = p.query_at(piece.row, begin, piece.head), at_scratch = (begin - block) * piece.stride;
    float most[kTileRows], inverses[kTileRows], deltas[kTileRows];
    for (int64_t r = 0; r < rows; ++r) {
      int64_t statistics = p.of_query(piece.row, piece.head) + begin + r;
      most[r] = g.maxima[statistics], inverses[r] = g.sums[statistics] == 0.0f ? 0.0f : 1.0f / g.sums[statistics];
      Vector delta = {};
      for (int64_t x = 0; x < p.size; x += kLanes)
        delta += load(g.out + at_query + r * p.query_stride() + x) * load(g.d_out + at_query + r * p.query_stride() + x);
      deltas[r] = sum_of(delta);
      for (float* of : {weights, d_logits}) {
        float* to = of + at_scratch + r * piece.stride;
        for (int64_t column = block_from; column < columns.begin; column += kLanes) store(to + column, Vector{});
        for (int64_t column = std::max(columns.end, block_from); column < block_end; column += kLanes) store(to + column, Vector{});
      }
    }
    each_tile(columns, [&](auto width, int64_t column) {
      Vector products[kTileRows][width], d_weights[kTileRows][width];
      multiply_tile<width>(p.query + at_query, p.query_stride(), 1, rows, p.size, panel_of(piece.keys, column, p.size), kPanel,
                           products);
      multiply_tile<width>(g.d_out + at_query, p.query_stride(), 1, rows, p.size, panel_of(piece.values, column, p.size), kPanel,
                           d_weights);
      for (int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < width; ++c) {
          int64_t query = begin + r, at = column + c * kLanes;
          Vector logits = piece.logits(products[r][c], query, at), weight, d_logit, d_weight = p.scale * d_weights[r][c];
          if (piece.seeds) d_weight = piece.dropped(d_weight, query, at);
          if (p.silu) {
            Vector gate = 1.0f / (1.0f + exponential(-logits));
            weight = logits * gate * inverses[r];
            d_logit = gate * inverses[r] * (1.0f + logits * (1.0f - gate)) * d_weight;
          } else {
            weight = exponential(logits - most[r]) * inverses[r];
            d_logit = weight * (d_weight - deltas[r]);
          }
          weight = logits == -kInfinity ? Vector{} : p.scale * weight, d_logit = logits == -kInfinity ? Vector{} : d_logit;
          if (piece.seeds) weight = piece.dropped(weight, query, at);
          store(weights + at_scratch + r * piece.stride + at, weight);
          store(d_logits + at_scratch + r * piece.stride + at, d_logit);
          if (!p.bias) continue;
          float* to_bias = piece.d_bias.data() + p.length - 1 - query + at;
          store(to_bias, load(to_bias) + d_logit);
        }
    });
    const float* keys = p.key + p.key_at(piece.row, from, piece.kv_head);
    multiply(d_logits + at_scratch + from, piece.stride, 1, rows, end - from, keys, p.key_stride(), p.size,
             [&](int64_t r, int64_t x, Vector sum) { store(g.d_query + at_query + r * p.query_stride() + x, sum); });
  }
  for (int64_t begin = block_from; begin < block_end; begin += kTileRows) {
    int64_t rows = std::min<int64_t>(kTileRows, block_end - begin), first = std::max(begin, block);
    int64_t end = std::min(*std::max_element(piece.last.begin() + begin, piece.last.begin() + begin + rows) + 1, block_end);
    if (end <= first) continue;
    int64_t scratch = (first - block) * piece.stride + begin, at_query = p.query_at(piece.row, first, piece.head);
    int64_t at_key = p.key_at(piece.row, begin, piece.kv_head);
    auto add_to = [&](float* gradient) {
      return [=, &p](int64_t r, int64_t x, Vector sum) {
        float* to = gradient + at_key + r * p.key_stride() + x;
        store(to, load(to) + sum);
      };
    };
    multiply(weights + scratch, 1, piece.stride, rows, end - first, g.d_out + at_query, p.query_stride(), p.size, add_to(g.d_value));
    multiply(d_logits + scratch, 1, piece.stride, rows, end - first, p.query + at_query, p.query_stride(), p.size, add_to(g.d_key));
  }
}

// What both passes begin with. Batch axes, which vmap may have put in front, count as rows.
Problem make_problem(Floats query, Floats key, Floats value, ffi::Buffer<ffi::S32> segment_ids, Floats bias, ffi::Buffer<ffi::U32> seeds,
                     bool silu, int64_t threshold, float scale) {
  auto shape = query.dimensions();
  Problem p;
  p.length = shape[shape.size() - 3], p.heads = shape[shape.size() - 2], p.size = shape[shape.size() - 1];
  p.kv_heads = key.dimensions()[shape.size() - 2], p.rows = segment_ids.element_count() / p.length;
  p.query = query.typed_data(), p.key = key.typed_data(), p.value = value.typed_data(), p.segment_ids = segment_ids.typed_data();
  p.bias_count = bias.element_count() / (p.heads * p.length);
  p.bias = p.bias_count ? bias.typed_data() : nullptr, p.seeds = seeds.element_count() ? seeds.typed_data() : nullptr;
  p.silu = silu, p.threshold = threshold, p.scale = scale;
  return p;
}

// Calls start(piece) for each row and key-value head, and work(piece) for each of its query heads. A thread keeps its scratch.
template <typename Start, typename Work>
void each_head(ffi::ThreadPool& pool, const Problem& p, int64_t tile_rows, bool backward, Start start, Work work) {
  int64_t count = p.rows * p.kv_heads, runs = std::min(count, 4 * std::max<int64_t>(1, pool.num_threads())), groups = p.heads / p.kv_heads;
  run_pieces(pool, runs, [&](int64_t run) {
    Piece piece(p, tile_rows, backward);
    for (int64_t i = run * count / runs; i < (run + 1) * count / runs; ++i) {
      piece.take(i / p.kv_heads, i % p.kv_heads);
      start(piece);
      for (int64_t head = piece.kv_head * groups; head < (piece.kv_head + 1) * groups; ++head) {
        piece.take_head(head);
        work(piece);
      }
    }
  });
}

// Of each query the greatest logit, and the sum of the exponentials minus it (for silu the number of tokens that it reads), are for the
// backward pass.
ffi::Error segment_attention(ffi::ThreadPool pool, Floats query, Floats key, Floats value, ffi::Buffer<ffi::S32> segment_ids, Floats bias,
                             ffi::Buffer<ffi::U32> seeds, bool silu, int64_t threshold, float scale, Result out, Result maxima,
                             Result sums) {
  Problem p = make_problem(query, key, value, segment_ids, bias, seeds, silu, threshold, scale);
  auto attend_all = [&](Piece& piece) {
    int64_t at = p.of_query(piece.row, piece.head);
    for (int64_t begin = 0; begin < p.length; begin += kTileRows)
      attend(piece, begin, out->typed_data(), maxima->typed_data() + at, sums->typed_data() + at);
  };
  each_head(pool, p, kTileRows, false, [](Piece&) {}, attend_all);
  return ffi::Error::Success();
}

// The gradient of the bias is apart for each row.
ffi::Error segment_attention_backward(ffi::ThreadPool pool, Floats query, Floats key, Floats value, ffi::Buffer<ffi::S32> segment_ids,
                                      Floats bias, ffi::Buffer<ffi::U32> seeds, bool silu, int64_t threshold, float scale, Floats out,
                                      Floats maxima, Floats sums, Floats d_out, Result d_query, Result d_key, Result d_value,
                                      Result d_bias) {
  Problem p = make_problem(query, key, value, segment_ids, bias, seeds, silu, threshold, scale);
  Gradients g{out.typed_data(),      maxima.typed_data(), sums.typed_data(),    d_out.typed_data(),
              d_query->typed_data(), d_key->typed_data(), d_value->typed_data()};
  auto start = [&](Piece& piece) {
    for (int64_t t = 0; t < p.length; ++t)
      for (float* gradient : {g.d_key, g.d_value}) std::fill_n(gradient + p.key_at(piece.row, t, piece.kv_head), p.size, 0.0f);
  };
  auto differentiate_all = [&](Piece& piece) {
    float* d_biases = piece.d_bias.data();
    if (p.bias) std::fill_n(d_biases, p.length, 0.0f);
    for (int64_t block = 0; block < p.length; block += kBlockQueries) differentiate(piece, g, block);
    if (p.bias) std::reverse_copy(d_biases, d_biases + p.length, d_bias->typed_data() + p.of_query(piece.row, piece.head));
  };
  each_head(pool, p, kBlockQueries, true, start, differentiate_all);
  return ffi::Error::Success();
}

auto operands() {
  auto floats = ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>();
  auto arrays = std::move(floats).Arg<ffi::Buffer<ffi::S32>>().Arg<Floats>().Arg<ffi::Buffer<ffi::U32>>();
  return std::move(arrays).Attr<bool>("silu").Attr<int64_t>("threshold").Attr<float>("scale");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SegmentAttention, segment_attention, operands().Ret<Floats>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    SegmentAttentionBackward, segment_attention_backward,
    operands().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>());
