// Norm, rotation, attention and gate, written for any vector width; included by one file per instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "convert.h"
#include "glue.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// no function here that takes or returns vectors is called across files
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

namespace hfq {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

inline float sum(Vec v) {
  float lanes[kLanes];
  memcpy(lanes, &v, sizeof v);
  for (int half = kLanes / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// A vector of numbers of the cache. Element is float, uint16_t as bfloat16 (Brain) or uint16_t as float16 (Half).
struct Single {
  typedef float Number;
  static Vec load(const Number* p) { return hfq::load(p); }
};
struct Brain {
  typedef uint16_t Number;
  static Vec load(const Number* p) {
    Halves h;
    memcpy(&h, p, sizeof h);
    return reinterpret_cast<Vec>(__builtin_convertvector(h, Words) << 16);
  }
};
struct Half {
  typedef uint16_t Number;
  static Vec load(const Number* p) {
    float wide[kLanes];
    for (int i = 0; i < kLanes; ++i) wide[i] = from_f16(p[i]);
    return hfq::load(wide);
  }
};

inline void round_numbers(float* f, int64_t n, int32_t dtype) {
  if (dtype == HFQ_BF16) {
    for (int64_t i = 0; i < n; ++i) f[i] = from_bf16(to_bf16(f[i]));
  } else if (dtype == HFQ_F16) {
    for (int64_t i = 0; i < n; ++i) f[i] = from_f16(to_f16(f[i]));
  }
}

// e^x to about 1e-7 of itself; 0 below e^-87, where float32 has no normal numbers left. x is at most 88.
inline float exponential(float x) {
  const float low = x < -87.0f ? -87.0f : x;
  // adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits
  const float shifted = low * 1.44269504f + 12582912.0f;
  const float whole = shifted - 12582912.0f;
  const float r = (low - whole * 0.693359375f) + whole * 2.12194440e-4f;
  // Taylor to the 7th power on |r| <= ln(2)/2: the first term left out is below 6e-9
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float power = float_of((bits_of(shifted) - 0x4b400000u + 127u) << 23);
  return x < -87.0f ? 0.0f : p * power;
}

inline float mean_square(const float* f, int64_t n) {
  Vec a = {}, b = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Vec x = load(f + i), y = load(f + i + kLanes);
    a += x * x;
    b += y * y;
  }
  float total = sum(a + b);
  for (; i < n; ++i) total += f[i] * f[i];
  return total / static_cast<float>(n);
}

void normalise(float* f, const void* weight, float eps, int64_t n, int32_t dtype, float* scratch) {
  const float factor = 1.0f / std::sqrt(mean_square(f, n) + eps);
  for (int64_t i = 0; i < n; ++i) f[i] *= factor;
  round_numbers(f, n, dtype);
  load_numbers(weight, scratch, n, dtype);
  for (int64_t i = 0; i < n; ++i) f[i] *= scratch[i];
}

void norm(const void* x, const void* weight, float eps, void* out, int64_t n, int32_t dtype, float* scratch) {
  load_numbers(x, scratch, n, dtype);
  normalise(scratch, weight, eps, n, dtype, scratch + n);
  store_numbers(scratch, out, n, dtype);
}

constexpr int64_t kPiece = 256;  // numbers widened at a time

void add(void* x, const void* y, int64_t n, int32_t dtype) {
  float a[kPiece], b[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = n - i < kPiece ? n - i : kPiece;
    load_numbers(advance(x, i, dtype), a, m, dtype);
    load_numbers(advance(y, i, dtype), b, m, dtype);
    for (int64_t k = 0; k < m; ++k) a[k] += b[k];
    store_numbers(a, advance(x, i, dtype), m, dtype);
  }
}

void gate(void* gate, const void* up, int64_t n, int32_t dtype) {
  float a[kPiece], b[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = n - i < kPiece ? n - i : kPiece;
    load_numbers(advance(gate, i, dtype), a, m, dtype);
    load_numbers(advance(up, i, dtype), b, m, dtype);
    // e^-x is held at e^88: the quotient is then below the smallest normal number
    for (int64_t k = 0; k < m; ++k) a[k] = a[k] / (1.0f + exponential(a[k] < -88.0f ? 88.0f : -a[k]));
    round_numbers(a, m, dtype);
    for (int64_t k = 0; k < m; ++k) a[k] *= b[k];
    store_numbers(a, advance(gate, i, dtype), m, dtype);
  }
}

// x cos + rotate_half(x) sin, each product and the sum rounded; x, cos, sin: n float32 numbers.
void rotate(float* x, const float* cos, const float* sin, int64_t n, int32_t dtype) {
  float turned[kMaxHeadDim];
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; ++i) turned[i] = -x[i + half] * sin[i];
  for (int64_t i = half; i < n; ++i) turned[i] = x[i - half] * sin[i];
  for (int64_t i = 0; i < n; ++i) x[i] *= cos[i];
  round_numbers(turned, n, dtype);
  round_numbers(x, n, dtype);
  for (int64_t i = 0; i < n; ++i) x[i] += turned[i];
  round_numbers(x, n, dtype);
}

#if defined(__AVX512F__)
// Lane i of the result is the sum of a[i].
inline Vec sums(const Vec (&a)[16]) {
  // folds pairs of vectors until one is left: 15 times two shuffles and an addition
  const auto fold = [](Vec x, Vec y, __m512i even, __m512i odd) {
    const __m512 p = reinterpret_cast<__m512>(x), q = reinterpret_cast<__m512>(y);
    return reinterpret_cast<Vec>(_mm512_add_ps(_mm512_permutex2var_ps(p, even, q), _mm512_permutex2var_ps(p, odd, q)));
  };
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  Vec b[8], c[4];
  for (int i = 0; i < 8; ++i) b[i] = fold(a[2 * i], a[2 * i + 1], even, odd);
  for (int i = 0; i < 4; ++i) c[i] = fold(b[2 * i], b[2 * i + 1], even, odd);
  return fold(fold(c[0], c[1], even, odd), fold(c[2], c[3], even, odd), even, odd);
}
#endif

}  // namespace
}  // namespace hfq

#include "glue_attention.h"

namespace hfq {
namespace {

// Lane sums of w . x; four accumulators hide the latency of the additions. Weights follow each other in memory, so what
// lies some kilobytes ahead is fetched.
template <class T>
inline Vec product_lanes(const typename T::Number* w, const float* x, int64_t whole) {
  constexpr int64_t kAhead = 4096 / sizeof(typename T::Number);
  Vec parts[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= whole; i += 4 * kLanes) {
    __builtin_prefetch(w + i + kAhead);
    __builtin_prefetch(w + i + kAhead + 2 * kLanes);
    for (int k = 0; k < 4; ++k) parts[k] += T::load(w + i + k * kLanes) * load(x + i + k * kLanes);
  }
  for (; i < whole; i += kLanes) parts[0] += T::load(w + i) * load(x + i);
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

template <class T>
void float_product_as(const FloatProduct& p, int64_t first, int64_t last) {
  constexpr int64_t kCount = 16;  // outputs at a time: for further rows of x they come from the nearest caches
  const int64_t whole = p.in / kLanes * kLanes;
  for (int64_t n = first; n < last; n += kCount) {
    const int64_t count = last - n < kCount ? last - n : kCount;
    const typename T::Number* w = static_cast<const typename T::Number*>(p.weight) + n * p.weight_stride;
    for (int64_t r = 0; r < p.rows; ++r) {
      const float* x = p.x + r * p.x_stride;
      Vec lanes[kCount] = {};
      float totals[kCount];
      for (int64_t k = 0; k < count; ++k) lanes[k] = product_lanes<T>(w + k * p.weight_stride, x, whole);
#if defined(__AVX512F__)
      store(totals, sums(lanes));
#else
      for (int64_t k = 0; k < kCount; ++k) totals[k] = sum(lanes[k]);
#endif
      for (int64_t i = whole; i < p.in; ++i) {
        for (int64_t k = 0; k < count; ++k) totals[k] += load_number(w + k * p.weight_stride, i, p.dtype) * x[i];
      }
      if (p.bias) {
        for (int64_t k = 0; k < count; ++k) totals[k] += load_number(p.bias, n + k, p.dtype);
      }
      store_numbers(totals, advance(p.y, r * p.y_stride + n, p.dtype), count, p.dtype);
    }
  }
}

void float_product(const FloatProduct& p, int64_t first, int64_t last) {
  if (p.dtype == HFQ_F32) {
    float_product_as<Single>(p, first, last);
  } else if (p.dtype == HFQ_BF16) {
    float_product_as<Brain>(p, first, last);
  } else {
    float_product_as<Half>(p, first, last);
  }
}

#if defined(__AVX512F__)
constexpr auto block_scratch = avx512_block_scratch;
constexpr auto attend_block = avx512_attend_block;
#endif
constexpr Glue kGlue = {norm, attend, turn, block_scratch, attend_block, gate, add, float_product};

}  // namespace
}  // namespace hfq

#pragma GCC diagnostic pop
