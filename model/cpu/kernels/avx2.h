// Vectors of AVX2 with FMA: 16 floats in two registers, and products in tiles of panels of 8 rows.
#pragma once

#include <immintrin.h>

namespace {

struct Vec { __m256 lo, hi; };
struct Mask { __m256 lo, hi; };  // all bits of a lane, or none
using Words = uint32_t __attribute__((vector_size(64)));

constexpr float EXP_MIN = -87.0f, EXP_MAX = 88.0f;  // so that 2^n is a normal number
constexpr int STREAMED_ROWS = 1;   // one row reads a group of weights once, all of its depth
constexpr int CHUNK_WORDS = 64;    // words multiplied before the next rows or panels are: 16 KB of weights stay cached
constexpr bool WIDENS_BF16 = true; // BF16 weights become FP32 on the way, so activations stay FP32

// Vectors of values that `weigh_values` sums at once, for M rows: as many sums as fit in registers next to the values.
constexpr int value_panels(int m) { return m == 1 ? 4 : m == 2 ? 2 : 1; }

inline Vec operator+(Vec a, Vec b) { return {a.lo + b.lo, a.hi + b.hi}; }
inline Vec operator-(Vec a, Vec b) { return {a.lo - b.lo, a.hi - b.hi}; }
inline Vec operator*(Vec a, Vec b) { return {a.lo * b.lo, a.hi * b.hi}; }
inline Vec operator/(Vec a, Vec b) { return {a.lo / b.lo, a.hi / b.hi}; }

alignas(64) constexpr int32_t LANES_IN[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

inline Mask mask_of(int count) {
  const auto* from = reinterpret_cast<const float*>(LANES_IN) + (count >= LANES ? 0 : LANES - count);
  return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}

inline Mask mask_of_bits(uint64_t bits) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
  const __m256i lo = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), hi = _mm256_slli_epi32(lo, 8);
  return {(__m256)_mm256_cmpeq_epi32(_mm256_and_si256(all, lo), lo),
          (__m256)_mm256_cmpeq_epi32(_mm256_and_si256(all, hi), hi)};
}

inline Vec load(const float* from, int count = LANES) {
  if (count >= LANES) return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
  const Mask m = mask_of(count);
  return {_mm256_maskload_ps(from, (__m256i)m.lo), _mm256_maskload_ps(from + 8, (__m256i)m.hi)};
}

inline void store(float* to, Vec v, int count = LANES) {
  if (count >= LANES) {
    _mm256_storeu_ps(to, v.lo);
    _mm256_storeu_ps(to + 8, v.hi);
  } else {
    const Mask m = mask_of(count);
    _mm256_maskstore_ps(to, (__m256i)m.lo, v.lo);
    _mm256_maskstore_ps(to + 8, (__m256i)m.hi, v.hi);
  }
}

inline Vec load_line(const float* from) { return {_mm256_load_ps(from), _mm256_load_ps(from + 8)}; }
inline void store_line(float* to, Vec v) { _mm256_store_ps(to, v.lo), _mm256_store_ps(to + 8, v.hi); }
inline Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

inline Vec fmadd(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline Vec fnmadd(Vec a, Vec b, Vec c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec abs(Vec v) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, v.lo), _mm256_andnot_ps(sign, v.hi)};
}
inline float first_of(Vec v) { return _mm256_cvtss_f32(v.lo); }
inline float reduce_add(Vec v) {
  const __m256 a = v.lo + v.hi;
  const __m128 b = _mm256_castps256_ps128(a) + _mm256_extractf128_ps(a, 1), c = b + _mm_movehl_ps(b, b);
  return c[0] + c[1];
}
inline float reduce_max(Vec v) {
  const __m256 a = _mm256_max_ps(v.lo, v.hi);
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return c[0] > c[1] ? c[0] : c[1];
}

inline Mask above(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
}
inline Mask equal(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
}
inline Mask odd(const Words& w) {
  __m256i half[2];
  std::memcpy(half, &w, sizeof half);
  const __m256i one = _mm256_set1_epi32(1);
  return {(__m256)_mm256_cmpeq_epi32(_mm256_and_si256(half[0], one), one),
          (__m256)_mm256_cmpeq_epi32(_mm256_and_si256(half[1], one), one)};
}
inline int not_numbers(Vec v) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(v.lo, v.lo, _CMP_UNORD_Q),
                                         _mm256_cmp_ps(v.hi, v.hi, _CMP_UNORD_Q)));
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
inline Vec keep(Mask m, Vec v) { return {_mm256_and_ps(m.lo, v.lo), _mm256_and_ps(m.hi, v.hi)}; }
inline Vec multiply_where(Mask m, Vec a, Vec b, Vec no) { return select(m, a * b, no); }

inline Vec round(Vec v) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.lo, nearest), _mm256_round_ps(v.hi, nearest)};
}

// v * 2^n for normal results: n goes into the exponent's bits.
inline Vec scale_by_power(Vec v, Vec n) {
  const auto scale = [](__m256 x, __m256 by) {
    return (__m256)_mm256_add_epi32((__m256i)x, _mm256_slli_epi32(_mm256_cvtps_epi32(by), 23));
  };
  return {scale(v.lo, n.lo), scale(v.hi, n.hi)};
}

// x = mantissa * 2^exponent, with a mantissa around 1; x is a normal number.
inline void split(Vec x, Vec& mantissa, Vec& exponent) {
  const auto part = [](__m256 from, __m256& fraction, __m256& power) {
    const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32((__m256i)from, _mm256_set1_epi32(0x3F3504F3)), 23);
    fraction = (__m256)_mm256_sub_epi32((__m256i)from, _mm256_slli_epi32(e, 23));
    power = _mm256_cvtepi32_ps(e);
  };
  part(x.lo, mantissa.lo, exponent.lo);
  part(x.hi, mantissa.hi, exponent.hi);
}

inline __m256 widen_bf16(__m128i bits) { return (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16); }

inline Vec load_bf16(const uint16_t* from, int count = LANES) {
  alignas(16) uint16_t some[LANES] = {};
  if (count < LANES) from = static_cast<uint16_t*>(std::memcpy(some, from, count * sizeof *from));
  const auto* bits = reinterpret_cast<const __m128i*>(from);
  return {widen_bf16(_mm_loadu_si128(bits)), widen_bf16(_mm_loadu_si128(bits + 1))};
}

// To the nearest, of two as near to the even one; a NaN stays one.
inline __m256i round_bf16(__m256 v) {
  const __m256i bits = (__m256i)v, high = _mm256_srli_epi32(bits, 16);
  const __m256i even = _mm256_add_epi32(_mm256_set1_epi32(0x7FFF), _mm256_and_si256(high, _mm256_set1_epi32(1)));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, even), 16);
  const __m256i none = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  return (__m256i)_mm256_blendv_ps((__m256)rounded, (__m256)none, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

inline void store_bf16(uint16_t* to, Vec v, int count = LANES) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(round_bf16(v.lo), round_bf16(v.hi)), 0xD8);
  if (count >= LANES) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
  else std::memcpy(to, &packed, count * sizeof *to);
}

// Numbers of -127 to 127, rounded, as activations of INT8 products.
inline void store_int8(uint8_t* to, Vec v, int count) {
  const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi));
  const __m256i words = _mm256_permute4x64_epi64(mixed, 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  if (count >= LANES) _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  else std::memcpy(to, &bytes, count);
}

// The integer sums of an INT8 product as floats. Both factors are signed here, so there is nothing to undo.
inline Vec int8_sums(const float* sums, const int32_t*, int) {
  const auto* from = reinterpret_cast<const __m256i*>(sums);
  return {_mm256_cvtepi32_ps(_mm256_load_si256(from)), _mm256_cvtepi32_ps(_mm256_load_si256(from + 1))};
}

// Transpose an 8 x 8 square of words in place.
inline void transpose(__m256 r[8]) {
  __m256 t[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4)
    UNROLL for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xEE);
    }
  UNROLL for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
    t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
  }
  UNROLL for (int j = 0; j < 8; ++j) r[j] = t[j];
}

// to[word * stride + row] = the words of up to 16 rows from byte `offset` on; 0 beyond `count` rows and `words` words.
inline void transpose_rows(const char* const* rows, int count, size_t offset, int words, uint32_t* to, int stride) {
  for (int row = 0; row < LANES; row += 8)
    for (int word = 0; word < LANES; word += 8) {
      __m256 square[8];
      UNROLL for (int t = 0; t < 8; ++t) {
        const auto from = [&] { return reinterpret_cast<const float*>(rows[row + t] + offset) + word; };
        if (row + t >= count || word >= words) square[t] = _mm256_setzero_ps();
        else if (words - word >= 8) square[t] = _mm256_loadu_ps(from());
        else square[t] = _mm256_maskload_ps(from(), (__m256i)mask_of(words - word).lo);
      }
      transpose(square);
      UNROLL for (int i = 0; i < 8; ++i)
        _mm256_store_ps(reinterpret_cast<float*>(to) + (word + i) * stride + row, square[i]);
    }
}

// How many panels of 8 rows a tile of M rows takes at once, of PANELS: its sums must fit in registers, and be enough
// to hide the latency of an addition.
template <int M, int PANELS>
constexpr int tile_panels() { return M == 1 ? PANELS : M >= 3 ? 2 : PANELS % 4 ? 3 : 4; }

// The steps of a product in assembly, which leaves g++ no choice: of its own it keeps words for later, copies factors
// before it overwrites them, reorders integer sums, and so runs out of registers.
using Word8 = __m256i_u;
using Number = float __attribute__((may_alias));

template <int PART>
inline __m256 widen_bf16(const uint32_t* words) {  // the even (0) or odd (1) number of eight words
  alignas(32) static constexpr uint32_t HIGH[8] = {~0xFFFFu, ~0xFFFFu, ~0xFFFFu, ~0xFFFFu,
                                                   ~0xFFFFu, ~0xFFFFu, ~0xFFFFu, ~0xFFFFu};
  const auto& from = *reinterpret_cast<const Word8*>(words);
  __m256 to;
  if constexpr (PART == 0) __asm__("vmovdqu %1, %0\n\tvpslld $16, %0, %0" : "=x"(to) : "m"(from));
  else __asm__("vmovdqa %2, %0\n\tvpand %1, %0, %0" : "=&x"(to) : "m"(from), "m"(HIGH));
  return to;
}

inline __m256 broadcast_from(const uint32_t* number) {
  __m256 to;
  __asm__("vbroadcastss %1, %0" : "=x"(to) : "m"(*reinterpret_cast<const Number*>(number)));
  return to;
}

inline void add_product(__m256& sum, __m256 a, __m256 b) {
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}

// Four INT8 numbers with eight words of weights. One factor must be unsigned: |w|, times a with the sign of w. Two such
// products fit in 16 bits.
inline void add_int8_products(__m256& sum, const uint32_t* number, __m256i weights, __m256i sizes, __m256i ones) {
  __m256i x;
  __asm__("vpbroadcastd %2, %1\n\tvpsignb %3, %1, %1\n\tvpmaddubsw %1, %4, %1\n\tvpmaddwd %5, %1, %1\n\t"
          "vpaddd %1, %0, %0"
          : "+x"(sum), "=&x"(x) : "m"(*number), "x"(weights), "x"(sizes), "x"(ones));
}

// One number of each of M rows, `stride` apart, times Q panels of 8 rows of weights. The shorter side is kept.
template <Kind K, int PART, int M, int Q>
inline void add_products(const uint32_t* a, int stride, const uint32_t* w, __m256 (&sums)[M][Q]) {
  const auto weights = [&](int q) {
    if constexpr (K == F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(w) + q * 8);
    else return widen_bf16<PART>(w + q * 8);
  };
  if constexpr (Q > M) {
    __m256 x[M];
    UNROLL for (int m = 0; m < M; ++m) x[m] = broadcast_from(a + m * stride);
    UNROLL for (int q = 0; q < Q; ++q) {
      const __m256 b = weights(q);
      UNROLL for (int m = 0; m < M; ++m) add_product(sums[m][q], x[m], b);
    }
  } else {
    __m256 b[Q];
    UNROLL for (int q = 0; q < Q; ++q) b[q] = weights(q);
    UNROLL for (int m = 0; m < M; ++m) {
      const __m256 x = broadcast_from(a + m * stride);
      UNROLL for (int q = 0; q < Q; ++q) add_product(sums[m][q], x, b[q]);
    }
  }
}

// As `multiply`, for Q panels of 8 rows out of WIDTH / 8.
template <Kind K, int M, int Q, int WIDTH, bool MORE>
inline void multiply_panels(const uint32_t* a, int stride, const uint32_t* w, int depth, float* out) {
  __m256 sums[M][Q];  // in registers: every loop over it is unrolled
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int q = 0; q < Q; ++q) {
      if constexpr (MORE) sums[m][q] = _mm256_load_ps(out + m * WIDTH + q * 8);
      else sums[m][q] = _mm256_setzero_ps();
    }
  // The weights come from memory: 8 KB ahead, or, in several passes, each pass its share of the next chunk.
  constexpr int AHEAD = Q * 8 == WIDTH ? 2048 : CHUNK_WORDS * WIDTH;
  const __m256i ones = _mm256_set1_epi16(1);
  for (int k = 0; k < depth; ++k, w += WIDTH) {
    if constexpr (WIDTH > 32)
      UNROLL for (int q = 0; q < Q; q += 2)
        _mm_prefetch(reinterpret_cast<const char*>(w + AHEAD + q * 8), _MM_HINT_T0);
    if constexpr (K == INT8) {
      UNROLL for (int q = 0; q < Q; ++q) {
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + q * 8)), size = _mm256_abs_epi8(b);
        UNROLL for (int m = 0; m < M; ++m) add_int8_products(sums[m][q], a + m * stride + k, b, size, ones);
      }
    } else if constexpr (K == F32) {
      add_products<K, 0>(a + k, stride, w, sums);
    } else {
      add_products<K, 0>(a + 2 * k, stride, w, sums);
      add_products<K, 1>(a + 2 * k + 1, stride, w, sums);
    }
  }
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int q = 0; q < Q; ++q) _mm256_store_ps(out + m * WIDTH + q * 8, sums[m][q]);
}

// out[M][P * 16] = (or, with MORE, +=) M rows of `a` times `depth` words of P panels. Each sum takes its numbers in
// their order, whatever the tile.
template <Kind K, int M, int P, bool MORE>
inline void multiply(const uint32_t* a, int stride, const uint32_t* w, int depth, float* out) {
  constexpr int WIDTH = P * LANES, Q = tile_panels<M, 2 * P>();
  static_assert(2 * P % Q == 0);
  for (int column = 0; column < WIDTH; column += Q * 8)
    multiply_panels<K, M, Q, WIDTH, MORE>(a, stride, w + column, depth, out + column);
}

}  // namespace
