// The routed MLP: one expert per token, and an expert that all tokens share; or, in the TR-Hash line, a shared expert
// with small ones as further columns next to it.
#pragma once

#include "linear.h"

struct Mlp {
  const float* norm;       // [H]
  const float* router;     // [E, H], or null
  const int64_t* own;      // [vocab], the expert of each id; null for a dense MLP
  const Matrix *gate_up, *down;                // [E] each
  const Matrix *shared_gate_up, *shared_down;  // or null
  const int64_t* routes;       // [K, vocab], the experts of each id, which are columns of gate_up; or null
  const float* output_scales;  // [1 + K], of the shared output, and of the output of an id's experts
  const float* channel_scale;  // [E, W], by which an id's experts are modulated; or null
  float eps, own_score;
  int32_t size, num_experts, activation, shared_activation;  // 0 silu, 1 gelu, 2 relu
  int32_t num_routes, vocab, layer, expert_width;
  int32_t shared_columns, expert_columns;  // of the packed matrices, with padding: multiples of 32
};

namespace {

inline Vec activate(Vec x, int activation) {
  if (activation == 0) return x * sigmoid(x);
  if (activation == 2) return max(x, zero());
  alignas(64) float v[LANES];
  store_line(v, x);
  for (float& f : v) f = 0.5f * f * (1.0f + std::erf(f * 0.707106781f));
  return load_line(v);
}

// The factors of the inner channels in gated_mlp: none.
struct Unscaled {
  bool skips(int, int, int) const { return false; }
  Vec operator()(int, int, Vec v) const { return v; }
};

// The factors of the TR-Hash line: those of a row's experts are in `factors` [T, E], 0 for the others.
struct HashScales {
  const Mlp& mlp;
  const int64_t* ids;
  const float* factors;

  // Whether rows [first, last) use no expert that has this column.
  bool skips(int first, int last, int column) const {
    if (column < mlp.shared_columns) return false;
    const int expert = (column - mlp.shared_columns) / mlp.expert_columns;
    for (int row = first; row < last; ++row)
      if (factors[static_cast<size_t>(row) * mlp.num_experts + expert] != 0.0f) return false;
    return true;
  }

  Vec operator()(int row, int column, Vec v) const {  // 16 columns, of one expert
    if (column < mlp.shared_columns) return v * broadcast(mlp.output_scales[0]);
    const int expert = (column - mlp.shared_columns) / mlp.expert_columns;
    const int channel = (column - mlp.shared_columns) % mlp.expert_columns;
    v = v * broadcast(factors[static_cast<size_t>(row) * mlp.num_experts + expert]);
    if (!mlp.channel_scale || channel >= mlp.expert_width) return v;
    const uint32_t start = static_cast<uint32_t>(ids[row]) * 0x9E3779B1u + static_cast<uint32_t>(expert) * 0x85EBCA77u +
                           static_cast<uint32_t>(channel) * 0xC2B2AE3Du + 0xA511E9B3u +
                           static_cast<uint32_t>(mlp.layer) * 0x63D83595u;
    const Words lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Words h = lanes * 0xC2B2AE3Du + start;
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    const Vec scale = load(mlp.channel_scale + static_cast<size_t>(expert) * mlp.expert_width + channel,
                           mlp.expert_width - channel);
    const Vec one = broadcast(1.0f);
    return v * select(odd(h), one + scale, one - scale);
  }
};

// x[token of a row] += down(activation(gate) * up), for rows grouped by expert: `starts` has E + 1 numbers.
template <class Scales>
void gated_mlp(int size, float* all_x, const Rows& a, int rows, const int* starts, const int* tokens, int experts,
               const Matrix* gate_up, const Matrix* down, int activation, const Scales& scales) {
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
    if (scales.skips(task.first, task.last, group * 32)) {
      for (int row = task.first; row < task.last; ++row)
        for (int column = group * 32; column < group * 32 + 32; column += LANES) {
          if (products) store(products + static_cast<size_t>(row) * width + column, zero());
          else put(act, row, column, zero(), LANES, down->kind);
        }
      return;
    }
    product<4>(a, task.first, task.last, gate_up[task.expert], group, [&](int row, const float* sums) {
      for (int p = 0, column = group * 32; p < 2 && column < width; ++p, column += LANES) {
        const Vec gate = load_line(sums + p * LANES), up = load_line(sums + (p + 2) * LANES);
        const Vec v = scales(row, column, activate(gate, activation) * up);
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
        store(x + column, load(x + column, left) + load_line(sums + p * LANES), left);
      }
    });
  });
}

RowScratch shared_inputs;
Scratch normed_rows, row_factors;

// The highest of router times mu plus the score of the token's own expert; the first of equals.
inline int64_t route(const Mlp& mlp, int64_t own, const float* mu) {
  float best = -INFINITY;
  int64_t chosen = 0;
  for (int e = 0; e < mlp.num_experts; ++e) {
    Vec sum = zero();
    for (int i = 0; i < mlp.size; i += LANES)
      sum = fmadd(load(mu + i, mlp.size - i),
                  load(mlp.router + static_cast<size_t>(e) * mlp.size + i, mlp.size - i), sum);
    const float total = reduce_add(sum) + (own == e ? mlp.own_score : 0.0f);
    if (total > best) best = total, chosen = e;
  }
  return chosen;
}

}  // namespace

extern "C" {

// x[T, H] += the expert's MLP of rms_norm(x), and the shared expert's; sets experts[T] if there are several. See
// Backend.routed_mlp. `mu` may be null.
void pyllm_mlp(const Mlp* args, int rows, float* x, const int64_t* ids, const float* mu, int64_t* experts) {
  std::lock_guard<std::mutex> lock(in_use);
  const Mlp& mlp = *args;
  const int size = mlp.size, num_experts = mlp.num_experts;
  float* normed = normed_rows.get<float>(static_cast<size_t>(rows) * size);
  float* factors = mlp.routes ? row_factors.get<float>(static_cast<size_t>(rows) * num_experts) : nullptr;
  for_rows(rows, [&](int token) {
    const size_t at = static_cast<size_t>(token) * size;
    rms_norm(x + at, mlp.norm, mlp.eps, size, normed + at);
    if (factors) {
      float* own = factors + static_cast<size_t>(token) * num_experts;
      std::fill(own, own + num_experts, 0.0f);
      for (int k = 0; k < mlp.num_routes; ++k)
        own[mlp.routes[static_cast<size_t>(k) * mlp.vocab + ids[token]]] += mlp.output_scales[1 + k];
    }
    if (!mlp.own) return;
    const int64_t own = mlp.own[ids[token]];
    experts[token] = mlp.router && mu ? route(mlp, own, mu + at) : own;
  });
  const int whole[2] = {0, rows};
  if (factors) {
    const Rows a = inputs.get(rows, *mlp.gate_up);
    for_rows(rows, [&](int row) {
      put_row(a, row, normed + static_cast<size_t>(row) * size, size, mlp.gate_up->kind);
    });
    return gated_mlp(size, x, a, rows, whole, nullptr, 1, mlp.gate_up, mlp.down, mlp.activation,
                     HashScales{mlp, ids, factors});
  }
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
  gated_mlp(size, x, a, rows, starts, tokens, num_experts, mlp.gate_up, mlp.down, mlp.activation, Unscaled{});
  if (mlp.shared_gate_up) {
    gated_mlp(size, x, in_order, rows, whole, nullptr, 1, mlp.shared_gate_up, mlp.shared_down, mlp.shared_activation,
              Unscaled{});
  }
}

}  // extern "C"
