// The routed MLP: one expert per token, and an expert that all tokens share.
#pragma once

#include "linear.h"

struct Mlp {
  const float* norm;       // [H]
  const float* router;     // [E, H], or null
  const int64_t* own;      // [vocab], the expert of each id; null for a dense MLP
  const Matrix *gate_up, *down;                // [E] each
  const Matrix *shared_gate_up, *shared_down;  // or null
  float eps, own_score;
  int32_t size, num_experts, activation, shared_activation;  // 0 silu, 1 gelu, 2 relu
};

namespace {

inline Vec activate(Vec x, int activation) {
  if (activation == 0) return _mm512_mul_ps(x, sigmoid(x));
  if (activation == 2) return _mm512_max_ps(x, _mm512_setzero_ps());
  alignas(64) float v[LANES];
  _mm512_store_ps(v, x);
  for (float& f : v) f = 0.5f * f * (1.0f + std::erf(f * 0.707106781f));
  return _mm512_load_ps(v);
}

// x[token of a row] += down(activation(gate) * up), for rows grouped by expert: `starts` has E + 1 numbers.
void gated_mlp(int size, float* all_x, const Rows& a, int rows, const int* starts, const int* tokens, int experts,
               const Matrix* gate_up, const Matrix* down, int activation) {
  const int width = down->k, in_groups = groups(*gate_up), out_groups = groups(*down);
  struct Task { int expert, first, last; };
  std::vector<Task> chunks;
  for (int e = 0; e < experts; ++e)
    for (int row = starts[e]; row < starts[e + 1]; row += ROW_CHUNK)
      chunks.push_back({e, row, row + ROW_CHUNK < starts[e + 1] ? row + ROW_CHUNK : starts[e + 1]});
  const Rows act = inner.get(rows, *down);
  float* products = down->kind == INT8 ? wide.get<float>(static_cast<size_t>(rows) * width) : nullptr;
  const int count = static_cast<int>(chunks.size());
  // Groups first, so that neighbouring tasks read neighbouring weights. A group has 32 gate rows and their 32 up rows.
  pool.run(count * in_groups, [&](int index, int) {
    const Task& task = chunks[index / in_groups];
    const int group = index % in_groups;
    product<4>(a, task.first, task.last, gate_up[task.expert], group, [&](int row, const float* sums) {
      for (int p = 0, column = group * 32; p < 2 && column < width; ++p, column += LANES) {
        const Vec gate = _mm512_load_ps(sums + p * LANES), up = _mm512_load_ps(sums + (p + 2) * LANES);
        const Vec v = _mm512_mul_ps(activate(gate, activation), up);
        if (products) store(products + static_cast<size_t>(row) * width + column, v, width - column);
        else put(act, row, column, v, width - column, down->kind);
      }
    });
  });
  if (products)
    for_rows(rows, [&](int row) { put_int8(act, row, products + static_cast<size_t>(row) * width, width); });
  pool.run(count * out_groups, [&](int index, int) {
    const Task& task = chunks[index / out_groups];
    const int group = index % out_groups;
    product<4>(act, task.first, task.last, down[task.expert], group, [&](int row, const float* sums) {
      float* x = all_x + static_cast<size_t>(tokens ? tokens[row] : row) * size;
      for (int p = 0, column = group * 64; p < 4 && column < size; ++p, column += LANES) {
        const int left = size - column;
        store(x + column, _mm512_add_ps(load(x + column, left), _mm512_load_ps(sums + p * LANES)), left);
      }
    });
  });
}

RowScratch shared_inputs;
Scratch normed_rows;

// The highest of router times mu plus the score of the token's own expert; the first of equals.
inline int64_t route(const Mlp& mlp, int64_t own, const float* mu) {
  float best = -INFINITY;
  int64_t chosen = 0;
  for (int e = 0; e < mlp.num_experts; ++e) {
    Vec sum = _mm512_setzero_ps();
    for (int i = 0; i < mlp.size; i += LANES)
      sum = _mm512_fmadd_ps(load(mu + i, mlp.size - i),
                            load(mlp.router + static_cast<size_t>(e) * mlp.size + i, mlp.size - i), sum);
    const float total = _mm512_reduce_add_ps(sum) + (own == e ? mlp.own_score : 0.0f);
    if (total > best) best = total, chosen = e;
  }
  return chosen;
}

}  // namespace

extern "C" {

// x[T, H] += the expert's MLP of rms_norm(x), and the shared expert's; sets experts[T] where there are several. See
// Backend.routed_mlp. `mu` may be null.
void pyllm_mlp(const Mlp* args, int rows, float* x, const int64_t* ids, const float* mu, int64_t* experts) {
  std::lock_guard<std::mutex> lock(in_use);
  const Mlp& mlp = *args;
  const int size = mlp.size, num_experts = mlp.num_experts;
  float* normed = normed_rows.get<float>(static_cast<size_t>(rows) * size);
  for_rows(rows, [&](int token) {
    const size_t at = static_cast<size_t>(token) * size;
    rms_norm(x + at, mlp.norm, mlp.eps, size, normed + at);
    if (!mlp.own) return;
    const int64_t own = mlp.own[ids[token]];
    experts[token] = mlp.router && mu ? route(mlp, own, mu + at) : own;
  });
  int* tokens = order.get<int>(rows + num_experts + 1);  // the token of each row, grouped by expert, and the starts
  int* starts = tokens + rows;
  std::memset(starts, 0, (num_experts + 1) * sizeof(int));
  for (int token = 0; token < rows; ++token) ++starts[(mlp.own ? experts[token] : 0) + 1];
  for (int e = 0; e < num_experts; ++e) starts[e + 1] += starts[e];
  std::vector<int> next(starts, starts + num_experts);
  for (int token = 0; token < rows; ++token) tokens[next[mlp.own ? experts[token] : 0]++] = token;
  const Rows a = inputs.get(rows, *mlp.gate_up);
  const Rows in_order = mlp.shared_gate_up ? shared_inputs.get(rows, *mlp.shared_gate_up) : Rows{};
  for_rows(rows, [&](int row) {
    put_row(a, row, normed + static_cast<size_t>(tokens[row]) * size, size, mlp.gate_up->kind);
    if (mlp.shared_gate_up)
      put_row(in_order, row, normed + static_cast<size_t>(row) * size, size, mlp.shared_gate_up->kind);
  });
  gated_mlp(size, x, a, rows, starts, tokens, num_experts, mlp.gate_up, mlp.down, mlp.activation);
  if (mlp.shared_gate_up) {
    const int whole[2] = {0, rows};
    gated_mlp(size, x, in_order, rows, whole, nullptr, 1, mlp.shared_gate_up, mlp.shared_down, mlp.shared_activation);
  }
}

}  // extern "C"
