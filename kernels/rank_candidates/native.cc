// The device's ranking of one request on a CPU, as XLA custom calls. The contract is that of ../rank_candidates/reference.py.
//
// One request has no batch to fill threads or caches with: what counts is that the weights (a few hundred kilobytes) stream once from the
// second-level cache through the registers, that only real tokens are computed, and that the last layer computes its last token alone.

#include <cmath>
#include <type_traits>
#include <utility>

#include "../native.h"

namespace {

constexpr int64_t kPadding = 16;  // as in native.py: columns come in multiples of it, whatever the processor
constexpr float kLargest = 8.0f;  // standard deviations
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

typedef int8_t Codes __attribute__((vector_size(kLanes), aligned(1), may_alias));

inline int64_t padded(int64_t size) { return (size + kPadding - 1) / kPadding * kPadding; }

#if defined(__AVX512F__)
inline float sum(Vector x) { return _mm512_reduce_add_ps((__m512)x); }
inline float most(Vector x) { return _mm512_reduce_max_ps((__m512)x); }
#else
template <typename Pair>
inline float reduced(Vector x, Pair pair) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) x[lane] = pair(x[lane], x[lane + half]);
  return x[0];
}
inline float sum(Vector x) {
  return reduced(x, [](float a, float b) { return a + b; });
}
inline float most(Vector x) {
  return reduced(x, [](float a, float b) { return std::max(a, b); });
}
#endif

inline Vector silu(Vector x) { return x / (1.0f + exponential(-x)); }

// Memory of this thread for the call at hand, at the start of a cache line: a vector that crosses into the next one is read twice.
float* scratch_of(int64_t size) {
  static thread_local std::vector<float> memory;
  constexpr int64_t kLine = 64;
  if (int64_t(memory.size()) < size + kLine) memory.resize(size + kLine);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + kLine - 1) / kLine * kLine);
}

struct Rows {
  float* data;
  int64_t stride;
  float* operator[](int64_t row) const { return data + row * stride; }
};

template <int kRows, int kColumns>
void product_tile(Rows a, const float* b, int64_t b_stride, int64_t depth, Rows c, bool add) {
  Vector sums[kRows][kColumns] = {};
  for (int64_t x = 0; x < depth; ++x) {
    Vector row[kColumns];
    for (int j = 0; j < kColumns; ++j) row[j] = load(b + x * b_stride + j * kLanes);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j) sums[i][j] += row[j] * a.data[i * a.stride + x];
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) store(c[i] + j * kLanes, add ? load(c[i] + j * kLanes) + sums[i][j] : sums[i][j]);
}

template <int kColumns>
void product_columns(int64_t rows, Rows a, const float* b, int64_t b_stride, int64_t depth, Rows c, bool add) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    Rows left{a[i], a.stride}, right{c[i], c.stride};
    switch (std::min<int64_t>(rows - i, kTileRows)) {
      case 1: product_tile<1, kColumns>(left, b, b_stride, depth, right, add); break;
      case 2: product_tile<2, kColumns>(left, b, b_stride, depth, right, add); break;
      case 3: product_tile<3, kColumns>(left, b, b_stride, depth, right, add); break;
      case 4: product_tile<4, kColumns>(left, b, b_stride, depth, right, add); break;
      case 5: product_tile<5, kColumns>(left, b, b_stride, depth, right, add); break;
      default: product_tile<kTileRows, kColumns>(left, b, b_stride, depth, right, add);
    }
  }
}

// c = a b, or c += a b: a [rows, depth], b [depth, columns], columns a multiple of kPadding.
void product(int64_t rows, int64_t columns, int64_t depth, Rows a, const float* b, int64_t b_stride, Rows c, bool add = false) {
  int64_t j = 0;
  auto rest = [&](int vectors) { return columns - j >= vectors * kLanes; };
  auto at = [&] { return Rows{c.data + j, c.stride}; };
  // A single row has enough independent sums only across more columns.
  for (; rows == 1 && rest(8); j += 8 * kLanes) product_tile<1, 8>(a, b + j, b_stride, depth, at(), add);
  for (; rest(kTileColumns); j += kTileColumns * kLanes) product_columns<kTileColumns>(rows, a, b + j, b_stride, depth, at(), add);
  for (; rest(2); j += 2 * kLanes) product_columns<2>(rows, a, b + j, b_stride, depth, at(), add);
  for (; rest(1); j += kLanes) product_columns<1>(rows, a, b + j, b_stride, depth, at(), add);
}

struct Decoder {
  int64_t layers, width, heads, kv_heads, head_size, mlp_hidden, window;

  int64_t head() const { return padded(head_size); }
  int64_t x() const { return padded(width); }
  int64_t hidden() const { return padded(mlp_hidden); }
  int64_t queries() const { return heads * head(); }
  int64_t qkv() const { return (heads + 2 * kv_heads) * head(); }
  int64_t places() const { return padded(window); }
  int64_t layer_size() const { return width * qkv() + queries() * x() + width * 2 * hidden() + mlp_hidden * x(); }
};

// to = from / root mean square, by row; the scale of a norm is part of the weights that follow.
void normalise(const Decoder& d, int64_t first, int64_t last, Rows from, Rows to) {
  for (int64_t i = first; i < last; ++i) {
    Vector squares = {};
    for (int64_t x = 0; x < d.x(); x += kLanes) squares += load(from[i] + x) * load(from[i] + x);
    float inverse = 1.0f / std::sqrt(sum(squares) / d.width + 1e-6f);
    for (int64_t x = 0; x < d.x(); x += kLanes) store(to[i] + x, load(from[i] + x) * inverse);
  }
}

void rotate(float* head, const float* cosines, const float* sines, int64_t half) {
  for (int64_t x = 0; x < half; ++x) {
    float low = head[x], high = head[x + half];
    head[x] = low * cosines[x] - high * sines[x];
    head[x + half] = high * cosines[x] + low * sines[x];
  }
}

// Softmax of the first `count` scores, not yet divided by the sum that is returned; 0 in the padding after them.
float weigh(float* scores, int64_t count, int64_t columns) {
  std::fill(scores + count, scores + columns, -1e30f);
  Vector top = load(scores), total = {};
  for (int64_t j = kLanes; j < columns; j += kLanes) top = largest(top, load(scores + j));
  float peak = most(top);
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vector weight = exponential(load(scores + j) - peak);
    store(scores + j, weight), total += weight;
  }
  std::fill(scores + count, scores + columns, 0.0f);
  return sum(total);
}

// Rows [begin, end) of the new tokens, the first of which has position `first`, attend to all up to themselves.
void attend(const Decoder& d, int64_t first, int64_t begin, int64_t end, Rows qkv, const float* keys, const float* values,
            float* scratch, Rows mixed) {
  Rows scores{scratch, d.places()};
  for (int64_t head = 0; head < d.heads; ++head) {
    int64_t shared = head / (d.heads / d.kv_heads);
    const float *own_keys = keys + shared * d.head_size * d.places(), *own_values = values + shared * d.places() * d.head();
    for (int64_t row = begin; row < end; row += kTileRows) {
      int64_t rows = std::min<int64_t>(kTileRows, end - row), visible = first + row + rows;
      Rows out{mixed[row] + head * d.head(), mixed.stride};
      product(rows, padded(visible), d.head_size, {qkv[row] + head * d.head(), qkv.stride}, own_keys, d.places(), scores);
      float totals[kTileRows];
      for (int64_t i = 0; i < rows; ++i) totals[i] = weigh(scores[i], first + row + i + 1, padded(visible));
      product(rows, d.head(), visible, scores, own_values, d.head(), out);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t x = 0; x < d.head(); x += kLanes) store(out[i] + x, load(out[i] + x) / totals[i]);
    }
  }
}

// Keys [layer, kv head, channel, place] and values [layer, kv head, place, channel] of `count` tokens from place `first` on, and the
// hidden state of the last of them; NaN where they do not fit into the window, or are not among the `given` tokens.
void extend(const Decoder& d, const float* weights, const float* tokens, int64_t given, int64_t first, int64_t count, float* keys,
            float* values, float* state) {
  if (first < 0 || count < 1 || count > given || first + count > d.window) {
    std::fill_n(state, d.width, kNaN);
    return;
  }
  int64_t sizes[] = {count * d.x(), count * d.x(), count * d.qkv(), count * d.queries(), count * 2 * d.hidden(), kTileRows * d.places()};
  int64_t whole = 0;
  for (int64_t size : sizes) whole += size;
  float* free = scratch_of(whole);
  auto rows = [&](int which, int64_t stride) { return Rows{std::exchange(free, free + sizes[which]), stride}; };
  Rows x = rows(0, d.x()), normed = rows(1, d.x()), qkv = rows(2, d.qkv()), mixed = rows(3, d.queries());
  Rows gated = rows(4, 2 * d.hidden());
  float* scores = free;

  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(tokens + i * d.width, d.width, x[i]);
    std::fill(x[i] + d.width, x[i] + d.x(), 0.0f);
  }
  const float* final_norm = weights + d.layers * d.layer_size();
  const float *cosines = final_norm + d.width, *sines = cosines + d.window * (d.head_size / 2);
  int64_t half = d.head_size / 2;
  for (int64_t layer = 0; layer < d.layers; ++layer) {
    const float *to_qkv = weights + layer * d.layer_size(), *out = to_qkv + d.width * d.qkv();
    const float *gate_up = out + d.queries() * d.x(), *down = gate_up + d.width * 2 * d.hidden();
    float* own_keys = keys + layer * d.kv_heads * d.head_size * d.places();
    float* own_values = values + layer * d.kv_heads * d.places() * d.head();
    // Of the last layer only the last token's state is read; the others give keys and values.
    int64_t begin = layer + 1 < d.layers ? 0 : count - 1;
    normalise(d, 0, count, x, normed);
    product(count - begin, d.queries(), d.width, {normed[begin], normed.stride}, to_qkv, d.qkv(), {qkv[begin], qkv.stride});
    product(count, d.qkv() - d.queries(), d.width, normed, to_qkv + d.queries(), d.qkv(), {qkv.data + d.queries(), qkv.stride});
    for (int64_t i = 0; i < count; ++i) {
      int64_t place = first + i;
      const float *cosine = cosines + place * half, *sine = sines + place * half;
      for (int64_t head = 0; i >= begin && head < d.heads; ++head) rotate(qkv[i] + head * d.head(), cosine, sine, half);
      for (int64_t head = 0; head < d.kv_heads; ++head) {
        float *key = qkv[i] + (d.heads + head) * d.head(), *value = key + d.kv_heads * d.head();
        rotate(key, cosine, sine, half);
        for (int64_t c = 0; c < d.head_size; ++c) own_keys[(head * d.head_size + c) * d.places() + place] = key[c];
        std::copy_n(value, d.head(), own_values + (head * d.places() + place) * d.head());
      }
    }
    attend(d, first, begin, count, qkv, own_keys, own_values, scores, mixed);
    int64_t still = count - begin;
    Rows late{x[begin], x.stride}, late_normed{normed[begin], normed.stride}, late_gated{gated[begin], gated.stride};
    product(still, d.x(), d.queries(), {mixed[begin], mixed.stride}, out, d.x(), late, true);
    normalise(d, 0, still, late, late_normed);
    product(still, 2 * d.hidden(), d.width, late_normed, gate_up, 2 * d.hidden(), late_gated);
    for (int64_t i = 0; i < still; ++i)
      for (int64_t c = 0; c < d.hidden(); c += kLanes)
        store(late_gated[i] + c, silu(load(late_gated[i] + c)) * load(late_gated[i] + d.hidden() + c));
    product(still, d.x(), d.mlp_hidden, late_gated, down, d.x(), late, true);
  }
  normalise(d, count - 1, count, x, normed);
  for (int64_t c = 0; c < d.width; ++c) state[c] = normed[count - 1][c] * final_norm[c];
}

struct Head {
  const float *score_scale, *linear, *mean, *inverse_deviation, *moderators, *bias, *out, *hidden;
  const int32_t *gates, *moderating;
  int64_t features, num_moderating, units, score_feature;
};

// GCC takes __builtin_convertvector of bytes apart, number by number.
inline Vector widened(const int8_t* codes) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
#elif defined(__AVX2__)
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Codes*>(codes), Whole), Vector);
#endif
}

float inner_product(const int8_t* codes, const float* state, int64_t width) {
  Vector sums = {};
  int64_t x = 0;
  for (; x + kLanes <= width; x += kLanes) sums += widened(codes + x) * load(state + x);
  float product = sum(sums);
  for (; x < width; ++x) product += codes[x] * state[x];
  return product;
}

// sums += x W for kUnits columns of W: so many sums at a time, since each waits for its own last addition.
template <int kUnits>
inline void add_products(const Vector* known, int64_t features, const float* weights, int64_t stride, Vector* sums) {
  for (int64_t f = 0; f < features; ++f)
    for (int j = 0; j < kUnits; ++j) sums[j] += known[f] * weights[f * stride + j];
}

// result += silu(x W + bias) . out for kUnits units of the hidden layer from `unit` on.
template <int kUnits>
Vector hidden_units(const Head& head, const Vector* known, int64_t unit, Vector result) {
  Vector sums[kUnits];
  for (int j = 0; j < kUnits; ++j) sums[j] = Vector{} + head.bias[unit + j];
  add_products<kUnits>(known, head.features, head.hidden + unit, head.units, sums);
  for (int j = 0; j < kUnits; ++j) result += silu(sums[j]) * head.out[unit + j];
  return result;
}

// result += x[moderating] (x M) for kUnits moderating features from `place` on.
template <int kUnits>
Vector moderated(const Head& head, const Vector* known, int64_t place, Vector result) {
  Vector sums[kUnits] = {};
  add_products<kUnits>(known, head.features, head.moderators + place, head.num_moderating, sums);
  for (int j = 0; j < kUnits; ++j) result += sums[j] * known[head.moderating[place + j]];
  return result;
}

// The head, with one candidate in each lane.
void score(const Head& head, int64_t candidates, int64_t width, const float* state, const int8_t* vectors, const float* scales,
           const float* features, float* scores) {
  float* raw = scratch_of((2 * head.features + 1) * kLanes);
  Vector* known = reinterpret_cast<Vector*>(raw + (head.features + 1) * kLanes);
  std::fill_n(raw + head.features * kLanes, kLanes, 1.0f);
  float first_product = 0.0f;
  for (int64_t begin = 0; begin < candidates; begin += kLanes) {
    int64_t count = std::min<int64_t>(kLanes, candidates - begin);
    for (int64_t lane = 0; lane < count; ++lane) {
      float product = inner_product(vectors + (begin + lane) * width, state, width) * scales[begin + lane];
      if (begin + lane == 0) first_product = product;
      const float* own = features + (begin + lane) * head.features;
      for (int64_t f = 0; f < head.features; ++f) raw[f * kLanes + lane] = own[f];
      raw[head.score_feature * kLanes + lane] = (product - first_product) * *head.score_scale;
    }
    Vector result = {};
    for (int64_t f = 0; f < head.features; ++f) {
      Vector standard = cut((load(raw + f * kLanes) - head.mean[f]) * head.inverse_deviation[f], -kLargest, kLargest);
      known[f] = standard * load(raw + head.gates[f] * kLanes);
      result += known[f] * head.linear[f];
    }
    int64_t place = 0, unit = 0;  // six features moderate in the agents' head
    for (; place + 6 <= head.num_moderating; place += 6) result = moderated<6>(head, known, place, result);
    for (; place < head.num_moderating; ++place) result = moderated<1>(head, known, place, result);
    for (; unit + 8 <= head.units; unit += 8) result = hidden_units<8>(head, known, unit, result);
    for (; unit < head.units; ++unit) result = hidden_units<1>(head, known, unit, result);
    std::copy_n(reinterpret_cast<const float*>(&result), count, scores + begin);
  }
}

using Floats = ffi::Buffer<ffi::F32>;
using Wholes = ffi::Buffer<ffi::S32>;
using NewFloats = ffi::ResultBuffer<ffi::F32>;

Head head_of(const Floats& weights, const Wholes& gates, const Wholes& moderating, int64_t score_feature) {
  int64_t features = gates.element_count(), moderators = moderating.element_count();
  int64_t units = (int64_t(weights.element_count()) - 1 - (3 + moderators) * features) / (features + 2);
  const float *scale = weights.typed_data(), *linear = scale + 1, *mean = linear + features, *inverse = mean + features;
  const float *by = inverse + features, *bias = by + moderators * features, *out = bias + units;
  return {scale, linear, mean, inverse, by, bias, out, out + units, gates.typed_data(), moderating.typed_data(),
          features, moderators, units, score_feature};
}

ffi::Error extend_history(int64_t heads, int64_t head_size, int64_t mlp_hidden, int64_t window, Floats weights, Floats keys,
                          Floats values, Wholes length, Floats tokens, Wholes count, NewFloats new_keys, NewFloats new_values,
                          NewFloats state) {
  Decoder d{keys.dimensions()[0], tokens.dimensions()[1], heads, keys.dimensions()[1], head_size, mlp_hidden, window};
  extend(d, weights.typed_data(), tokens.typed_data(), tokens.dimensions()[0], length.typed_data()[0], count.typed_data()[0],
         new_keys->typed_data(), new_values->typed_data(), state->typed_data());
  return ffi::Error::Success();
}

ffi::Error score_candidates(int64_t score_feature, Floats weights, Wholes gates, Wholes moderating, Floats state,
                            ffi::Buffer<ffi::S8> vectors, Floats scales, Floats features, NewFloats scores) {
  Head head = head_of(weights, gates, moderating, score_feature);
  score(head, features.dimensions()[0], vectors.dimensions()[1], state.typed_data(), vectors.typed_data(), scales.typed_data(),
        features.typed_data(), scores->typed_data());
  return ffi::Error::Success();
}

// Both, of one array: first place, number of tokens, tokens, scales, features, codes. The cache is where `new_cache` is; the argument
// is there to be aliased with it.
ffi::Error rank_request(int64_t layers, int64_t width, int64_t heads, int64_t kv_heads, int64_t head_size, int64_t mlp_hidden,
                        int64_t window, int64_t score_feature, int64_t num_tokens, int64_t candidates, Floats weights,
                        Floats head_weights, Wholes gates, Wholes moderating, Floats cache, Floats request, NewFloats new_cache,
                        NewFloats scores) {
  Decoder d{layers, width, heads, kv_heads, head_size, mlp_hidden, window};
  const float *header = request.typed_data(), *tokens = header + 2, *scales = tokens + num_tokens * width;
  const float *features = scales + candidates, *codes = features + candidates * int64_t(gates.element_count());
  float *keys = new_cache->typed_data(), *values = keys + layers * kv_heads * head_size * d.places();
  std::vector<float> state(d.x());
  extend(d, weights.typed_data(), tokens, num_tokens, int64_t(header[0]), int64_t(header[1]), keys, values, state.data());
  Head head = head_of(head_weights, gates, moderating, score_feature);
  score(head, candidates, width, state.data(), reinterpret_cast<const int8_t*>(codes), scales, features, scores->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ExtendHistory, extend_history,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("heads")
                                  .Attr<int64_t>("head_size")
                                  .Attr<int64_t>("mlp_hidden")
                                  .Attr<int64_t>("window")
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Wholes>()
                                  .Arg<Floats>()
                                  .Arg<Wholes>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ScoreCandidates, score_candidates,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("score_feature")
                                  .Arg<Floats>()
                                  .Arg<Wholes>()
                                  .Arg<Wholes>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RankRequest, rank_request,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("layers")
                                  .Attr<int64_t>("width")
                                  .Attr<int64_t>("heads")
                                  .Attr<int64_t>("kv_heads")
                                  .Attr<int64_t>("head_size")
                                  .Attr<int64_t>("mlp_hidden")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("score_feature")
                                  .Attr<int64_t>("num_tokens")
                                  .Attr<int64_t>("candidates")
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Wholes>()
                                  .Arg<Wholes>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
