// The product of a whole step: out = w times the step's rows, with RMSNorm first if there is a norm.
#pragma once

#include "products.h"

namespace {

// out[T, n] = w times [rms_norm(x), mu], or times x alone where `norm` is null; `mu` may be null.
void linear(int rows, int size, const float* x, const float* norm, float eps, const float* mu, const Matrix& w,
            float* out) {
  const Rows a = inputs.get(rows, w);
  float* normed = norm ? wide.get<float>(static_cast<size_t>(rows) * w.k) : nullptr;
  for_rows(rows, [&](int row) {
    const float* from = x + static_cast<size_t>(row) * size;
    if (normed) {
      float* to = normed + static_cast<size_t>(row) * w.k;
      rms_norm(from, norm, eps, size, to);
      if (mu) std::memcpy(to + size, mu + static_cast<size_t>(row) * size, size * sizeof(float));
      from = to;
    }
    put_row(a, row, from, w.k, w.kind);
  });
  matmul<4>(a, rows, w, [&](int row, int group, const float* sums) {
    store_group(out + static_cast<size_t>(row) * w.n, w, group, 4, sums);
  });
}

}  // namespace

extern "C" {

void pyllm_set_threads(int threads) {
  std::lock_guard<std::mutex> lock(in_use);
  if (threads != pool.size()) pool.resize(threads);
}

// out[T, n] = w times x.
void pyllm_linear(int rows, const float* x, const Matrix* w, float* out) {
  std::lock_guard<std::mutex> lock(in_use);
  linear(rows, w->k, x, nullptr, 0.0f, nullptr, *w, out);
}

}  // extern "C"
