// Products of activations with packed weights. One loop computes one row and a thousand, so a row's sums have the same
// order whatever is in the batch.
#pragma once

#include "threads.h"

#include "matrix.h"

namespace {

constexpr int ROW_CHUNK = 96;  // rows whose sums fit in the first-level cache, a multiple of 6

template <Kind K, int P, int M = 6>
inline void multiply_rows(int rows, const uint32_t* a, int stride, const uint32_t* w, int depth, float* out,
                          bool more) {
  if constexpr (M > 0) {
    for (; rows >= M; rows -= M, a += M * stride, out += M * P * LANES) {
      if (more) multiply<K, M, P, true>(a, stride, w, depth, out);
      else multiply<K, M, P, false>(a, stride, w, depth, out);
    }
    if (rows) multiply_rows<K, P, M - 1>(rows, a, stride, w, depth, out, more);
  }
}

// Multiply rows [first, last) with one group of a matrix; done(row, sums) gets each row's 16 * P sums in FP32.
template <Kind K, int P, class Done>
inline void multiply_group(const Rows& a, int first, int last, const Matrix& w, int group, const Done& done) {
  alignas(64) float tile[ROW_CHUNK * P * LANES];
  const int depth = words(w), step = CHUNK_WORDS;
  const uint32_t* weights = static_cast<const uint32_t*>(w.data) + static_cast<size_t>(group) * depth * P * LANES;
  for (int row = first; row < last; row += ROW_CHUNK) {
    const int count = last - row < ROW_CHUNK ? last - row : ROW_CHUNK;
    const uint32_t* data = a.data + static_cast<size_t>(row) * a.stride;
    if (count <= STREAMED_ROWS) {
      multiply_rows<K, P>(count, data, a.stride, weights, depth, tile, false);
    } else {
      for (int k = 0; k < depth; k += step)
        multiply_rows<K, P>(count, data + k * input_words(K), a.stride, weights + static_cast<size_t>(k) * P * LANES,
                            depth - k < step ? depth - k : step, tile, k > 0);
    }
    for (int i = 0; i < count; ++i) {
      float* sums = tile + i * P * LANES;
      if constexpr (K == INT8) {
        const int column = group * P * LANES;
        for (int p = 0; p < P; ++p) {
          const int left = w.n - column - p * LANES;
          if (left <= 0) break;
          const Vec sum = int8_sums(sums + p * LANES, w.totals + column + p * LANES, left);
          const Vec scale = load(w.scales + column + p * LANES, left) * broadcast(a.scales[row + i]);
          store_line(sums + p * LANES, sum * scale);
        }
      }
      done(row + i, sums);
    }
  }
}

template <int P, class Done>
inline void product(const Rows& a, int first, int last, const Matrix& w, int group, const Done& done) {
  if (w.kind == F32) multiply_group<F32, P>(a, first, last, w, group, done);
  else if (w.kind == BF16) multiply_group<BF16, P>(a, first, last, w, group, done);
  else multiply_group<INT8, P>(a, first, last, w, group, done);
}

inline void store_group(float* out, const Matrix& w, int group, int panels, const float* sums) {
  for (int p = 0, column = group * panels * LANES; p < panels && column < w.n; ++p, column += LANES)
    store(out + column, load_line(sums + p * LANES), w.n - column);
}

// Multiply all rows with a whole matrix, in tasks by group, and by rows when there are many: done(row, group, sums).
template <int P, class Done>
void matmul(const Rows& a, int rows, const Matrix& w, const Done& done) {
  const int chunks = (rows + ROW_CHUNK - 1) / ROW_CHUNK, all_groups = groups(w);
  pool.run(all_groups * chunks, [&](int task, int) {
    const int group = task / chunks, first = task % chunks * ROW_CHUNK;
    product<P>(a, first, first + ROW_CHUNK < rows ? first + ROW_CHUNK : rows, w, group,
               [&](int row, const float* sums) { done(row, group, sums); });
  });
}

}  // namespace
