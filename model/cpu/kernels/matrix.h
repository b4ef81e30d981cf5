// Packed weights, and the rows of activations to multiply with them, in the same kind of numbers.
#pragma once

#include "memory.h"
#include "vectors.h"

// Weights [n, k] as `packing.py` packs them, in groups of 16 * panels rows. A 32-bit word holds one FP32, two BF16 or
// four INT8 numbers along k; in a group the words of all its rows alternate, so that a group is contiguous.
struct Matrix {
  const void* data;
  const float* scales;    // INT8: [n], the value of one unit
  const int32_t* totals;  // INT8: [n], 128 times the sum of the row, for activations that are stored with 128 added
  int32_t n, k, kind, panels;
};

namespace {

inline int per_word(int kind) { return kind == F32 ? 1 : kind == BF16 ? 2 : 4; }
inline int words(const Matrix& w) { return (w.k + per_word(w.kind) - 1) / per_word(w.kind); }
inline int groups(const Matrix& w) { return (w.n + LANES * w.panels - 1) / (LANES * w.panels); }

// Words of 32 bits that the activations take which are multiplied with one word of weights.
constexpr int input_words(int kind) { return WIDENS_BF16 && kind == BF16 ? 2 : 1; }

// Activations [rows, k] for a matrix, in its kind, or in FP32 where BF16 weights are widened; `stride` is in words.
struct Rows {
  uint32_t* data;
  float* scales;  // INT8: one per row
  int stride;
};

// Convert up to 16 numbers to the columns of a row that begin at `column`; not for INT8, which needs the whole row.
inline void put(const Rows& to, int64_t row, int column, Vec v, int count, int kind) {
  uint32_t* data = to.data + static_cast<size_t>(row) * to.stride;
  if (WIDENS_BF16 || kind == F32) store(reinterpret_cast<float*>(data) + column, v, count);
  else store_bf16(reinterpret_cast<uint16_t*>(data) + column, v, count);
}

// Quantise a row with a scale of its own; a NaN anywhere makes the scale NaN.
inline void put_int8(const Rows& to, int64_t row, const float* from, int k) {
  Vec largest = zero();
  int nans = 0;
  for (int i = 0; i < k; i += LANES) {
    const Vec v = load(from + i, k - i);
    largest = max(largest, abs(v));
    nans |= not_numbers(v);
  }
  const float peak = reduce_max(largest);
  to.scales[row] = nans ? NAN : peak / 127.0f;
  const Vec factor = broadcast(peak > 0.0f ? 127.0f / peak : 0.0f);
  uint8_t* data = reinterpret_cast<uint8_t*>(to.data + static_cast<size_t>(row) * to.stride);
  for (int i = 0; i < k; i += LANES) store_int8(data + i, load(from + i, k - i) * factor, k - i);
}

inline void put_row(const Rows& to, int64_t row, const float* from, int k, int kind) {
  if (kind == INT8) return put_int8(to, row, from, k);
  for (int i = 0; i < k; i += LANES) put(to, row, i, load(from + i, k - i), k - i, kind);
}

// Memory for rows of a matrix; the words beyond k are zero, and never written.
class RowScratch {
 public:
  Rows get(int rows, const Matrix& w) {
    const int whole = (words(w) + LANES - 1) / LANES * LANES, stride = whole * input_words(w.kind);
    const bool padded = whole * per_word(w.kind) != w.k;
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
