// Arithmetic on vectors of 16 floats, and RMSNorm. `count` is how many of the 16 exist: the rest read as 0 and are not
// written; more than 16 counts as 16. Vectors themselves, masks and the innermost products are in a header for each
// instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int LANES = 16;  // floats in a vector
enum Kind : int32_t { F32 = 0, BF16 = 1, INT8 = 2 };

}  // namespace

#ifdef __AVX512F__
#include "avx512.h"
#else
#include "avx2.h"
#endif

namespace {

inline Vec exp(Vec x) {
  x = min(max(x, broadcast(EXP_MIN)), broadcast(EXP_MAX));
  const Vec n = round(x * broadcast(1.44269504f));
  Vec r = fnmadd(n, broadcast(0.693145752f), x);
  r = fnmadd(n, broadcast(1.42860677e-6f), r);
  Vec p = broadcast(1.0f / 5040);  // Taylor on |r| <= 0.347: the next term is 1e-8
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fmadd(p, r, broadcast(c));
  return scale_by_power(p, n);
}

inline Vec log(Vec x) {  // of positive numbers
  Vec mantissa, exponent;
  split(x, mantissa, exponent);
  const Vec f = mantissa - broadcast(1.0f), s = f / (f + broadcast(2.0f));
  const Vec s2 = s * s;
  Vec p = broadcast(2.0f / 11);  // log((1 + s) / (1 - s)) as a series in s, |s| <= 0.172
  for (float c : {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f}) p = fmadd(p, s2, broadcast(c));
  return fmadd(exponent, broadcast(0.693147181f), p * s);
}

inline Vec sigmoid(Vec x) { return broadcast(1.0f) / (broadcast(1.0f) + exp(zero() - x)); }

inline Vec softplus(Vec x) {
  const Vec e = exp(x), u = e + broadcast(1.0f), rest = u - broadcast(1.0f);
  // log(1 + e) without losing a small e (Kahan): the rounding error of 1 + e is divided out.
  const Vec y = log(u) * e / rest;
  const Vec small = select(equal(rest, zero()), e, y);
  return select(above(x, broadcast(20.0f)), x, small);
}

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// out[size] = x / sqrt(mean(x^2) + eps) * weight; `out` may be `x`.
inline void rms_norm(const float* x, const float* weight, float eps, int size, float* out) {
  Vec sum = zero();
  for (int i = 0; i < size; i += LANES) {
    const Vec v = load(x + i, size - i);
    sum = fmadd(v, v, sum);
  }
  const Vec factor = broadcast(1.0f / std::sqrt(reduce_add(sum) / static_cast<float>(size) + eps));
  for (int i = 0; i < size; i += LANES) {
    const Vec normed = load(x + i, size - i) * factor;
    store(out + i, normed * load(weight + i, size - i), size - i);
  }
}

}  // namespace
