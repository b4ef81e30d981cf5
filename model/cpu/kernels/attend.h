// Attention of a few queries over the pages of one KV head. Tiles of 32 keys begin at position 0, so that a query's
// sums have the same order in any batch and in any chunk of its prompt.
#pragma once

#include "products.h"

// The data about a step that all layers share: T tokens of S sequences.
struct Step {
  const float *cos, *sin;                // [T, head_dim / 2]
  const int64_t* slots;                  // [T]
  const int32_t* tables;                 // [S, table_stride]
  const int32_t *query_lens, *seq_lens;  // [S]
  int64_t page_bytes;                    // from one page of a layer to the next
  int32_t tokens, sequences, table_stride, block_size;
};

struct Attention {
  const Matrix *kqv, *out;
  const float *input_norm, *q_norm, *k_norm;  // [H], and [head_dim] or null
  float eps, head_eps, scale;
  int32_t size, heads, kv_heads, head_dim, window, kind;  // kind: of the pages, BF16 or FP32
};

namespace {

constexpr int KEY_TILE = 32;
constexpr int QUERY_TILE = 16;  // queries of a prompt that share the keys and values they read
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_GROUP = 16;   // query heads per KV head
constexpr int MAX_ROWS = QUERY_TILE * MAX_GROUP;

// One thread's working memory. A row is one query head of one query.
struct alignas(64) AttentionScratch {
  uint32_t keys[MAX_HEAD_DIM * KEY_TILE];  // a tile of keys, word by word
  float values[KEY_TILE * MAX_HEAD_DIM];
  float scores[MAX_ROWS * KEY_TILE];
  uint32_t queries[MAX_ROWS * MAX_HEAD_DIM];
  float sums[MAX_ROWS * MAX_HEAD_DIM];
  float largest[MAX_ROWS], total[MAX_ROWS];
};

std::vector<AttentionScratch*> attention_scratch;  // one a thread

// sums[M][J * 16] += weights[M][tokens] times values[tokens][J * 16]; a row of sums and values has `width` numbers.
template <int M, int J>
inline void weigh_values(const float* weights, const float* values, int tokens, int width, float* sums) {
  Vec acc[M][J];
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int j = 0; j < J; ++j) acc[m][j] = load_line(sums + m * width + j * LANES);
  for (int t = 0; t < tokens; ++t) {
    Vec v[J];
    UNROLL for (int j = 0; j < J; ++j) v[j] = load_line(values + t * width + j * LANES);
    UNROLL for (int m = 0; m < M; ++m) {
      const Vec p = broadcast(weights[m * KEY_TILE + t]);
      UNROLL for (int j = 0; j < J; ++j) acc[m][j] = fmadd(p, v[j], acc[m][j]);
    }
  }
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int j = 0; j < J; ++j) store_line(sums + m * width + j * LANES, acc[m][j]);
}

template <int M = 6>
inline void weigh_rows(int rows, const float* weights, const float* values, int tokens, int width, float* sums) {
  if constexpr (M > 0) {
    constexpr int J = value_panels(M);
    for (; rows >= M; rows -= M, weights += M * KEY_TILE, sums += M * width)
      for (int d = 0; d < width; d += J * LANES) weigh_values<M, J>(weights, values + d, tokens, width, sums + d);
    if (rows) weigh_rows<M - 1>(rows, weights, values, tokens, width, sums);
  }
}

// A bit for each key of the tile at `first_key` that a query sees: none after its own position, none before the window.
inline uint64_t visible(int position, int first_key, int window) {
  uint64_t seen = position - first_key >= KEY_TILE - 1 ? ~0ull
                  : position < first_key               ? 0ull
                                                       : (2ull << (position - first_key)) - 1;
  const int hidden = window ? position - window + 1 - first_key : 0;  // keys before the window
  if (hidden > 0) seen = hidden >= KEY_TILE ? 0ull : seen & ~((1ull << hidden) - 1);
  return seen;
}

// Turn the scores of one row with a tile of keys into weights, and rescale the sums so far if a larger score came up.
inline void softmax_tile(AttentionScratch& s, int row, uint64_t seen, float scale, int width) {
  constexpr int PARTS = KEY_TILE / LANES;
  float* scores = s.scores + row * KEY_TILE;
  Vec part[PARTS], peak = broadcast(-INFINITY), sum = zero();
  UNROLL for (int i = 0; i < PARTS; ++i) {
    const Mask mask = mask_of_bits(seen >> (i * LANES));
    part[i] = multiply_where(mask, load_line(scores + i * LANES), broadcast(scale), broadcast(-INFINITY));
    peak = max(peak, part[i]);
  }
  const float before = s.largest[row], found = reduce_max(peak), largest = found > before ? found : before;
  UNROLL for (int i = 0; i < PARTS; ++i) {
    part[i] = keep(mask_of_bits(seen >> (i * LANES)), exp(part[i] - broadcast(largest)));
    sum = sum + part[i];
    store_line(scores + i * LANES, part[i]);
  }
  if (largest > before) {
    const float factor = before == -INFINITY ? 0.0f : first_of(exp(broadcast(before - largest)));
    s.largest[row] = largest;
    s.total[row] *= factor;
    for (int d = 0; d < width; d += LANES)
      store_line(s.sums + row * width + d, load_line(s.sums + row * width + d) * broadcast(factor));
  }
  s.total[row] += reduce_add(sum);
}

// A position in a sequence's keys (or values) of one head, which are one row after the other, page by page.
struct Cursor {
  const int32_t* table;
  size_t page_bytes, row_bytes, head;
  int block_size, block, offset;

  size_t place() const { return table[block] * page_bytes + head + offset * row_bytes; }
  void next() {
    if (++offset == block_size) ++block, offset = 0;
  }
  // Prefetch the next `rows` keys and values, which are scattered in memory, and move past them.
  void prefetch(const void* keys, const void* values, int rows) {
    while (rows > 0) {
      const int here = block_size - offset < rows ? block_size - offset : rows;
      for (size_t i = 0, at = place(); i < here * row_bytes; i += 64) {
        _mm_prefetch(static_cast<const char*>(keys) + at + i, _MM_HINT_T0);
        _mm_prefetch(static_cast<const char*>(values) + at + i, _MM_HINT_T0);
      }
      rows -= here;
      offset += here;
      if (offset == block_size) ++block, offset = 0;
    }
  }
};

// Causal attention of `count` queries of one sequence, from flat token `first` and position `position`, for the query
// heads of one KV head: one pass over the keys, tile by tile, with the softmax rescaled as larger scores come up.
//
// Args: kqv [T, (kv_heads + heads + kv_heads) * head_dim], normed and rotated; pages [kv_heads, block_size, head_dim],
// page_bytes apart; out [T, heads * head_dim].
template <Kind K>
void attend(const Attention& a, const Step& step, const float* kqv, const void* all_keys, const void* all_values,
            AttentionScratch& s, int sequence, int first, int count, int position, int kv_head, float* out) {
  const int dim = a.head_dim, group = a.heads / a.kv_heads, rows = count * group;
  const int row_words = K == BF16 ? dim / 2 : dim, width = (dim + 63) / 64 * 64;
  const int row_size = (a.kv_heads * 2 + a.heads) * dim;
  const int last = position + count - 1;
  const int begin = a.window && position >= a.window ? (position - a.window + 1) / KEY_TILE * KEY_TILE : 0;
  const size_t row_bytes = static_cast<size_t>(row_words) * 4, head_bytes = row_bytes * step.block_size;
  Cursor at_row{step.tables + static_cast<size_t>(sequence) * step.table_stride,
                static_cast<size_t>(step.page_bytes), row_bytes, head_bytes * kv_head, step.block_size,
                begin / step.block_size, begin % step.block_size};
  Cursor ahead = at_row;
  ahead.prefetch(all_keys, all_values, last + 1 - begin < KEY_TILE ? last + 1 - begin : KEY_TILE);
  for (int row = 0; row < rows; ++row) {
    const float* q = kqv + static_cast<size_t>(first + row / group) * row_size +
                     (a.kv_heads + kv_head * group + row % group) * dim;
    put_row(Rows{s.queries, nullptr, row_words * input_words(K)}, row, q, dim, K);
    s.largest[row] = -INFINITY;
    s.total[row] = 0.0f;
    std::memset(s.sums + row * width, 0, width * sizeof(float));
  }
  for (int at = begin; at <= last; at += KEY_TILE) {
    const int tokens = last + 1 - at < KEY_TILE ? last + 1 - at : KEY_TILE;
    // Keys of the next tile, prefetched a few at a time between pieces of work on this one.
    int wanted = last + 1 - at - KEY_TILE < KEY_TILE ? last + 1 - at - KEY_TILE : KEY_TILE;
    const auto prefetch_some = [&] {
      constexpr int SOME = KEY_TILE / 8;
      if (wanted > 0) ahead.prefetch(all_keys, all_values, wanted < SOME ? wanted : SOME), wanted -= SOME;
    };
    const char* key_rows[KEY_TILE];
    for (int t = 0; t < tokens; ++t, at_row.next()) {
      const size_t place = at_row.place();
      key_rows[t] = static_cast<const char*>(all_keys) + place;
      const char* value = static_cast<const char*>(all_values) + place;
      for (int d = 0; d < dim; d += LANES) {
        const Vec v = K == BF16 ? load_bf16(reinterpret_cast<const uint16_t*>(value) + d, dim - d)
                                : load(reinterpret_cast<const float*>(value) + d, dim - d);
        store_line(s.values + t * width + d, v);
      }
    }
    for (int half = 0; half < KEY_TILE; half += LANES)
      for (int word = 0; word < row_words; word += LANES) {
        prefetch_some();
        transpose_rows(key_rows + half, tokens - half, word * 4, row_words - word, s.keys + word * KEY_TILE + half,
                       KEY_TILE);
      }
    prefetch_some();
    multiply_rows<K, KEY_TILE / LANES>(rows, s.queries, row_words * input_words(K), s.keys, row_words, s.scores, false);
    for (int row = 0; row < rows; ++row) {
      if (row < 3) prefetch_some();
      const uint64_t seen = visible(position + row / group, at, a.window);
      if (seen) softmax_tile(s, row, seen, a.scale, width);
      else std::memset(s.scores + row * KEY_TILE, 0, KEY_TILE * sizeof(float));
    }
    while (wanted > 0) prefetch_some();
    weigh_rows(rows, s.scores, s.values, tokens, width, s.sums);
  }
  for (int row = 0; row < rows; ++row) {
    float* to = out + (static_cast<size_t>(first + row / group) * a.heads + kv_head * group + row % group) * dim;
    const Vec factor = broadcast(1.0f / s.total[row]);
    for (int d = 0; d < dim; d += LANES)
      store(to + d, load_line(s.sums + row * width + d) * factor, dim - d);
  }
}

// Norm and rotation of one head of one token, in place.
inline void norm_and_rotate(float* x, const float* norm, float eps, const float* cos, const float* sin, int dim) {
  if (norm) rms_norm(x, norm, eps, dim, x);
  const int half = dim / 2;
  for (int i = 0; i < half; i += LANES) {
    const int left = half - i;
    const Vec first = load(x + i, left), second = load(x + half + i, left);
    const Vec c = load(cos + i, left), d = load(sin + i, left);
    const Vec back = second * d, forth = first * d;  // apart, so that every compiler fuses the same products
    store(x + i, first * c - back, left);
    store(x + half + i, second * c + forth, left);
  }
}

}  // namespace
