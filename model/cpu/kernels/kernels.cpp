// The CPU's fast path: the network's operations, fused, over packed weights, for AVX-512 with BF16 and VNNI.
//
// A plain C interface (at the end) that any compiler can build and `native.py` calls. What each operation computes
// is written in plain torch in `backend.py`, and the tests compare the two.
//
// Every number of a result is summed in one fixed order, whatever else is in the step: a token's bits do not depend
// on its company, on chunks or on the number of threads. That is why the products here have one loop for one row and
// for a thousand, and attention goes over the keys in runs of 32 from position 0.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace {

#define UNROLL _Pragma("GCC unroll 16")
constexpr int LANES = 16;          // floats in a vector
constexpr int ROW_CHUNK = 96;      // rows whose sums stay in the first-level cache, a multiple of 6
constexpr int DEPTH_CHUNK = 512;   // bytes of a row multiplied before the next rows are, so that weights stay there
constexpr int RUN = 32;            // keys that attention takes at a time
constexpr int QUERY_TILE = 16;     // queries of a prompt that share the keys and values they read
constexpr int MOST_HEAD_DIM = 256;
constexpr int MOST_GROUP = 16;     // query heads to a KV head

// ---- threads -------------------------------------------------------------------------------------------------------

// A few threads that share out the tasks of one job at a time. The caller works too, and waits only for those who
// have begun: a helper whose core is taken by somebody else is not missed.
class Pool {
 public:
  void resize(int threads) {
    stop();
    quit_ = false;
    shares_ = std::vector<Share>(threads);
    for (int i = 1; i < threads; ++i) helpers_.emplace_back([this, i] { help(i); });
  }

  int size() const { return static_cast<int>(helpers_.size()) + 1; }

  template <class Body>
  void run(int tasks, const Body& body) {  // body(task, thread)
    if (tasks <= 1 || helpers_.empty()) {
      for (int task = 0; task < tasks; ++task) body(task, 0);
      return;
    }
    call_ = [](const void* data, int task, int thread) { (*static_cast<const Body*>(data))(task, thread); };
    data_ = &body;
    for (int i = 0, n = size(); i < n; ++i) {
      shares_[i].next.store(tasks * i / n, std::memory_order_relaxed);
      shares_[i].end = tasks * (i + 1) / n;
    }
    open_.store(true);
    jobs_.fetch_add(1);
    if (sleeping_.load()) jobs_.notify_all();
    work(0);
    open_.store(false);
    for (int spins = 0; inside_.load(); ++spins) rest(spins);
  }

 private:
  static void rest(int spins) {
    if (spins < 20000) _mm_pause(); else std::this_thread::yield();
  }

  // Each has a share of neighbouring tasks, which lie beside each other in memory; then it helps with the others'.
  void work(int thread) {
    for (int i = 0, n = size(); i < n; ++i) {
      Share& share = shares_[(thread + i) % n];
      for (int task; (task = share.next.fetch_add(1)) < share.end;) call_(data_, task, thread);
    }
  }

  void help(int thread) {
    for (uint32_t seen = 0;;) {
      // The next job of a step comes within microseconds: spin that long, then sleep and leave the core to others.
      for (int spins = 0; jobs_.load() == seen && spins < 2000; ++spins) _mm_pause();
      if (jobs_.load() == seen) {
        sleeping_.fetch_add(1);
        jobs_.wait(seen);
        sleeping_.fetch_sub(1);
      }
      if (quit_.load()) return;
      inside_.fetch_add(1);
      seen = jobs_.load();
      if (open_.load()) work(thread);
      inside_.fetch_sub(1);
    }
  }

  void stop() {
    quit_ = true;
    jobs_.fetch_add(1);
    jobs_.notify_all();
    for (auto& helper : helpers_) helper.join();
    helpers_.clear();
  }

  struct alignas(64) Share {
    std::atomic<int> next{0};
    int end = 0;
  };

  std::vector<std::thread> helpers_;
  std::vector<Share> shares_{1};
  void (*call_)(const void*, int, int) = nullptr;
  const void* data_ = nullptr;
  alignas(64) std::atomic<uint32_t> jobs_{0};
  alignas(64) std::atomic<int> inside_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> open_{false}, quit_{false};
};

Pool& pool = *new Pool;  // never destroyed: at the end of the process its threads just end with it
std::mutex in_use;       // one operation at a time, whoever calls

// Memory that is kept from call to call and grows; what was in it is lost when it does.
class Scratch {
 public:
  template <class T>
  T* get(size_t count) {
    size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      bytes = std::max(bytes, 2 * size_);  // rarely: each time leaves a hole in the heap, which may fit nobody
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) std::abort();
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// ---- vectors -------------------------------------------------------------------------------------------------------

using Vec = __m512;

inline __mmask16 head(int count) { return count >= LANES ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1); }
inline Vec load(const float* from, int count = LANES) { return _mm512_maskz_loadu_ps(head(count), from); }
inline void store(float* to, Vec v, int count = LANES) { _mm512_mask_storeu_ps(to, head(count), v); }
inline Vec all(float x) { return _mm512_set1_ps(x); }

inline Vec exp(Vec x) {
  x = _mm512_min_ps(_mm512_max_ps(x, all(-104.0f)), all(88.7f));
  const Vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  Vec r = _mm512_fnmadd_ps(n, all(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, all(1.42860677e-6f), r);
  Vec p = all(1.0f / 5040);  // Taylor on |r| <= 0.347: the next term is 1e-8
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, all(c));
  return _mm512_scalef_ps(p, n);
}

inline Vec log(Vec x) {  // of positive numbers
  Vec mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src), exponent = _mm512_getexp_ps(x);
  const __mmask16 large = _mm512_cmp_ps_mask(mantissa, all(1.41421356f), _CMP_GT_OQ);
  mantissa = _mm512_mask_mul_ps(mantissa, large, mantissa, all(0.5f));
  exponent = _mm512_mask_add_ps(exponent, large, exponent, all(1.0f));
  const Vec f = _mm512_sub_ps(mantissa, all(1.0f)), s = _mm512_div_ps(f, _mm512_add_ps(f, all(2.0f)));
  const Vec s2 = _mm512_mul_ps(s, s);
  Vec p = all(2.0f / 11);  // log((1 + s) / (1 - s)) as a series in s, |s| <= 0.172
  for (float c : {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f}) p = _mm512_fmadd_ps(p, s2, all(c));
  return _mm512_fmadd_ps(exponent, all(0.693147181f), _mm512_mul_ps(p, s));
}

inline Vec sigmoid(Vec x) {
  return _mm512_div_ps(all(1.0f), _mm512_add_ps(all(1.0f), exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

inline Vec softplus(Vec x) {
  const Vec e = exp(x), u = _mm512_add_ps(e, all(1.0f)), rest = _mm512_sub_ps(u, all(1.0f));
  // log(1 + e) without losing a small e (Kahan): the rounding of 1 + e is divided out again.
  const Vec y = _mm512_div_ps(_mm512_mul_ps(log(u), e), rest);
  const Vec small = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(rest, _mm512_setzero_ps(), _CMP_EQ_OQ), y, e);
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, all(20.0f), _CMP_GT_OQ), small, x);
}

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

inline Vec load_bf16(const uint16_t* from, int count = LANES) {
  const __m256i bits = _mm256_maskz_loadu_epi16(head(count), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store_bf16(uint16_t* to, Vec v, int count = LANES) {
  _mm256_mask_storeu_epi16(to, head(count), (__m256i)_mm512_cvtneps_pbh(v));
}

// ---- products ------------------------------------------------------------------------------------------------------

enum Kind : int32_t { F32 = 0, BF16 = 1, INT8 = 2 };

template <Kind K> struct Element;
template <> struct Element<F32> { using Activation = float; using Sum = __m512; };
template <> struct Element<BF16> { using Activation = uint16_t; using Sum = __m512; };
template <> struct Element<INT8> { using Activation = uint8_t; using Sum = __m512i; };
template <Kind K> constexpr int PER_WORD = K == F32 ? 1 : K == BF16 ? 2 : 4;  // numbers multiplied in one 32-bit lane

}  // namespace

// Weights [n, k] as `native.py` packs them: groups of 16 * panels rows; in a group the words (of one FP32, two BF16 or
// four INT8 numbers along k) of all its rows lie beside each other, so that a group is one run of memory.
struct Matrix {
  const void* data;
  const float* scales;    // INT8: [n], what a unit is worth
  const int32_t* totals;  // INT8: [n], 128 times the sum of the row, since activations are stored with 128 added
  int32_t n, k, kind, panels;
};

namespace {

inline int words(const Matrix& w) {
  const int per_word = w.kind == F32 ? 1 : w.kind == BF16 ? 2 : 4;
  return (w.k + per_word - 1) / per_word;
}
inline int groups(const Matrix& w) { return (w.n + LANES * w.panels - 1) / (LANES * w.panels); }

// The rows that a matrix is multiplied with, in its kind: `stride` words from row to row.
struct Rows {
  uint32_t* data;
  float* scales;  // INT8: one per row
  int stride;
};

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
        // As an intrinsic, g++ keeps moving these sums between registers and memory, at half the speed.
        else __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[m][p]) : "v"(x), "v"(b[p]));
      }
    }
  }
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int p = 0; p < P; ++p) _mm512_store_ps(out + (m * P + p) * LANES, (__m512)sums[m][p]);
}

template <Kind K, int P, int M = 6>
inline void multiply_rows(int rows, const uint32_t* a, int stride, const uint32_t* w, int depth, float* out, bool more) {
  if constexpr (M > 0) {
    for (; rows >= M; rows -= M, a += M * stride, out += M * P * LANES) {
      if (more) multiply<K, M, P, true>(a, stride, w, depth, out);
      else multiply<K, M, P, false>(a, stride, w, depth, out);
    }
    if (rows) multiply_rows<K, P, M - 1>(rows, a, stride, w, depth, out, more);
  }
}

// Rows [first, last) times one group of a matrix; done(row, sums) gets each row's 16 * panels sums as FP32.
template <Kind K, int P, class Done>
inline void multiply_group(const Rows& a, int first, int last, const Matrix& w, int group, const Done& done) {
  alignas(64) float tile[ROW_CHUNK * P * LANES];
  const int depth = words(w), step = DEPTH_CHUNK / 4;
  const uint32_t* weights = static_cast<const uint32_t*>(w.data) + static_cast<size_t>(group) * depth * P * LANES;
  for (int row = first; row < last; row += ROW_CHUNK) {
    const int count = last - row < ROW_CHUNK ? last - row : ROW_CHUNK;
    const uint32_t* data = a.data + static_cast<size_t>(row) * a.stride;
    if (count <= 6) {
      multiply_rows<K, P>(count, data, a.stride, weights, depth, tile, false);
    } else {
      for (int k = 0; k < depth; k += step)
        multiply_rows<K, P>(count, data + k, a.stride, weights + static_cast<size_t>(k) * P * LANES,
                            depth - k < step ? depth - k : step, tile, k > 0);
    }
    for (int i = 0; i < count; ++i) {
      float* sums = tile + i * P * LANES;
      if constexpr (K == INT8) {
        const int column = group * P * LANES;
        for (int p = 0; p < P; ++p) {
          const int left = w.n - column - p * LANES;
          if (left <= 0) break;
          const __m512i total = _mm512_maskz_loadu_epi32(head(left), w.totals + column + p * LANES);
          const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + p * LANES), total);
          const Vec scale = _mm512_mul_ps(load(w.scales + column + p * LANES, left), all(a.scales[row + i]));
          _mm512_store_ps(sums + p * LANES, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
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
    store(out + column, _mm512_load_ps(sums + p * LANES), w.n - column);
}

// The whole product, shared out by groups, and by rows when there are many: done(row, group, sums).
template <int P, class Done>
void matmul(const Rows& a, int rows, const Matrix& w, const Done& done) {
  const int chunks = (rows + ROW_CHUNK - 1) / ROW_CHUNK, all_groups = groups(w);
  pool.run(all_groups * chunks, [&](int task, int) {
    const int group = task / chunks, first = task % chunks * ROW_CHUNK;
    product<P>(a, first, first + ROW_CHUNK < rows ? first + ROW_CHUNK : rows, w, group,
               [&](int row, const float* sums) { done(row, group, sums); });
  });
}

// Puts 16 numbers of a row, from `at` on, into the kind of the matrix; not for INT8, which needs the whole row first.
inline void put(const Rows& to, int64_t row, int at, Vec v, int count, int kind) {
  uint32_t* data = to.data + static_cast<size_t>(row) * to.stride;
  if (kind == F32) store(reinterpret_cast<float*>(data) + at, v, count);
  else store_bf16(reinterpret_cast<uint16_t*>(data) + at, v, count);
}

inline void put_int8(const Rows& to, int64_t row, const float* from, int k) {
  Vec largest = _mm512_setzero_ps();
  int not_numbers = 0;
  for (int i = 0; i < k; i += LANES) {
    const Vec v = load(from + i, k - i);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
    not_numbers |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  }
  const float most = _mm512_reduce_max_ps(largest);
  to.scales[row] = not_numbers ? NAN : most / 127.0f;
  const Vec factor = all(most > 0.0f ? 127.0f / most : 0.0f);
  uint8_t* data = reinterpret_cast<uint8_t*>(to.data + static_cast<size_t>(row) * to.stride);
  for (int i = 0; i < k; i += LANES) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load(from + i, k - i), factor));
    const __m512i shifted = _mm512_add_epi32(rounded, _mm512_set1_epi32(128));
    _mm_mask_storeu_epi8(data + i, head(k - i), _mm512_cvtepi32_epi8(shifted));
  }
}

inline void put_row(const Rows& to, int64_t row, const float* from, int k, int kind) {
  if (kind == INT8) return put_int8(to, row, from, k);
  for (int i = 0; i < k; i += LANES) put(to, row, i, load(from + i, k - i), k - i, kind);
}

// Room for rows that go with `w`. The words beyond k are zero: nobody writes to them.
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

RowScratch inputs, beside, inner;
Scratch wide, order;

template <class Body>
void for_rows(int rows, const Body& body) {
  const int step = rows < 1 ? 1 : rows < 4 ? rows : 4;
  pool.run((rows + step - 1) / step, [&](int task, int) {
    for (int row = task * step; row < rows && row < (task + 1) * step; ++row) body(row);
  });
}

// RMSNorm of one row: x / sqrt(mean(x^2) + eps) * weight.
inline void rms_norm(const float* x, const float* weight, float eps, int size, float* out) {
  Vec sum = _mm512_setzero_ps();
  for (int i = 0; i < size; i += LANES) {
    const Vec v = load(x + i, size - i);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  const Vec factor = all(1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(size) + eps));
  for (int i = 0; i < size; i += LANES) {
    const Vec normed = _mm512_mul_ps(load(x + i, size - i), factor);
    store(out + i, _mm512_mul_ps(normed, load(weight + i, size - i)), size - i);
  }
}

}  // namespace

// ---- attention -----------------------------------------------------------------------------------------------------

// What a step's tokens have in common in all layers: T tokens of S sequences.
struct Step {
  const float *cos, *sin;                // [T, head_dim / 2]
  const int64_t* slots;                  // [T]
  const int32_t* tables;                 // [S, table_stride]
  const int32_t *query_lens, *seq_lens;  // [S]
  int64_t page_bytes;                    // from one page of a layer to the next
  int32_t tokens, sequences, table_stride, block_size;
};

struct Attention {
  const Matrix *kqv, *out;
  const float *input_norm, *q_norm, *k_norm;  // [H], and [head_dim] or null
  float eps, head_eps;
  int32_t size, heads, kv_heads, head_dim, window, kind;  // kind: of the pages, BF16 or FP32
};

namespace {

// Columns of a 16 x 16 square of words, whose rows come in `r`, as rows.
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

constexpr int MOST_ROWS = QUERY_TILE * MOST_GROUP;

struct alignas(64) AttentionScratch {
  uint32_t keys[MOST_HEAD_DIM * RUN];  // a run of keys, word by word
  float values[RUN * MOST_HEAD_DIM];
  float scores[MOST_ROWS * RUN];
  uint32_t queries[MOST_ROWS * MOST_HEAD_DIM];
  float sums[MOST_ROWS * MOST_HEAD_DIM];
  float largest[MOST_ROWS], total[MOST_ROWS];
};

// sums[M][64 numbers from d] += weights[M][tokens] times the values' 64 numbers from d
template <int M>
inline void weigh_values(const float* weights, const float* values, int tokens, int width, float* sums) {
  Vec acc[M][4];
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int j = 0; j < 4; ++j) acc[m][j] = _mm512_load_ps(sums + m * width + j * LANES);
  for (int t = 0; t < tokens; ++t) {
    Vec v[4];
    UNROLL for (int j = 0; j < 4; ++j) v[j] = _mm512_load_ps(values + t * width + j * LANES);
    UNROLL for (int m = 0; m < M; ++m) {
      const Vec p = all(weights[m * RUN + t]);
      UNROLL for (int j = 0; j < 4; ++j) acc[m][j] = _mm512_fmadd_ps(p, v[j], acc[m][j]);
    }
  }
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int j = 0; j < 4; ++j) _mm512_store_ps(sums + m * width + j * LANES, acc[m][j]);
}

template <int M = 6>
inline void weigh_rows(int rows, const float* weights, const float* values, int tokens, int width, float* sums) {
  if constexpr (M > 0) {
    for (; rows >= M; rows -= M, weights += M * RUN, sums += M * width)
      for (int d = 0; d < width; d += 4 * LANES) weigh_values<M>(weights, values + d, tokens, width, sums + d);
    if (rows) weigh_rows<M - 1>(rows, weights, values, tokens, width, sums);
  }
}

// Which keys of a run from `at` on a query at `place` sees: up to itself, and no further back than the window.
inline uint64_t visible(int place, int at, int window) {
  uint64_t seen = place - at >= RUN - 1 ? ~0ull : place < at ? 0ull : (2ull << (place - at)) - 1;
  const int hidden = window ? place - window + 1 - at : 0;  // of the first keys
  if (hidden > 0) seen = hidden >= RUN ? 0ull : seen & ~((1ull << hidden) - 1);
  return seen;
}

// Turns the scores of one query with a run of keys into weights, and what was summed before to the new scale.
inline void softmax_run(AttentionScratch& s, int row, uint64_t seen, float scale, int width) {
  constexpr int PARTS = RUN / LANES;
  float* scores = s.scores + row * RUN;
  Vec part[PARTS], most = all(-INFINITY), sum = _mm512_setzero_ps();
  UNROLL for (int i = 0; i < PARTS; ++i) {
    const __mmask16 mask = static_cast<__mmask16>(seen >> (i * LANES));
    part[i] = _mm512_mask_mul_ps(all(-INFINITY), mask, _mm512_load_ps(scores + i * LANES), all(scale));
    most = _mm512_max_ps(most, part[i]);
  }
  const float before = s.largest[row], found = _mm512_reduce_max_ps(most), largest = found > before ? found : before;
  UNROLL for (int i = 0; i < PARTS; ++i) {
    const __mmask16 mask = static_cast<__mmask16>(seen >> (i * LANES));
    part[i] = _mm512_maskz_mov_ps(mask, exp(_mm512_sub_ps(part[i], all(largest))));
    sum = _mm512_add_ps(sum, part[i]);
    _mm512_store_ps(scores + i * LANES, part[i]);
  }
  if (largest > before) {
    const float factor = before == -INFINITY ? 0.0f : _mm512_cvtss_f32(exp(all(before - largest)));
    s.largest[row] = largest;
    s.total[row] *= factor;
    for (int d = 0; d < width; d += LANES)
      _mm512_store_ps(s.sums + row * width + d, _mm512_mul_ps(_mm512_load_ps(s.sums + row * width + d), all(factor)));
  }
  s.total[row] += _mm512_reduce_add_ps(sum);
}

// Where a sequence's keys (or values) of one head lie: one row after the other, page by page.
struct Walk {
  const int32_t* table;
  size_t page_bytes, row_bytes, head;
  int block_size, block, offset;

  size_t place() const { return table[block] * page_bytes + head + offset * row_bytes; }
  void next() {
    if (++offset == block_size) ++block, offset = 0;
  }
  // Asks for up to `rows` rows from here on, which are somewhere else in memory.
  void prefetch(const void* keys, const void* values, int rows) {
    while (rows > 0) {
      const int here = block_size - offset < rows ? block_size - offset : rows;
      for (size_t i = 0, at = place(); i < here * row_bytes; i += 64) {
        _mm_prefetch(static_cast<const char*>(keys) + at + i, _MM_HINT_T0);
        _mm_prefetch(static_cast<const char*>(values) + at + i, _MM_HINT_T0);
      }
      rows -= here;
      offset += here;
      if (offset == block_size) ++block, offset = 0;
    }
  }
};

// Causal attention of `count` queries of one sequence, from flat token `first` and position `position`, for the query
// heads of one KV head: one pass over the keys in runs, with the softmax rescaled as larger scores turn up.
//
// Args: kqv [T, (kv_heads + heads + kv_heads) * head_dim], normed and rotated; pages [kv_heads, block_size, head_dim],
// page_bytes apart; out [T, heads * head_dim].
template <Kind K>
void attend(const Attention& a, const Step& step, const float* kqv, const void* all_keys, const void* all_values,
            AttentionScratch& s, int sequence, int first, int count, int position, int kv_head, float* out) {
  const int dim = a.head_dim, group = a.heads / a.kv_heads, rows = count * group;
  const int row_words = K == BF16 ? dim / 2 : dim, width = (dim + 63) / 64 * 64;
  const int row_size = (a.kv_heads * 2 + a.heads) * dim;
  const int last = position + count - 1;
  const int begin = a.window && position >= a.window ? (position - a.window + 1) / RUN * RUN : 0;
  const size_t row_bytes = static_cast<size_t>(row_words) * 4, head_bytes = row_bytes * step.block_size;
  Walk at_row{step.tables + static_cast<size_t>(sequence) * step.table_stride, static_cast<size_t>(step.page_bytes), row_bytes,
              head_bytes * kv_head, step.block_size, begin / step.block_size, begin % step.block_size};
  Walk ahead = at_row;
  ahead.prefetch(all_keys, all_values, last + 1 - begin < RUN ? last + 1 - begin : RUN);
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  for (int row = 0; row < rows; ++row) {
    const float* q = kqv + static_cast<size_t>(first + row / group) * row_size +
                     (a.kv_heads + kv_head * group + row % group) * dim;
    put_row(Rows{s.queries, nullptr, row_words}, row, q, dim, K);
    s.largest[row] = -INFINITY;
    s.total[row] = 0.0f;
    std::memset(s.sums + row * width, 0, width * sizeof(float));
  }
  for (int at = begin; at <= last; at += RUN) {
    const int tokens = last + 1 - at < RUN ? last + 1 - at : RUN;
    int wanted = last + 1 - at - RUN < RUN ? last + 1 - at - RUN : RUN;  // of the next run, asked for bit by bit
    const auto prefetch_some = [&] {
      if (wanted > 0) ahead.prefetch(all_keys, all_values, wanted < RUN / 8 ? wanted : RUN / 8), wanted -= RUN / 8;
    };
    const char* key_rows[RUN];
    for (int t = 0; t < tokens; ++t, at_row.next()) {
      const size_t place = at_row.place();
      key_rows[t] = static_cast<const char*>(all_keys) + place;
      const char* value = static_cast<const char*>(all_values) + place;
      for (int d = 0; d < dim; d += LANES) {
        const Vec v = K == BF16 ? load_bf16(reinterpret_cast<const uint16_t*>(value) + d, dim - d)
                                : load(reinterpret_cast<const float*>(value) + d, dim - d);
        _mm512_store_ps(s.values + t * width + d, v);
      }
    }
    for (int half = 0; half < RUN; half += LANES)
      for (int word = 0; word < row_words; word += LANES) {
        prefetch_some();
        __m512i square[LANES];
        for (int t = 0; t < LANES; ++t)
          square[t] = half + t < tokens
                          ? _mm512_maskz_loadu_epi32(head(row_words - word), key_rows[half + t] + word * 4)
                          : _mm512_setzero_si512();
        transpose(square);
        for (int i = 0; i < LANES; ++i) _mm512_store_si512(s.keys + (word + i) * RUN + half, square[i]);
      }
    prefetch_some();
    multiply_rows<K, RUN / LANES>(rows, s.queries, row_words, s.keys, row_words, s.scores, false);
    for (int row = 0; row < rows; ++row) {
      if (row < 3) prefetch_some();
      const uint64_t seen = visible(position + row / group, at, a.window);
      if (seen) softmax_run(s, row, seen, scale, width);
      else std::memset(s.scores + row * RUN, 0, RUN * sizeof(float));
    }
    while (wanted > 0) prefetch_some();
    weigh_rows(rows, s.scores, s.values, tokens, width, s.sums);
  }
  for (int row = 0; row < rows; ++row) {
    float* to = out + (static_cast<size_t>(first + row / group) * a.heads + kv_head * group + row % group) * dim;
    const Vec factor = all(1.0f / s.total[row]);
    for (int d = 0; d < dim; d += LANES)
      store(to + d, _mm512_mul_ps(_mm512_load_ps(s.sums + row * width + d), factor), dim - d);
  }
}

// Norm and rotation of one head of one token, in place.
inline void norm_and_rotate(float* x, const float* norm, float eps, const float* cos, const float* sin, int dim) {
  if (norm) rms_norm(x, norm, eps, dim, x);
  const int half = dim / 2;
  for (int i = 0; i < half; i += LANES) {
    const int left = half - i;
    const Vec first = load(x + i, left), second = load(x + half + i, left), c = load(cos + i, left), d = load(sin + i, left);
    store(x + i, _mm512_sub_ps(_mm512_mul_ps(first, c), _mm512_mul_ps(second, d)), left);
    store(x + half + i, _mm512_add_ps(_mm512_mul_ps(second, c), _mm512_mul_ps(first, d)), left);
  }
}

std::vector<AttentionScratch*> attention_scratch;
Scratch projected, attended_rows;

// out[T, n] = w times [rms_norm(x), beside_x], or times x alone where `norm` is null; `beside_x` may be null.
void linear(int rows, int size, const float* x, const float* norm, float eps, const float* beside_x, const Matrix& w,
            float* out) {
  const Rows a = inputs.get(rows, w);
  float* normed = norm ? wide.get<float>(static_cast<size_t>(rows) * w.k) : nullptr;
  for_rows(rows, [&](int row) {
    const float* from = x + static_cast<size_t>(row) * size;
    if (normed) {
      float* to = normed + static_cast<size_t>(row) * w.k;
      rms_norm(from, norm, eps, size, to);
      if (beside_x) std::memcpy(to + size, beside_x + static_cast<size_t>(row) * size, size * sizeof(float));
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

// h[T, H] = the output projection of attention over the layer's pages; see Backend.attention.
void pyllm_attention(const Attention* args, const Step* step, const float* x, const float* mu_below, void* keys,
                     void* values, float* h) {
  std::lock_guard<std::mutex> lock(in_use);
  const Attention& a = *args;
  const int tokens = step->tokens, dim = a.head_dim, row_size = (a.kv_heads * 2 + a.heads) * dim, half = dim / 2;
  float* kqv = projected.get<float>(static_cast<size_t>(tokens) * row_size);
  linear(tokens, a.size, x, a.input_norm, a.eps, a.kqv->k > a.size ? mu_below : nullptr, *a.kqv, kqv);
  const int stride = dim / (a.kind == BF16 ? 2 : 1);
  for_rows(tokens, [&](int token) {
    float* row = kqv + static_cast<size_t>(token) * row_size;
    const float *cos = step->cos + static_cast<size_t>(token) * half, *sin = step->sin + static_cast<size_t>(token) * half;
    const int64_t page = step->slots[token] / step->block_size * step->page_bytes;
    const int offset = static_cast<int>(step->slots[token] % step->block_size);
    const Rows key_rows{reinterpret_cast<uint32_t*>(static_cast<char*>(keys) + page), nullptr, stride};
    const Rows value_rows{reinterpret_cast<uint32_t*>(static_cast<char*>(values) + page), nullptr, stride};
    for (int h = 0; h < a.kv_heads; ++h) {
      norm_and_rotate(row + h * dim, a.k_norm, a.head_eps, cos, sin, dim);
      put_row(key_rows, h * step->block_size + offset, row + h * dim, dim, a.kind);
      put_row(value_rows, h * step->block_size + offset, row + (a.kv_heads + a.heads + h) * dim, dim, a.kind);
    }
    for (int h = 0; h < a.heads; ++h)
      norm_and_rotate(row + (a.kv_heads + h) * dim, a.q_norm, a.head_eps, cos, sin, dim);
  });
  struct Task { int sequence, first, count, position; };
  std::vector<Task> tasks;
  for (int sequence = 0, first = 0; sequence < step->sequences; first += step->query_lens[sequence++])
    for (int i = 0; i < step->query_lens[sequence]; i += QUERY_TILE) {
      const int left = step->query_lens[sequence] - i;
      tasks.push_back({sequence, first + i, left < QUERY_TILE ? left : QUERY_TILE,
                       step->seq_lens[sequence] - step->query_lens[sequence] + i});
    }
  while (static_cast<int>(attention_scratch.size()) < pool.size()) attention_scratch.push_back(new AttentionScratch);
  float* attended = attended_rows.get<float>(static_cast<size_t>(tokens) * a.heads * dim);
  pool.run(static_cast<int>(tasks.size()) * a.kv_heads, [&](int index, int thread) {
    const Task& t = tasks[index / a.kv_heads];
    const auto run = a.kind == BF16 ? attend<BF16> : attend<F32>;
    run(a, *step, kqv, keys, values, *attention_scratch[thread], t.sequence, t.first, t.count, t.position,
        index % a.kv_heads, attended);
  });
  linear(tokens, a.heads * dim, attended, nullptr, 0.0f, nullptr, *a.out, h);
}

struct Dynamics {
  const float *base, *in_bias, *out_bias;
  const Matrix *in, *in_velocity, *out;
  float dt, most_beta, most_velocity;
  int32_t size, inner, contextual;
};

// The INL dynamics with both residual additions: x and velocity [T, H] are changed, mu is set; see Backend.dynamics.
// `first_layer` says that there is no velocity yet: it counts as zero.
void pyllm_dynamics(const Dynamics* args, int rows, int first_layer, float* x, const float* h, float* velocity, float* mu) {
  std::lock_guard<std::mutex> lock(in_use);
  const Dynamics& d = *args;
  const int size = d.size, offset = d.contextual ? size : 0, total = d.in->n;
  const Rows from_h = inputs.get(rows, *d.in), from_velocity = beside.get(rows, *d.in_velocity);
  for_rows(rows, [&](int row) {
    put_row(from_h, row, h + static_cast<size_t>(row) * size, size, d.in->kind);
    if (!first_layer) put_row(from_velocity, row, velocity + static_cast<size_t>(row) * size, size, d.in_velocity->kind);
  });
  // products[T, 2 * inner]: what the controller's hidden layer gets from h, and from the velocity
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
      Vec v = _mm512_add_ps(load(product + i, left), load(d.in_bias + i, left));
      if (!first_layer) v = _mm512_add_ps(v, load(product + d.inner + i, left));
      store(product + i, _mm512_mul_ps(v, sigmoid(v)), left);
    }
    put_row(hidden, row, product, d.inner, d.out->kind);
  });
  // The rows of `out` are packed so that alpha, beta and gate of 16 columns come as three panels of one group.
  matmul<3>(hidden, rows, *d.out, [&](int row, int group, const float* sums) {
    const int column = group * LANES, left = size - column;
    const size_t at = static_cast<size_t>(row) * size + column;
    const Vec alpha = sigmoid(_mm512_add_ps(_mm512_load_ps(sums), load(d.out_bias + column, left)));
    const Vec beta = _mm512_min_ps(
        softplus(_mm512_add_ps(_mm512_load_ps(sums + LANES), load(d.out_bias + size + column, left))), all(d.most_beta));
    const Vec gate = sigmoid(_mm512_add_ps(_mm512_load_ps(sums + 2 * LANES), load(d.out_bias + 2 * size + column, left)));
    const Vec attended = load(h + at, left);
    const Vec target = d.contextual ? load(mu + at, left) : load(d.base + column, left);
    if (!d.contextual) store(mu + at, target, left);
    const Vec pull = _mm512_mul_ps(beta, _mm512_sub_ps(attended, target));
    Vec speed = first_layer ? _mm512_sub_ps(_mm512_setzero_ps(), pull)
                           : _mm512_sub_ps(_mm512_mul_ps(alpha, load(velocity + at, left)), pull);
    speed = _mm512_min_ps(_mm512_max_ps(speed, all(-d.most_velocity)), all(d.most_velocity));
    store(velocity + at, speed, left);
    const Vec moved = _mm512_add_ps(attended, _mm512_mul_ps(_mm512_mul_ps(all(d.dt), gate), speed));
    store(x + at, _mm512_add_ps(load(x + at, left), moved), left);
  });
}

struct Mlp {
  const float* norm;       // [H]
  const float* router;     // [E, H], or null
  const int64_t* own;      // [vocab], the expert of each id; null for a dense MLP
  const Matrix *gate_up, *down;                // [E] each
  const Matrix *shared_gate_up, *shared_down;  // or null
  float eps, own_score;
  int32_t size, num_experts, activation, shared_activation;  // 0 silu, 1 gelu, 2 relu
};

}  // extern "C"

namespace {

inline Vec activate(Vec x, int activation) {
  if (activation == 0) return _mm512_mul_ps(x, sigmoid(x));
  if (activation == 2) return _mm512_max_ps(x, _mm512_setzero_ps());
  alignas(64) float v[LANES];
  _mm512_store_ps(v, x);
  for (float& f : v) f = 0.5f * f * (1.0f + std::erf(f * 0.707106781f));
  return _mm512_load_ps(v);
}

// x[token of a row] += down(activation(gate) * up), for rows grouped by expert: `starts` has E + 1 numbers.
void gated_mlp(int size, float* all_x, const Rows& a, int rows, const int* starts, const int* tokens, int experts,
               const Matrix* gate_up, const Matrix* down, int activation) {
  const int width = down->k, in_groups = groups(*gate_up), out_groups = groups(*down);
  struct Task { int expert, first, last; };
  std::vector<Task> chunks;
  for (int e = 0; e < experts; ++e)
    for (int row = starts[e]; row < starts[e + 1]; row += ROW_CHUNK)
      chunks.push_back({e, row, row + ROW_CHUNK < starts[e + 1] ? row + ROW_CHUNK : starts[e + 1]});
  const Rows act = inner.get(rows, *down);
  float* products = down->kind == INT8 ? wide.get<float>(static_cast<size_t>(rows) * width) : nullptr;
  const int count = static_cast<int>(chunks.size());
  // Groups first, so that neighbouring tasks read neighbouring weights; 32 gate rows and their 32 up rows to a group.
  pool.run(count * in_groups, [&](int index, int) {
    const Task& task = chunks[index / in_groups];
    const int group = index % in_groups;
    product<4>(a, task.first, task.last, gate_up[task.expert], group, [&](int row, const float* sums) {
      for (int p = 0, column = group * 32; p < 2 && column < width; ++p, column += LANES) {
        const Vec gate = _mm512_load_ps(sums + p * LANES), up = _mm512_load_ps(sums + (p + 2) * LANES);
        const Vec v = _mm512_mul_ps(activate(gate, activation), up);
        if (products) store(products + static_cast<size_t>(row) * width + column, v, width - column);
        else put(act, row, column, v, width - column, down->kind);
      }
    });
  });
  if (products)
    for_rows(rows, [&](int row) { put_int8(act, row, products + static_cast<size_t>(row) * width, width); });
  pool.run(count * out_groups, [&](int index, int) {
    const Task& task = chunks[index / out_groups];
    const int group = index % out_groups;
    product<4>(act, task.first, task.last, down[task.expert], group, [&](int row, const float* sums) {
      float* x = all_x + static_cast<size_t>(tokens ? tokens[row] : row) * size;
      for (int p = 0, column = group * 64; p < 4 && column < size; ++p, column += LANES) {
        const int left = size - column;
        store(x + column, _mm512_add_ps(load(x + column, left), _mm512_load_ps(sums + p * LANES)), left);
      }
    });
  });
}

RowScratch shared_inputs;
Scratch normed_rows;

// argmax of router times mu plus the score of the token's own expert; the first of equals.
inline int64_t route(const Mlp& mlp, int64_t own, const float* mu) {
  float best = -INFINITY;
  int64_t chosen = 0;
  for (int e = 0; e < mlp.num_experts; ++e) {
    Vec sum = _mm512_setzero_ps();
    for (int i = 0; i < mlp.size; i += LANES)
      sum = _mm512_fmadd_ps(load(mu + i, mlp.size - i), load(mlp.router + static_cast<size_t>(e) * mlp.size + i, mlp.size - i), sum);
    const float total = _mm512_reduce_add_ps(sum) + (own == e ? mlp.own_score : 0.0f);
    if (total > best) best = total, chosen = e;
  }
  return chosen;
}

}  // namespace

extern "C" {

// x[T, H] += the expert's MLP of rms_norm(x), and the shared expert's; sets experts[T] where there are several. See
// Backend.routed_mlp. `mu` may be null.
void pyllm_mlp(const Mlp* args, int rows, float* x, const int64_t* ids, const float* mu, int64_t* experts) {
  std::lock_guard<std::mutex> lock(in_use);
  const Mlp& mlp = *args;
  const int size = mlp.size, num_experts = mlp.num_experts;
  float* normed = normed_rows.get<float>(static_cast<size_t>(rows) * size);
  for_rows(rows, [&](int token) {
    const size_t at = static_cast<size_t>(token) * size;
    rms_norm(x + at, mlp.norm, mlp.eps, size, normed + at);
    if (!mlp.own) return;
    const int64_t own = mlp.own[ids[token]];
    experts[token] = mlp.router && mu ? route(mlp, own, mu + at) : own;
  });
  int* tokens = order.get<int>(rows + num_experts + 1);  // the token of each row, grouped by expert, and the starts
  int* starts = tokens + rows;
  std::memset(starts, 0, (num_experts + 1) * sizeof(int));
  for (int token = 0; token < rows; ++token) ++starts[(mlp.own ? experts[token] : 0) + 1];
  for (int e = 0; e < num_experts; ++e) starts[e + 1] += starts[e];
  std::vector<int> next(starts, starts + num_experts);
  for (int token = 0; token < rows; ++token) tokens[next[mlp.own ? experts[token] : 0]++] = token;
  const Rows a = inputs.get(rows, *mlp.gate_up);
  const Rows in_order = mlp.shared_gate_up ? shared_inputs.get(rows, *mlp.shared_gate_up) : Rows{};
  for_rows(rows, [&](int row) {
    put_row(a, row, normed + static_cast<size_t>(tokens[row]) * size, size, mlp.gate_up->kind);
    if (mlp.shared_gate_up) put_row(in_order, row, normed + static_cast<size_t>(row) * size, size, mlp.shared_gate_up->kind);
  });
  gated_mlp(size, x, a, rows, starts, tokens, num_experts, mlp.gate_up, mlp.down, mlp.activation);
  if (mlp.shared_gate_up) {
    const int whole[2] = {0, rows};
    gated_mlp(size, x, in_order, rows, whole, nullptr, 1, mlp.shared_gate_up, mlp.shared_down, mlp.shared_activation);
  }
}

// residual[T, H] += mu (or = mu, when `first`); out = mu + share * residual.
void pyllm_highway(int rows, int size, int first, float share, const float* mu, float* residual, float* out) {
  std::lock_guard<std::mutex> lock(in_use);
  for_rows(rows, [&](int row) {
    for (int i = 0; i < size; i += LANES) {
      const size_t at = static_cast<size_t>(row) * size + i;
      const int left = size - i;
      const Vec v = load(mu + at, left), sum = first ? v : _mm512_add_ps(load(residual + at, left), v);
      store(residual + at, sum, left);
      store(out + at, _mm512_add_ps(v, _mm512_mul_ps(all(share), sum)), left);
    }
  });
}

// out[T, H] = rows `ids` of a packed matrix, as FP32.
void pyllm_embed(int rows, const int64_t* ids, const Matrix* w, float* out) {
  std::lock_guard<std::mutex> lock(in_use);
  const int depth = words(*w), wide_group = LANES * w->panels;
  for_rows(rows, [&](int row) {
    const int64_t id = ids[row];
    const uint32_t* data = static_cast<const uint32_t*>(w->data) +
                           static_cast<size_t>(id / wide_group) * depth * wide_group + id % wide_group;
    float* to = out + static_cast<size_t>(row) * w->k;
    for (int word = 0; word < depth; ++word) {
      const uint32_t bits = data[static_cast<size_t>(word) * wide_group];
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

// What whoever calls must agree on: the sizes of the structures.
int pyllm_layout() {
  return static_cast<int>(sizeof(Matrix) + 1000 * (sizeof(Step) + sizeof(Attention) + sizeof(Dynamics) + sizeof(Mlp)));
}

}  // extern "C"
