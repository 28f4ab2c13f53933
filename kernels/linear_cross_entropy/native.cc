// Loss and gradients of the next item on a CPU, as an XLA custom call. The contract is that of ../linear_cross_entropy/reference.py.
//
// The logits of one chunk of tokens exist at a time. They are made, made exponentials, and used for both gradients in blocks of items
// that fit into the second-level cache; only the sums over all items stand between, so that each thread goes over its items twice a
// chunk. All three products are sums in registers, and both gradients are added up in place: what XLA's chunked version spends beside its
// products (a copy of the items' gradient for every chunk, passes over logits in memory) does not happen.

#include <cmath>

#include "../native.h"

namespace {

constexpr int64_t kBlockItems = 21 * kTileRows;

// How `multiply` wants its right side [depth, columns]: panels of kPanel columns one after the other (and a last one of what remains), each
// [depth, its columns]. A panel stays in the first-level cache, whose sets its lines share evenly, while all rows pass over it.
constexpr int64_t kPanel = kTileColumns * kLanes;

// The `x`-th row of a right side, a scaled copy of `from`.
inline void pack_row(const float* from, float scale, int64_t x, int64_t depth, int64_t columns, float* panels) {
  for (int64_t start = 0; start < columns; start += kPanel) {
    int64_t panel = std::min(kPanel, columns - start);
    for (int64_t c = 0; c < panel; c += kLanes) store(panels + start * depth + x * panel + c, scale * load(from + start + c));
  }
}

template <int kColumns, typename Put>
inline void multiply_columns(const float* a, int64_t row_stride, int64_t step, int64_t rows, int64_t depth, const float* b,
                             int64_t b_stride, float* out, int64_t out_stride, Put put) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    // What this tile goes to, and what the next one is made of, come while this one is made.
    for (int64_t r = row; r < std::min(row + kTileRows, rows); ++r)
      for (int c = 0; c < kColumns; ++c) __builtin_prefetch(out + r * out_stride + c * kLanes, 1);
    const float* next = a + (row + kTileRows) * row_stride;
    for (int64_t x = 0; step == 1 && row + 2 * kTileRows <= rows && x < kTileRows * row_stride; x += 16) __builtin_prefetch(next + x);
    Vector tile[kTileRows][kColumns];
    multiply_tile<kColumns>(a + row * row_stride, row_stride, step, rows - row, depth, b, b_stride, tile);
    for (int64_t r = 0; r < std::min<int64_t>(kTileRows, rows - row); ++r)
      for (int c = 0; c < kColumns; ++c) put(out + (row + r) * out_stride + c * kLanes, row + r, tile[r][c]);
  }
}

// Calls put(place in `out`, row, vector) for every vector of a b, where a[r, x] is a[r * row_stride + x * step], and b is in panels.
template <typename Put>
void multiply(const float* a, int64_t row_stride, int64_t step, int64_t rows, int64_t depth, const float* panels, int64_t columns,
              float* out, Put put) {
  for (int64_t start = 0; start < columns; start += kPanel) {
    int64_t panel = std::min(kPanel, columns - start), column = 0;
    const float* b = panels + start * depth;
    for (; column + kPanel <= panel; column += kPanel)
      multiply_columns<kTileColumns>(a, row_stride, step, rows, depth, b + column, panel, out + start + column, columns, put);
    for (; column + kPanel / 2 <= panel; column += kPanel / 2)
      multiply_columns<kTileColumns / 2>(a, row_stride, step, rows, depth, b + column, panel, out + start + column, columns, put);
    for (; column < panel; column += kLanes)
      multiply_columns<1>(a, row_stride, step, rows, depth, b + column, panel, out + start + column, columns, put);
  }
}

// One chunk of tokens against all items. `scratch` has room for its exponentials, [items, tokens].
struct Chunk {
  Chunk(const float* hidden, const float* items, int64_t num_rows, int64_t width, int64_t size, int64_t pieces, float* scratch)
      : hidden(hidden), items(items), num_rows(num_rows), width(width), size(size), exponentials(scratch),
        num_blocks((num_rows - 1 + kBlockItems - 1) / kBlockItems), num_pieces(std::min(pieces, num_blocks)), transposed(size * width),
        maxima(num_blocks * size), sums(num_blocks * size), greatest(size), totals(size), d_hidden(num_pieces * size * width),
        scaled(num_pieces * size * width), packed(num_pieces * kBlockItems * width), scales(num_pieces * size) {}

  // Row 0 is no item.
  int64_t begin(int64_t block) const { return 1 + block * kBlockItems; }
  int64_t end(int64_t block) const { return std::min(begin(block + 1), num_rows); }
  int64_t first_block(int64_t piece) const { return piece * num_blocks / num_pieces; }

  // Token j of the chunk is tokens[j]; those from `count` on are padding, of weight 0.
  void take(const int32_t* tokens, const float* weights, int64_t count) {
    this->tokens = tokens, this->weights = weights, this->count = count;
    std::fill_n(transposed.data(), width * size, 0.0f);
    for (int64_t j = 0; j < count; ++j) {
      float* to = transposed.data() + j / kPanel * width * kPanel + j % kPanel;
      for (int64_t x = 0; x < width; ++x) to[x * kPanel] = hidden[tokens[j] * width + x];
    }
  }

  // Exponentials of the logits minus the block's own maximum for each token, and their sums.
  void exponentiate(int64_t block) {
    int64_t first = begin(block), rows = end(block) - first;
    float *out = exponentials + (first - 1) * size, *most = maxima.data() + block * size, *sum = sums.data() + block * size;
    std::fill_n(most, size, -kInfinity);
    multiply(items + first * width, width, 1, rows, width, transposed.data(), size, out, [&](float* at, int64_t, Vector logits) {
      store(at, logits);
      float* of_tokens = most + (at - out) % size;
      store(of_tokens, largest(logits, load(of_tokens)));
    });
    for (int64_t column = 0; column < size; column += kLanes) {
      Vector total = {}, shift = load(most + column);
      for (int64_t row = 0; row < rows; ++row) {
        float* at = out + row * size + column;
        Vector value = exponential(load(at) - shift);
        store(at, value);
        total += value;
      }
      store(sum + column, total);
    }
  }

  // Of each token the greatest logit m, and sum_i exp(logit_i - m). Their logarithm together, m + log(sum), would round where m is large.
  void normalise() {
    for (int64_t column = 0; column < size; column += kLanes) {
      Vector most = Vector{} - kInfinity, total = {};
      for (int64_t block = 0; block < num_blocks; ++block) most = largest(load(maxima.data() + block * size + column), most);
      for (int64_t block = 0; block < num_blocks; ++block)
        total += load(sums.data() + block * size + column) * exponential(load(maxima.data() + block * size + column) - most);
      store(greatest.data() + column, most);
      store(totals.data() + column, total);
    }
  }

  // Adds to the gradients of the hidden states (those of this piece) and of the items, which are set if they are `new_items`.
  void differentiate(int64_t piece, float* d_items, bool new_items) {
    float *scale = scales.data() + piece * size, *own = d_hidden.data() + piece * size * width;
    float *states = scaled.data() + piece * size * width, *vectors = packed.data() + piece * kBlockItems * width;
    std::fill_n(own, size * width, 0.0f);
    for (int64_t block = first_block(piece); block < first_block(piece + 1); ++block) {
      int64_t first = begin(block), rows = end(block) - first;
      const float* weighted = exponentials + (first - 1) * size;
      // Scaling the narrow sides leaves the wide softmax unnormalised.
      for (int64_t column = 0; column < size; column += kLanes)
        store(scale + column, exponential(load(maxima.data() + block * size + column) - load(greatest.data() + column)) /
                                  load(totals.data() + column));
      for (int64_t j = 0; j < size; ++j) {
        scale[j] = j < count ? weights[tokens[j]] * scale[j] : 0.0f;
        pack_row(hidden + tokens[j < count ? j : 0] * width, scale[j], j, size, width, states);
      }
      for (int64_t row = 0; row < rows; ++row) pack_row(items + (first + row) * width, 1.0f, row, rows, width, vectors);
      multiply(weighted, size, 1, rows, size, states, width, d_items + first * width,
               [&](float* at, int64_t, Vector sum) { store(at, new_items ? sum : load(at) + sum); });
      multiply(weighted, 1, size, count, rows, vectors, width, own,
               [&](float* at, int64_t token, Vector sum) { store(at, load(at) + scale[token] * sum); });
    }
  }

  const float *hidden, *items;
  int64_t num_rows, width, size;
  float* exponentials;
  int64_t num_blocks, num_pieces;
  Lines<float> transposed, maxima, sums, greatest, totals, d_hidden, scaled, packed, scales;
  const int32_t* tokens = nullptr;
  const float* weights = nullptr;
  int64_t count = 0;
};

// Results: the loss of each token without its weight (0 where the target is 0), and the gradients of the weighted sum. Of `scratch` the
// dimensions say how many tokens a chunk has; it is memory that XLA plans for.
ffi::Error linear_cross_entropy(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> hidden_states, ffi::Buffer<ffi::F32> item_vectors,
                                ffi::Buffer<ffi::S32> target_items, ffi::Buffer<ffi::F32> token_weights,
                                ffi::ResultBuffer<ffi::F32> losses, ffi::ResultBuffer<ffi::F32> d_hidden, ffi::ResultBuffer<ffi::F32> d_items,
                                ffi::ResultBuffer<ffi::F32> scratch) {
  const float *hidden = hidden_states.typed_data(), *items = item_vectors.typed_data(), *weights = token_weights.typed_data();
  const int32_t* targets = target_items.typed_data();
  int64_t num_tokens = hidden_states.dimensions()[0], width = hidden_states.dimensions()[1], num_rows = item_vectors.dimensions()[0];
  int64_t most_tokens = scratch->dimensions()[1];
  float *loss = losses->typed_data(), *to_hidden = d_hidden->typed_data(), *to_items = d_items->typed_data();
  std::fill_n(loss, num_tokens, 0.0f);
  std::fill_n(to_hidden, num_tokens * width, 0.0f);
  std::vector<int32_t> tokens;
  for (int64_t t = 0; t < num_tokens; ++t)
    if (targets[t] > 0) tokens.push_back(t);
  int64_t count = tokens.size(), num_chunks = (count + most_tokens - 1) / most_tokens;
  if (num_chunks == 0) {
    std::fill_n(to_items, num_rows * width, 0.0f);
    return ffi::Error::Success();
  }
  std::fill_n(to_items, width, 0.0f);
  // Equal chunks have the least padding.
  int64_t each = ((count + num_chunks - 1) / num_chunks + kPanel - 1) / kPanel * kPanel;
  Chunk chunk(hidden, items, num_rows, width, each, 2 * std::max<int64_t>(1, pool.num_threads()), scratch->typed_data());
  for (int64_t start = 0; start < count; start += each) {
    const int32_t* taken = tokens.data() + start;
    chunk.take(taken, weights, std::min(each, count - start));
    run_pieces(pool, chunk.num_pieces, [&](int64_t piece) {
      for (int64_t block = chunk.first_block(piece); block < chunk.first_block(piece + 1); ++block) chunk.exponentiate(block);
    });
    chunk.normalise();
    run_pieces(pool, chunk.num_pieces, [&](int64_t piece) { chunk.differentiate(piece, to_items, start == 0); });
    for (int64_t j = 0; j < chunk.count; ++j) {
      int64_t t = taken[j], target = std::min<int64_t>(targets[t], num_rows - 1);
      const float *state = hidden + t * width, *item = items + target * width;
      float logit = 0.0f;
      for (int64_t x = 0; x < width; ++x) {
        float gradient = 0.0f;
        for (int64_t piece = 0; piece < chunk.num_pieces; ++piece) gradient += chunk.d_hidden.data()[(piece * each + j) * width + x];
        to_hidden[t * width + x] = gradient - weights[t] * item[x];
        logit += state[x] * item[x];
      }
      loss[t] = std::log(chunk.totals.data()[j]) + (chunk.greatest.data()[j] - logit);
    }
  }
  for (int32_t t : tokens) {
    if (targets[t] >= num_rows) continue;  // is not detected, and must not write past the items
    for (int64_t x = 0; x < width; ++x) to_items[targets[t] * width + x] -= weights[t] * hidden[t * width + x];
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(LinearCrossEntropy, linear_cross_entropy,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
