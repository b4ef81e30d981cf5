// The INL dynamics.
#pragma once

#include "linear.h"

struct Dynamics {
  const float *base, *in_bias, *out_bias;
  const Matrix *in, *in_velocity, *out;
  float dt, max_beta, max_velocity;
  int32_t size, inner, contextual;
};

extern "C" {

// Both residual additions included: changes x and velocity [T, H], sets mu; see Backend.dynamics. In the first layer
// there is no velocity yet: it counts as zero.
void pyllm_dynamics(const Dynamics* args, int rows, int first_layer, float* x, const float* h, float* velocity,
                    float* mu) {
  std::lock_guard<std::mutex> lock(in_use);
  const Dynamics& d = *args;
  const int size = d.size, offset = d.contextual ? size : 0, total = d.in->n;
  const Rows from_h = inputs.get(rows, *d.in), from_velocity = velocities.get(rows, *d.in_velocity);
  for_rows(rows, [&](int row) {
    put_row(from_h, row, h + static_cast<size_t>(row) * size, size, d.in->kind);
    if (!first_layer)
      put_row(from_velocity, row, velocity + static_cast<size_t>(row) * size, size, d.in_velocity->kind);
  });
  // products[T, 2 * inner]: the parts of the controller's hidden layer that come from h and from the velocity.
  float* products = wide.get<float>(static_cast<size_t>(rows) * 2 * d.inner);
  const int h_groups = groups(*d.in), v_groups = first_layer ? 0 : groups(*d.in_velocity);
  const int chunks = (rows + ROW_CHUNK - 1) / ROW_CHUNK;
  pool.run((h_groups + v_groups) * chunks, [&](int task, int) {
    const int first = task % chunks * ROW_CHUNK, last = first + ROW_CHUNK < rows ? first + ROW_CHUNK : rows;
    int group = task / chunks;
    if (group >= h_groups) {
      group -= h_groups;
      product<4>(from_velocity, first, last, *d.in_velocity, group, [&](int row, const float* sums) {
        store_group(products + static_cast<size_t>(row) * 2 * d.inner + d.inner, *d.in_velocity, group, 4, sums);
      });
      return;
    }
    product<4>(from_h, first, last, *d.in, group, [&](int row, const float* sums) {
      for (int p = 0, column = group * 64; p < 4 && column < total; ++p, column += LANES) {
        for (int i = 0; i < LANES && column + i < total; ++i) {  // a panel may hold the end of mu and the hidden layer
          const int c = column + i;
          if (c < offset) mu[static_cast<size_t>(row) * size + c] = d.base[c] + sums[p * LANES + i];
          else products[static_cast<size_t>(row) * 2 * d.inner + c - offset] = sums[p * LANES + i];
        }
      }
    });
  });
  const Rows hidden = inner.get(rows, *d.out);
  for_rows(rows, [&](int row) {
    float* product = products + static_cast<size_t>(row) * 2 * d.inner;
    for (int i = 0; i < d.inner; i += LANES) {
      const int left = d.inner - i;
      Vec v = load(product + i, left) + load(d.in_bias + i, left);
      if (!first_layer) v = v + load(product + d.inner + i, left);
      store(product + i, v * sigmoid(v), left);
    }
    put_row(hidden, row, product, d.inner, d.out->kind);
  });
  // The rows of `out` are packed so that alpha, beta and gate of 16 columns are the three panels of one group.
  matmul<3>(hidden, rows, *d.out, [&](int row, int group, const float* sums) {
    const int column = group * LANES, left = size - column;
    const size_t at = static_cast<size_t>(row) * size + column;
    const Vec alpha = sigmoid(load_line(sums) + load(d.out_bias + column, left));
    const Vec beta = min(softplus(load_line(sums + LANES) + load(d.out_bias + size + column, left)),
                         broadcast(d.max_beta));
    const Vec gate = sigmoid(load_line(sums + 2 * LANES) + load(d.out_bias + 2 * size + column, left));
    const Vec attended = load(h + at, left);
    const Vec target = d.contextual ? load(mu + at, left) : load(d.base + column, left);
    if (!d.contextual) store(mu + at, target, left);
    const Vec pull = beta * (attended - target);
    Vec speed = first_layer ? zero() - pull : alpha * load(velocity + at, left) - pull;
    speed = min(max(speed, broadcast(-d.max_velocity)), broadcast(d.max_velocity));
    store(velocity + at, speed, left);
    const Vec moved = attended + broadcast(d.dt) * gate * speed;
    store(x + at, load(x + at, left) + moved, left);
  });
}

}  // extern "C"
