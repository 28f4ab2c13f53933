// Loss and gradients of the next item on a CPU, as an XLA custom call. The contract is that of ../linear_cross_entropy/reference.py.
//
// The logits of one chunk of tokens exist at a time. They are made, made exponentials, and used for both gradients in blocks of items
// that fit into the second-level cache; only the sums over all items stand between, so that each thread goes over its items twice a
// chunk. All three products are sums in registers, and both gradients are added up in place: what XLA's chunked version spends beside its
// products (a copy of the items' gradient for every chunk, passes over logits in memory) does not happen.
//
// The variant with sampled items (../linear_cross_entropy/sampled.py) has the same chunks of tokens; its items are the sampled ones. Of
// each token it leaves out the rows that are its own target, whose logit is given, and is a term of its sum.
//
// Where the processor has a matrix unit, all three products are made there, of operands split in two (see ../matrix_unit.h), unless
// `exact` forbids it.

#include <cmath>

#include "../matrix_unit.h"

namespace {

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

// A logit below it is that of a row that is left out: LEFT_OUT of sampled.py, however its product was rounded.
constexpr float kLeftOut = -1e30f, kBelowIsLeftOut = 0.5f * kLeftOut;

// What the variant with sampled items has of each token: the rows that are its target (from -1 on without a target), and the logit of it.
struct Sampled {
  const int32_t* hits = nullptr;
  const float* target_logits = nullptr;
};

// One chunk of tokens against all items. `scratch` has room for its exponentials, [items, tokens].
class Chunk {
 public:
  Chunk(const float* hidden, const float* items, int64_t num_rows, int64_t width, int64_t size, int64_t pieces, float* scratch,
        int64_t block_items, int64_t token_stride, int64_t channel_stride)
      : hidden(hidden), items(items), num_rows(num_rows), width(width), size(size), block_items(block_items),
        token_stride(token_stride), channel_stride(channel_stride), exponentials(scratch),
        num_blocks((num_rows - 1 + block_items - 1) / block_items), num_pieces(std::min(pieces, num_blocks)), maxima(num_blocks * size),
        sums(num_blocks * size), greatest(size), totals(size), d_hidden(num_pieces * size * width), scales(num_pieces * size),
        target_logits(size) {}
  virtual ~Chunk() = default;

  // Token j of the chunk is tokens[j]; those from `count` on are padding, of weight 0.
  void take(const int32_t* tokens, const float* weights, int64_t count) {
    this->tokens = tokens, this->weights = weights, this->count = count;
    for (int64_t j = 0; sampled.hits && j < size; ++j) target_logits.data()[j] = j < count ? sampled.target_logits[tokens[j]] : 0.0f;
    pack();
  }

  // Exponentials of the logits minus the block's own maximum for each token, and their sums.
  void exponentiate(int64_t piece) {
    for (int64_t block = first_block(piece); block < first_block(piece + 1); ++block) {
      float *out = weighted(block), *most = maxima.data() + block * size, *sum = sums.data() + block * size;
      std::fill_n(most, size, -kInfinity);
      make_logits(piece, block, out, most);
      if (sampled.hits) leave_out_hits(block, out);
      for (int64_t column = 0; column < size; column += kLanes)
        store(sum + column, sampled.hits ? exponentials_of<true>(out + column, rows(block), load(most + column))
                                         : exponentials_of<false>(out + column, rows(block), load(most + column)));
    }
  }

  // Of each token the greatest logit m, and sum_i exp(logit_i - m). Their logarithm together, m + log(sum), would round where m is large.
  void normalise() {
    for (int64_t column = 0; column < size; column += kLanes) {
      Vector most = sampled.hits ? load(target_logits.data() + column) : Vector{} - kInfinity, total = {};
      for (int64_t block = 0; block < num_blocks; ++block) most = largest(load(maxima.data() + block * size + column), most);
      if (sampled.hits) total = exponential(load(target_logits.data() + column) - most);
      for (int64_t block = 0; block < num_blocks; ++block)
        total += load(sums.data() + block * size + column) * exponential(load(maxima.data() + block * size + column) - most);
      store(greatest.data() + column, most);
      store(totals.data() + column, total);
    }
  }

  // Adds to the gradients of the hidden states (those of this piece) and of the items, which are set if they are `new_items`.
  void differentiate(int64_t piece, float* d_items, bool new_items) {
    float* scale = scales.data() + piece * size;
    std::fill_n(d_hidden.data() + piece * size * width, size * width, 0.0f);
    for (int64_t block = first_block(piece); block < first_block(piece + 1); ++block) {
      // What turns a block's exponentials of one token into its part of the gradient.
      for (int64_t column = 0; column < size; column += kLanes)
        store(scale + column, exponential(load(maxima.data() + block * size + column) - load(greatest.data() + column)) /
                                  load(totals.data() + column));
      for (int64_t j = 0; j < size; ++j) scale[j] = j < count ? weights[tokens[j]] * scale[j] : 0.0f;
      add_gradients(piece, block, scale, d_items + begin(block) * width, new_items);
    }
  }

  // Part x of token j's gradient, but for what its target adds.
  float gradient(int64_t j, int64_t x) {
    float sum = 0.0f;
    for (int64_t piece = 0; piece < num_pieces; ++piece) sum += d_hidden.data()[piece * size * width + j * token_stride + x * channel_stride];
    return sum;
  }

  const float *hidden, *items;
  int64_t num_rows, width, size, block_items;
  int64_t token_stride, channel_stride;  // of the gradients of the hidden states
  float* exponentials;
  int64_t num_blocks, num_pieces;
  Lines<float> maxima, sums, greatest, totals, d_hidden, scales, target_logits;
  Sampled sampled;
  const int32_t* tokens = nullptr;
  const float* weights = nullptr;
  int64_t count = 0;

 protected:
  // Row 0 is no item.
  int64_t begin(int64_t block) const { return 1 + block * block_items; }
  int64_t rows(int64_t block) const { return std::min(begin(block + 1), num_rows) - begin(block); }
  int64_t first_block(int64_t piece) const { return piece * num_blocks / num_pieces; }
  float* weighted(int64_t block) const { return exponentials + (begin(block) - 1) * size; }
  const float* state(int64_t j) const { return hidden + tokens[j] * width; }

  // A block's greatest logit may be that of a hit: it is only a shift, and above the target's own by no more than the row's offset.
  void leave_out_hits(int64_t block, float* out) const {
    for (int64_t j = 0; j < count; ++j) {
      const int32_t* range = sampled.hits + 2 * tokens[j];
      int64_t last = std::min<int64_t>(range[1], begin(block) + rows(block));
      for (int64_t row = std::max<int64_t>(range[0], begin(block)); row < last; ++row) out[(row - begin(block)) * size + j] = kLeftOut;
    }
  }

  // Makes the logits of some tokens, a column, their exponentials less the shift (0 where they are left out), and gives the sums.
  template <bool kSampled>
  Vector exponentials_of(float* column, int64_t num_rows, Vector shift) const {
    Vector total = {};
    for (int64_t row = 0; row < num_rows; ++row) {
      float* at = column + row * size;
      Vector logits = load(at), value = exponential(logits - shift);
      if constexpr (kSampled) value = logits < kBelowIsLeftOut ? Vector{} : value;
      store(at, value);
      total += value;
    }
    return total;
  }

  // What all blocks take of the tokens.
  virtual void pack() = 0;
  // The logits of a block, and in `most` the greatest of each token.
  virtual void make_logits(int64_t piece, int64_t block, float* out, float* most) = 0;
  // With p = scale * exponentials of a block: d_items (+)= p hidden, and the piece's d_hidden += p^T items.
  virtual void add_gradients(int64_t piece, int64_t block, const float* scale, float* d_items, bool new_items) = 0;
};

// With products of vectors.
class VectorChunk : public Chunk {
 public:
  VectorChunk(const float* hidden, const float* items, int64_t num_rows, int64_t width, int64_t size, int64_t pieces, float* scratch)
      : Chunk(hidden, items, num_rows, width, size, pieces, scratch, kBlockItems, width, 1), transposed_(size * width),
        scaled_(num_pieces * size * width), packed_(num_pieces * kBlockItems * width) {}

 private:
  static constexpr int64_t kBlockItems = 21 * kTileRows;

  void pack() override {
    std::fill_n(transposed_.data(), width * size, 0.0f);
    for (int64_t j = 0; j < count; ++j) {
      float* to = transposed_.data() + j / kPanel * width * kPanel + j % kPanel;
      for (int64_t x = 0; x < width; ++x) to[x * kPanel] = state(j)[x];
    }
  }

  void make_logits(int64_t, int64_t block, float* out, float* most) override {
    multiply(items + begin(block) * width, width, 1, rows(block), width, transposed_.data(), size, out,
             [&](float* at, int64_t, Vector logits) {
               store(at, logits);
               float* of_tokens = most + (at - out) % size;
               store(of_tokens, largest(logits, load(of_tokens)));
             });
  }

  // Scaling the narrow sides leaves the wide softmax unnormalised.
  void add_gradients(int64_t piece, int64_t block, const float* scale, float* d_items, bool new_items) override {
    float *states = scaled_.data() + piece * size * width, *vectors = packed_.data() + piece * kBlockItems * width;
    for (int64_t j = 0; j < size; ++j) pack_row(state(j < count ? j : 0), scale[j], j, size, width, states);
    for (int64_t row = 0; row < rows(block); ++row)
      pack_row(items + (begin(block) + row) * width, 1.0f, row, rows(block), width, vectors);
    multiply(weighted(block), size, 1, rows(block), size, states, width, d_items,
             [&](float* at, int64_t, Vector sum) { store(at, new_items ? sum : load(at) + sum); });
    multiply(weighted(block), 1, size, count, rows(block), vectors, width, d_hidden.data() + piece * size * width,
             [&](float* at, int64_t token, Vector sum) { store(at, load(at) + scale[token] * sum); });
  }

  Lines<float> transposed_, scaled_, packed_;
};

#if CDA4REC_MATRIX_UNIT
// With products of the matrix unit. The gradients of the hidden states are [width, tokens].
class MatrixChunk : public Chunk {
 public:
  MatrixChunk(const float* hidden, const float* items, int64_t num_rows, int64_t width, int64_t size, int64_t pieces, float* scratch)
      : Chunk(hidden, items, num_rows, width, size, pieces, scratch, kBlockItems, 1, size), states_(side_size(size, width)),
        states_of_tokens_(side_size(width, size)), left_(num_pieces * left_size()), right_(num_pieces * right_size()) {}

 private:
  static constexpr int64_t kBlockItems = 8 * kUnit;

  int64_t left_size() const { return std::max(side_size(kBlockItems, std::max(width, size)), side_size(width, kBlockItems)); }
  int64_t right_size() const { return side_size(size, kBlockItems); }

  void pack() override {
    std::vector<float> gathered(size * width);
    for (int64_t j = 0; j < count; ++j) std::copy_n(state(j), width, &gathered[j * width]);
    auto vector = [&](int64_t j, int64_t x) { return load(&gathered[j * width + x]); };
    pack_right(size, width, vector, states_of_tokens_.data());
    // As a right side of [width, tokens].
    pack_left(size, width, vector, states_.data());
    transpose_side(states_.data(), side_size(size, width));
  }

  void make_logits(int64_t piece, int64_t block, float* out, float* most) override {
    MatrixUnit unit;
    uint32_t* left = left_.data() + piece * left_size();
    const float* vectors = items + begin(block) * width;
    pack_left(rows(block), width, [&](int64_t row, int64_t x) { return load(vectors + row * width + x); }, left);
    multiply_rows(left, states_.data(), rows(block), size, width, out, false);
    for (int64_t column = 0; column < size; column += kLanes) {
      Vector greatest = load(most + column);
      for (int64_t row = 0; row < rows(block); ++row) greatest = largest(load(out + row * size + column), greatest);
      store(most + column, greatest);
    }
  }

  void add_gradients(int64_t piece, int64_t block, const float* scale, float* d_items, bool new_items) override {
    MatrixUnit unit;
    uint32_t *left = left_.data() + piece * left_size(), *right = right_.data() + piece * right_size();
    const float *vectors = items + begin(block) * width, *exponentials = weighted(block);
    auto softmax = [&](int64_t row, int64_t j) { return load(exponentials + row * size + j) * load(scale + j); };
    pack_left(rows(block), size, softmax, left);
    multiply_rows(left, states_of_tokens_.data(), rows(block), width, size, d_items, !new_items);
    pack_right(rows(block), size, softmax, right);
    pack_transposed(rows(block), width, [&](int64_t row, int64_t x) { return load(vectors + row * width + x); }, left);
    multiply_sides(left, right, width, size, rows(block), d_hidden.data() + piece * size * width, size, true);
  }

  // As `multiply_sides`, where the rows of the last block end within a tile.
  void multiply_rows(const uint32_t* left, const uint32_t* right, int64_t rows, int64_t columns, int64_t depth, float* out, bool add) {
    int64_t whole = rows / kUnit * kUnit, rest = rows - whole;
    multiply_sides(left, right, whole, columns, depth, out, columns, add);
    if (rest == 0) return;
    Lines<float> tile(kUnit * columns);
    float* last = out + whole * columns;
    if (add) std::copy_n(last, rest * columns, tile.data());
    multiply_sides(left + side_size(whole, depth), right, kUnit, columns, depth, tile.data(), columns, add);
    std::copy_n(tile.data(), rest * columns, last);
  }

  Lines<uint32_t> states_, states_of_tokens_, left_, right_;
};
#endif

std::unique_ptr<Chunk> make_chunk(bool exact, const float* hidden, const float* items, int64_t num_rows, int64_t width, int64_t size,
                                  int64_t pieces, float* scratch) {
#if CDA4REC_MATRIX_UNIT
  if (!exact && has_matrix_unit()) return std::make_unique<MatrixChunk>(hidden, items, num_rows, width, size, pieces, scratch);
#endif
  return std::make_unique<VectorChunk>(hidden, items, num_rows, width, size, pieces, scratch);
}

// The gradients of all tokens in `order` but for what their targets add. Calls put(token, its place in the chunk) when one is done.
template <typename Put>
void go_over(ffi::ThreadPool& pool, Chunk& chunk, const std::vector<int32_t>& order, int64_t each, const float* weights, float* to_items,
             Put put) {
  int64_t count = order.size();
  for (int64_t start = 0; start < count; start += each) {
    const int32_t* taken = order.data() + start;
    chunk.take(taken, weights, std::min(each, count - start));
    run_pieces(pool, chunk.num_pieces, [&](int64_t piece) { chunk.exponentiate(piece); });
    chunk.normalise();
    run_pieces(pool, chunk.num_pieces, [&](int64_t piece) { chunk.differentiate(piece, to_items, start == 0); });
    for (int64_t j = 0; j < chunk.count; ++j) put(taken[j], j);
  }
}

// Equal chunks have the least padding.
int64_t chunk_of(int64_t count, int64_t most_tokens) {
  int64_t num_chunks = (count + most_tokens - 1) / most_tokens;
  return ((count + num_chunks - 1) / num_chunks + kPanel - 1) / kPanel * kPanel;
}

// Results: the loss of each token without its weight (0 where the target is 0), and the gradients of the weighted sum. Of `scratch` the
// dimensions say how many tokens a chunk has; it is memory that XLA plans for. `exact`: operands of products keep all their bits.
ffi::Error linear_cross_entropy(ffi::ThreadPool pool, bool exact, ffi::Buffer<ffi::F32> hidden_states, ffi::Buffer<ffi::F32> item_vectors,
                                ffi::Buffer<ffi::S32> target_items, ffi::Buffer<ffi::F32> token_weights,
                                ffi::ResultBuffer<ffi::F32> losses, ffi::ResultBuffer<ffi::F32> d_hidden, ffi::ResultBuffer<ffi::F32> d_items,
                                ffi::ResultBuffer<ffi::F32> scratch) {
  const float *hidden = hidden_states.typed_data(), *items = item_vectors.typed_data(), *weights = token_weights.typed_data();
  const int32_t* targets = target_items.typed_data();
  int64_t num_tokens = hidden_states.dimensions()[0], width = hidden_states.dimensions()[1], num_rows = item_vectors.dimensions()[0];
  float *loss = losses->typed_data(), *to_hidden = d_hidden->typed_data(), *to_items = d_items->typed_data();
  std::fill_n(loss, num_tokens, 0.0f);
  std::fill_n(to_hidden, num_tokens * width, 0.0f);
  std::vector<int32_t> tokens;
  for (int64_t t = 0; t < num_tokens; ++t)
    if (targets[t] > 0) tokens.push_back(t);
  if (tokens.empty()) {
    std::fill_n(to_items, num_rows * width, 0.0f);
    return ffi::Error::Success();
  }
  std::fill_n(to_items, width, 0.0f);
  int64_t each = chunk_of(tokens.size(), scratch->dimensions()[1]), pieces = 2 * std::max<int64_t>(1, pool.num_threads());
  std::unique_ptr<Chunk> chunk = make_chunk(exact, hidden, items, num_rows, width, each, pieces, scratch->typed_data());
  go_over(pool, *chunk, tokens, each, weights, to_items, [&](int64_t t, int64_t j) {
    int64_t target = std::min<int64_t>(targets[t], num_rows - 1);
    const float *state = hidden + t * width, *item = items + target * width;
    float logit = 0.0f;
    for (int64_t x = 0; x < width; ++x) {
      to_hidden[t * width + x] = chunk->gradient(j, x) - weights[t] * item[x];
      logit += state[x] * item[x];
    }
    loss[t] = std::log(chunk->totals.data()[j]) + (chunk->greatest.data()[j] - logit);
  });
  for (int32_t t : tokens) {
    if (targets[t] >= num_rows) continue;  // is not detected, and must not write past the items
    for (int64_t x = 0; x < width; ++x) to_items[targets[t] * width + x] -= weights[t] * hidden[t * width + x];
  }
  return ffi::Error::Success();
}

// The same of sampled rows: `hits` [tokens, 2] and `logits` of the targets as in `Sampled`. The gradients are those through the rows alone.
ffi::Error sampled_cross_entropy(ffi::ThreadPool pool, bool exact, ffi::Buffer<ffi::F32> hidden_states, ffi::Buffer<ffi::F32> sampled_rows,
                                 ffi::Buffer<ffi::S32> hits, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::F32> token_weights,
                                 ffi::ResultBuffer<ffi::F32> losses, ffi::ResultBuffer<ffi::F32> d_hidden, ffi::ResultBuffer<ffi::F32> d_rows,
                                 ffi::ResultBuffer<ffi::F32> scratch) {
  const float *hidden = hidden_states.typed_data(), *weights = token_weights.typed_data();
  Sampled sampled{hits.typed_data(), logits.typed_data()};
  int64_t num_tokens = hidden_states.dimensions()[0], width = hidden_states.dimensions()[1], num_rows = sampled_rows.dimensions()[0];
  float *loss = losses->typed_data(), *to_hidden = d_hidden->typed_data(), *to_rows = d_rows->typed_data();
  std::fill_n(loss, num_tokens, 0.0f);
  std::fill_n(to_hidden, num_tokens * width, 0.0f);
  std::vector<int32_t> tokens;
  for (int64_t t = 0; t < num_tokens; ++t)
    if (sampled.hits[2 * t] >= 0) tokens.push_back(t);
  if (tokens.empty()) {
    std::fill_n(to_rows, num_rows * width, 0.0f);
    return ffi::Error::Success();
  }
  std::fill_n(to_rows, width, 0.0f);
  int64_t each = chunk_of(tokens.size(), scratch->dimensions()[1]), pieces = 2 * std::max<int64_t>(1, pool.num_threads());
  std::unique_ptr<Chunk> chunk =
      make_chunk(exact, hidden, sampled_rows.typed_data(), num_rows, width, each, pieces, scratch->typed_data());
  chunk->sampled = sampled;
  go_over(pool, *chunk, tokens, each, weights, to_rows, [&](int64_t t, int64_t j) {
    for (int64_t x = 0; x < width; ++x) to_hidden[t * width + x] = chunk->gradient(j, x);
    loss[t] = std::log(chunk->totals.data()[j]) + (chunk->greatest.data()[j] - sampled.target_logits[t]);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(LinearCrossEntropy, linear_cross_entropy,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("exact")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SampledCrossEntropy, sampled_cross_entropy,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("exact")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
