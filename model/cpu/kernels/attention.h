// Attention: the projections, rotary positions and pages around `attend`.
#pragma once

#include "attend.h"
#include "linear.h"

namespace {

Scratch projected, attended_rows;

// A row of keys or values in a page.
inline void write_row(void* to, const float* from, int dim, int kind) {
  for (int i = 0; i < dim; i += LANES) {
    if (kind == F32) store(static_cast<float*>(to) + i, load(from + i, dim - i), dim - i);
    else store_bf16(static_cast<uint16_t*>(to) + i, load(from + i, dim - i), dim - i);
  }
}

}  // namespace

extern "C" {

// h[T, H] = the output projection of attention over the layer's pages; see Backend.attention.
void pyllm_attention(const Attention* args, const Step* step, const float* x, const float* mu_below, void* keys,
                     void* values, float* h) {
  std::lock_guard<std::mutex> lock(in_use);
  const Attention& a = *args;
  const int tokens = step->tokens, dim = a.head_dim, row_size = (a.kv_heads * 2 + a.heads) * dim, half = dim / 2;
  float* kqv = projected.get<float>(static_cast<size_t>(tokens) * row_size);
  linear(tokens, a.size, x, a.input_norm, a.eps, a.kqv->k > a.size ? mu_below : nullptr, *a.kqv, kqv);
  const size_t row_bytes = static_cast<size_t>(dim) * 4 / per_word(a.kind);
  for_rows(tokens, [&](int token) {
    float* row = kqv + static_cast<size_t>(token) * row_size;
    const float *cos = step->cos + static_cast<size_t>(token) * half,
                *sin = step->sin + static_cast<size_t>(token) * half;
    const size_t page = step->slots[token] / step->block_size * step->page_bytes;
    const int offset = static_cast<int>(step->slots[token] % step->block_size);
    for (int h = 0; h < a.kv_heads; ++h) {
      norm_and_rotate(row + h * dim, a.k_norm, a.head_eps, cos, sin, dim);
      const size_t at = page + (h * step->block_size + offset) * row_bytes;
      write_row(static_cast<char*>(keys) + at, row + h * dim, dim, a.kind);
      write_row(static_cast<char*>(values) + at, row + (a.kv_heads + a.heads + h) * dim, dim, a.kind);
    }
    for (int h = 0; h < a.heads; ++h)
      norm_and_rotate(row + (a.kv_heads + h) * dim, a.q_norm, a.head_eps, cos, sin, dim);
  });
  struct Task { int sequence, first, count, position; };
  std::vector<Task> tasks;
  for (int sequence = 0, first = 0; sequence < step->sequences; first += step->query_lens[sequence++])
    for (int i = 0; i < step->query_lens[sequence]; i += QUERY_TILE) {
      const int left = step->query_lens[sequence] - i;
      tasks.push_back({sequence, first + i, left < QUERY_TILE ? left : QUERY_TILE,
                       step->seq_lens[sequence] - step->query_lens[sequence] + i});
    }
  while (static_cast<int>(attention_scratch.size()) < pool.size()) attention_scratch.push_back(new AttentionScratch);
  float* attended = attended_rows.get<float>(static_cast<size_t>(tokens) * a.heads * dim);
  pool.run(static_cast<int>(tasks.size()) * a.kv_heads, [&](int index, int thread) {
    const Task& t = tasks[index / a.kv_heads];
    const auto run = a.kind == BF16 ? attend<BF16> : attend<F32>;
    run(a, *step, kqv, keys, values, *attention_scratch[thread], t.sequence, t.first, t.count, t.position,
        index % a.kv_heads, attended);
  });
  linear(tokens, a.heads * dim, attended, nullptr, 0.0f, nullptr, *a.out, h);
}

}  // extern "C"
