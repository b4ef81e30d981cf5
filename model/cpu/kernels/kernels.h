// The CPU's fast path: the network's operations, fused, over packed weights.
//
// A plain C interface that any compiler can build, called by `backend.py`. `model/backend.py` has each operation in
// plain torch, and the tests compare the two. These headers are compiled once for each instruction set, into a library
// of its own, so that the linker cannot merge a function of one set with that of another.
//
// Every number of a result is summed in one fixed order: a token's bits depend neither on the other tokens of the
// step, nor on where its prompt was cut, nor on the number of threads.
//
// The order of these headers is the order of definitions, and g++ inlines by it:
// another order gives other machine code.

#pragma once

#include "attention.h"
#include "dynamics.h"
#include "mlp.h"

extern "C" {

// residual[T, H] += mu (or = mu, when `first`); out = mu + share * residual.
void pyllm_highway(int rows, int size, int first, float share, const float* mu, float* residual, float* out) {
  std::lock_guard<std::mutex> lock(in_use);
  for_rows(rows, [&](int row) {
    for (int i = 0; i < size; i += LANES) {
      const size_t at = static_cast<size_t>(row) * size + i;
      const int left = size - i;
      const Vec v = load(mu + at, left), sum = first ? v : load(residual + at, left) + v;
      store(residual + at, sum, left);
      store(out + at, v + broadcast(share) * sum, left);
    }
  });
}

// out[T, H] = rows `ids` of a packed matrix, as FP32.
void pyllm_embed(int rows, const int64_t* ids, const Matrix* w, float* out) {
  std::lock_guard<std::mutex> lock(in_use);
  const int depth = words(*w), group_rows = LANES * w->panels;
  for_rows(rows, [&](int row) {
    const int64_t id = ids[row];
    const uint32_t* data = static_cast<const uint32_t*>(w->data) +
                           static_cast<size_t>(id / group_rows) * depth * group_rows + id % group_rows;
    float* to = out + static_cast<size_t>(row) * w->k;
    for (int word = 0; word < depth; ++word) {
      const uint32_t bits = data[static_cast<size_t>(word) * group_rows];
      if (w->kind == F32) {
        std::memcpy(to + word, &bits, 4);
      } else if (w->kind == BF16) {
        to[2 * word] = bf16_to_float(static_cast<uint16_t>(bits));
        if (2 * word + 1 < w->k) to[2 * word + 1] = bf16_to_float(static_cast<uint16_t>(bits >> 16));
      } else {
        for (int i = 0; i < 4 && 4 * word + i < w->k; ++i)
          to[4 * word + i] = static_cast<float>(static_cast<int8_t>(bits >> (8 * i))) * w->scales[id];
      }
    }
  });
}

// out[T, H] = rms_norm(x).
void pyllm_rms_norm(int rows, int size, const float* x, const float* norm, float eps, float* out) {
  std::lock_guard<std::mutex> lock(in_use);
  for_rows(rows, [&](int row) {
    rms_norm(x + static_cast<size_t>(row) * size, norm, eps, size, out + static_cast<size_t>(row) * size);
  });
}

// The sizes of the structures, on which the caller must agree.
int pyllm_layout() {
  return static_cast<int>(sizeof(Matrix) + 1000 * (sizeof(Step) + sizeof(Attention) + sizeof(Dynamics) + sizeof(Mlp)));
}

}  // extern "C"
