// Packed weights, and the rows of activations to multiply with them, in the same kind of numbers.
#pragma once

#include "memory.h"
#include "vectors.h"

namespace {

enum Kind : int32_t { F32 = 0, BF16 = 1, INT8 = 2 };

}  // namespace

// Weights [n, k] as `packing.py` packs them, in groups of 16 * panels rows. A 32-bit word holds one FP32, two BF16 or
// four INT8 numbers along k; in a group the words of all its rows alternate, so that a group is contiguous.
struct Matrix {
  const void* data;
  const float* scales;    // INT8: [n], the value of one unit
  const int32_t* totals;  // INT8: [n], 128 times the sum of the row, since activations are stored with 128 added
  int32_t n, k, kind, panels;
};

namespace {

inline int words(const Matrix& w) {
  const int per_word = w.kind == F32 ? 1 : w.kind == BF16 ? 2 : 4;
  return (w.k + per_word - 1) / per_word;
}
inline int groups(const Matrix& w) { return (w.n + LANES * w.panels - 1) / (LANES * w.panels); }

// Activations [rows, k] for a matrix, in its kind; `stride` is in words.
struct Rows {
  uint32_t* data;
  float* scales;  // INT8: one per row
  int stride;
};

// Convert up to 16 numbers to the columns of a row that begin at `column`; not for INT8, which needs the whole row.
inline void put(const Rows& to, int64_t row, int column, Vec v, int count, int kind) {
  uint32_t* data = to.data + static_cast<size_t>(row) * to.stride;
  if (kind == F32) store(reinterpret_cast<float*>(data) + column, v, count);
  else store_bf16(reinterpret_cast<uint16_t*>(data) + column, v, count);
}

// Quantise a row with a scale of its own; a NaN anywhere makes the scale NaN.
inline void put_int8(const Rows& to, int64_t row, const float* from, int k) {
  Vec largest = _mm512_setzero_ps();
  int not_numbers = 0;
  for (int i = 0; i < k; i += LANES) {
    const Vec v = load(from + i, k - i);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
    not_numbers |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  }
  const float peak = _mm512_reduce_max_ps(largest);
  to.scales[row] = not_numbers ? NAN : peak / 127.0f;
  const Vec factor = broadcast(peak > 0.0f ? 127.0f / peak : 0.0f);
  uint8_t* data = reinterpret_cast<uint8_t*>(to.data + static_cast<size_t>(row) * to.stride);
  for (int i = 0; i < k; i += LANES) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load(from + i, k - i), factor));
    const __m512i shifted = _mm512_add_epi32(rounded, _mm512_set1_epi32(128));
    _mm_mask_storeu_epi8(data + i, mask_of(k - i), _mm512_cvtepi32_epi8(shifted));
  }
}

inline void put_row(const Rows& to, int64_t row, const float* from, int k, int kind) {
  if (kind == INT8) return put_int8(to, row, from, k);
  for (int i = 0; i < k; i += LANES) put(to, row, i, load(from + i, k - i), k - i, kind);
}

// Memory for rows of a matrix; the words beyond k are zero, and never written.
class RowScratch {
 public:
  Rows get(int rows, const Matrix& w) {
    const int stride = (words(w) + LANES - 1) / LANES * LANES;
    const bool padded = stride * (w.kind == F32 ? 1 : w.kind == BF16 ? 2 : 4) != w.k;
    uint32_t* data = data_.get<uint32_t>(static_cast<size_t>(rows) * stride);
    if (padded) std::memset(data, 0, static_cast<size_t>(rows) * stride * 4);
    return {data, w.kind == INT8 ? scales_.get<float>(rows) : nullptr, stride};
  }

 private:
  Scratch data_, scales_;
};

// Shared by all operations, since one runs at a time.
RowScratch inputs, velocities, inner;
Scratch wide, order;

}  // namespace
