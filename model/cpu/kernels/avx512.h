// Vectors of AVX-512 with BF16 and VNNI: 16 floats in one register.
#pragma once

#include <immintrin.h>

namespace {

using Vec = __m512;  // has the operators + - * /
using Mask = __mmask16;
using Words = uint32_t __attribute__((vector_size(64)));

constexpr float EXP_MIN = -104.0f, EXP_MAX = 88.7f;  // where exp(x) is 0 and the largest number
constexpr int STREAMED_ROWS = 6;    // so few rows read a group of weights once, all of its depth
constexpr int CHUNK_WORDS = 128;    // words multiplied before the next rows are, so that weights stay cached
constexpr bool WIDENS_BF16 = false; // activations of BF16 products are BF16 too

constexpr int value_panels(int) { return 4; }  // vectors of values that `weigh_values` sums at once, for M rows

inline Mask mask_of(int count) { return count >= LANES ? 0xFFFF : static_cast<Mask>((1u << count) - 1); }
inline Mask mask_of_bits(uint64_t bits) { return static_cast<Mask>(bits); }
inline Vec load(const float* from, int count = LANES) { return _mm512_maskz_loadu_ps(mask_of(count), from); }
inline void store(float* to, Vec v, int count = LANES) { _mm512_mask_storeu_ps(to, mask_of(count), v); }
inline Vec load_line(const float* from) { return _mm512_load_ps(from); }  // aligned to 64 bytes
inline void store_line(float* to, Vec v) { _mm512_store_ps(to, v); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec zero() { return _mm512_setzero_ps(); }

inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fnmadd(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec abs(Vec v) { return _mm512_abs_ps(v); }
inline float first_of(Vec v) { return _mm512_cvtss_f32(v); }
inline float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }
inline float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }

inline Mask above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask odd(const Words& w) { return _mm512_test_epi32_mask((__m512i)w, _mm512_set1_epi32(1)); }
inline int not_numbers(Vec v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
inline Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m, no, yes); }
inline Vec keep(Mask m, Vec v) { return _mm512_maskz_mov_ps(m, v); }
inline Vec multiply_where(Mask m, Vec a, Vec b, Vec no) { return _mm512_mask_mul_ps(no, m, a, b); }

inline Vec round(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }
inline Vec scale_by_power(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }  // v * 2^n
inline void split(Vec x, Vec& mantissa, Vec& exponent) {  // x = mantissa * 2^exponent, with a mantissa around 1
  mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src), exponent = _mm512_getexp_ps(x);
  const Mask large = above(mantissa, broadcast(1.41421356f));
  mantissa = _mm512_mask_mul_ps(mantissa, large, mantissa, broadcast(0.5f));
  exponent = _mm512_mask_add_ps(exponent, large, exponent, broadcast(1.0f));
}

inline Vec load_bf16(const uint16_t* from, int count = LANES) {
  const __m256i bits = _mm256_maskz_loadu_epi16(mask_of(count), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store_bf16(uint16_t* to, Vec v, int count = LANES) {
  _mm256_mask_storeu_epi16(to, mask_of(count), (__m256i)_mm512_cvtneps_pbh(v));
}

// Numbers of -127 to 127, rounded, as activations of INT8 products: with 128 added, since one factor is unsigned.
inline void store_int8(uint8_t* to, Vec v, int count) {
  const __m512i shifted = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(128));
  _mm_mask_storeu_epi8(to, mask_of(count), _mm512_cvtepi32_epi8(shifted));
}

// The integer sums of an INT8 product as floats; `totals` undoes the 128 that was added.
inline Vec int8_sums(const float* sums, const int32_t* totals, int count) {
  const __m512i total = _mm512_maskz_loadu_epi32(mask_of(count), totals);
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(sums), total));
}

// Transpose a 16 x 16 square of words in place.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4)
    UNROLL for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  UNROLL for (int i = 0; i < 16; i += 8)
    UNROLL for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
    }
  UNROLL for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

// to[word * stride + row] = the words of up to 16 rows from byte `offset` on; 0 beyond `count` rows and `words` words.
inline void transpose_rows(const char* const* rows, int count, size_t offset, int words, uint32_t* to, int stride) {
  __m512i square[LANES];
  for (int t = 0; t < LANES; ++t)
    square[t] = t < count ? _mm512_maskz_loadu_epi32(mask_of(words), rows[t] + offset) : _mm512_setzero_si512();
  transpose(square);
  for (int i = 0; i < LANES; ++i) _mm512_store_si512(to + i * stride, square[i]);
}

template <Kind K> struct Element;
template <> struct Element<F32> { using Sum = __m512; };
template <> struct Element<BF16> { using Sum = __m512; };
template <> struct Element<INT8> { using Sum = __m512i; };

// out[M][P * 16] = (or, with MORE, +=) M rows of `a` times `depth` words of P panels.
template <Kind K, int M, int P, bool MORE>
inline void multiply(const uint32_t* a, int stride, const uint32_t* w, int depth, float* out) {
  using Sum = typename Element<K>::Sum;
  Sum sums[M][P];  // in registers: every loop over it is unrolled
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int p = 0; p < P; ++p) {
      if constexpr (MORE) sums[m][p] = (Sum)_mm512_load_ps(out + (m * P + p) * LANES);
      else sums[m][p] = Sum{};
    }
  for (int k = 0; k < depth; ++k, w += P * LANES) {
    __m512i b[P];
    UNROLL for (int p = 0; p < P; ++p) b[p] = _mm512_loadu_si512(w + p * LANES);
    if constexpr (M <= 6 && P > 2) {  // few rows: the weights come from memory, a page at a time
      UNROLL for (int p = 0; p < P; ++p)
        _mm_prefetch(reinterpret_cast<const char*>(w + 2048 + p * LANES), _MM_HINT_T0);
    }
    UNROLL for (int m = 0; m < M; ++m) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(a[m * stride + k]));
      UNROLL for (int p = 0; p < P; ++p) {
        if constexpr (K == F32) sums[m][p] = _mm512_fmadd_ps((__m512)x, (__m512)b[p], sums[m][p]);
        else if constexpr (K == BF16) sums[m][p] = _mm512_dpbf16_ps(sums[m][p], (__m512bh)x, (__m512bh)b[p]);
        // With the intrinsic, g++ moves these sums between registers and memory, at half the speed.
        else __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[m][p]) : "v"(x), "v"(b[p]));
      }
    }
  }
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int p = 0; p < P; ++p) _mm512_store_ps(out + (m * P + p) * LANES, (__m512)sums[m][p]);
}

}  // namespace
