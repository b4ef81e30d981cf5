// Arithmetic on vectors of 16 floats, and RMSNorm. `count` is how many of the 16 exist: the rest read as 0 and are not
// written; more than 16 counts as 16.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int LANES = 16;  // floats in a vector

using Vec = __m512;

inline __mmask16 mask_of(int count) { return count >= LANES ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1); }
inline Vec load(const float* from, int count = LANES) { return _mm512_maskz_loadu_ps(mask_of(count), from); }
inline void store(float* to, Vec v, int count = LANES) { _mm512_mask_storeu_ps(to, mask_of(count), v); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }

inline Vec exp(Vec x) {
  x = _mm512_min_ps(_mm512_max_ps(x, broadcast(-104.0f)), broadcast(88.7f));
  const Vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, broadcast(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  Vec r = _mm512_fnmadd_ps(n, broadcast(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, broadcast(1.42860677e-6f), r);
  Vec p = broadcast(1.0f / 5040);  // Taylor on |r| <= 0.347: the next term is 1e-8
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, r, broadcast(c));
  return _mm512_scalef_ps(p, n);
}

inline Vec log(Vec x) {  // of positive numbers
  Vec mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src), exponent = _mm512_getexp_ps(x);
  const __mmask16 large = _mm512_cmp_ps_mask(mantissa, broadcast(1.41421356f), _CMP_GT_OQ);
  mantissa = _mm512_mask_mul_ps(mantissa, large, mantissa, broadcast(0.5f));
  exponent = _mm512_mask_add_ps(exponent, large, exponent, broadcast(1.0f));
  const Vec f = _mm512_sub_ps(mantissa, broadcast(1.0f)), s = _mm512_div_ps(f, _mm512_add_ps(f, broadcast(2.0f)));
  const Vec s2 = _mm512_mul_ps(s, s);
  Vec p = broadcast(2.0f / 11);  // log((1 + s) / (1 - s)) as a series in s, |s| <= 0.172
  for (float c : {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f}) p = _mm512_fmadd_ps(p, s2, broadcast(c));
  return _mm512_fmadd_ps(exponent, broadcast(0.693147181f), _mm512_mul_ps(p, s));
}

inline Vec sigmoid(Vec x) {
  return _mm512_div_ps(broadcast(1.0f), _mm512_add_ps(broadcast(1.0f), exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

inline Vec softplus(Vec x) {
  const Vec e = exp(x), u = _mm512_add_ps(e, broadcast(1.0f)), rest = _mm512_sub_ps(u, broadcast(1.0f));
  // log(1 + e) without losing a small e (Kahan): the rounding error of 1 + e is divided out.
  const Vec y = _mm512_div_ps(_mm512_mul_ps(log(u), e), rest);
  const Vec small = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(rest, _mm512_setzero_ps(), _CMP_EQ_OQ), y, e);
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, broadcast(20.0f), _CMP_GT_OQ), small, x);
}

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

inline Vec load_bf16(const uint16_t* from, int count = LANES) {
  const __m256i bits = _mm256_maskz_loadu_epi16(mask_of(count), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store_bf16(uint16_t* to, Vec v, int count = LANES) {
  _mm256_mask_storeu_epi16(to, mask_of(count), (__m256i)_mm512_cvtneps_pbh(v));
}

// out[size] = x / sqrt(mean(x^2) + eps) * weight; `out` may be `x`.
inline void rms_norm(const float* x, const float* weight, float eps, int size, float* out) {
  Vec sum = _mm512_setzero_ps();
  for (int i = 0; i < size; i += LANES) {
    const Vec v = load(x + i, size - i);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  const Vec factor = broadcast(1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(size) + eps));
  for (int i = 0; i < size; i += LANES) {
    const Vec normed = _mm512_mul_ps(load(x + i, size - i), factor);
    store(out + i, _mm512_mul_ps(normed, load(weight + i, size - i)), size - i);
  }
}

}  // namespace
