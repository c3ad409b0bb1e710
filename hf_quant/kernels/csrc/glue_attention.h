// Attention over the cache, for any vector width; included by glue_math.h.
#pragma once

namespace hfq {
namespace {

template <class T>
inline Vec dot(const float* q, const typename T::Number* k, int64_t n) {
  Vec a = load(q) * T::load(k);
  for (int64_t i = kLanes; i < n; i += kLanes) a += load(q + i) * T::load(k + i);
  return a;
}

// q . k of `count` tokens; the scores past the end, up to a multiple of 16, are overwritten.
template <class T>
void score(const Attend& a, const float* q, const typename T::Number* keys, int64_t count) {
  int64_t t = 0;
#if defined(__AVX512F__)
  for (; t + 16 <= count; t += 16) {
    Vec parts[16];
    for (int i = 0; i < 16; ++i) parts[i] = dot<T>(q, keys + (t + i) * a.token_stride, a.head_dim);
    store(a.scores + t, sums(parts));
  }
#endif
  for (; t < count; ++t) a.scores[t] = sum(dot<T>(q, keys + t * a.token_stride, a.head_dim));
}

// out += sum of p[t] values[t], in pieces of at most 4 vectors that stay in registers
template <class T>
void mix(const Attend& a, const typename T::Number* values, int64_t count, float* out) {
  constexpr int kVecs = 4;
  for (int64_t d = 0; d < a.head_dim; d += kVecs * kLanes) {
    const int vecs = static_cast<int>((a.head_dim - d) / kLanes < kVecs ? (a.head_dim - d) / kLanes : kVecs);
    Vec even[kVecs] = {}, odd[kVecs] = {};
    if (vecs == kVecs) {
      int64_t t = 0;
      for (; t + 2 <= count; t += 2) {
        const typename T::Number* v = values + t * a.token_stride + d;
        for (int i = 0; i < kVecs; ++i) even[i] += T::load(v + i * kLanes) * a.scores[t];
        for (int i = 0; i < kVecs; ++i) odd[i] += T::load(v + a.token_stride + i * kLanes) * a.scores[t + 1];
      }
      for (; t < count; ++t) {
        const typename T::Number* v = values + t * a.token_stride + d;
        for (int i = 0; i < kVecs; ++i) even[i] += T::load(v + i * kLanes) * a.scores[t];
      }
    } else {
      for (int64_t t = 0; t < count; ++t) {
        const typename T::Number* v = values + t * a.token_stride + d;
        for (int i = 0; i < vecs; ++i) even[i] += T::load(v + i * kLanes) * a.scores[t];
      }
    }
    for (int i = 0; i < vecs; ++i) store(out + d + i * kLanes, load(out + d + i * kLanes) + even[i] + odd[i]);
  }
}

// Scores to weights that add up to the returned number, relative to the largest.
inline float soften(float* scores, int64_t count, float scaling) {
  float largest = -INFINITY;
  for (int64_t t = 0; t < count; ++t) {
    scores[t] *= scaling;
    largest = scores[t] > largest ? scores[t] : largest;
  }
  for (int64_t t = 0; t < count; ++t) scores[t] = exponential(scores[t] - largest);
  Vec total = {};
  int64_t t = 0;
  for (; t + kLanes <= count; t += kLanes) total += load(scores + t);
  float rest = sum(total);
  for (; t < count; ++t) rest += scores[t];
  return rest;
}

// What happens to a query or key between projection and scores: x, scratch, cos and sin are float32 numbers.
inline void turned(float* x, const void* norm_weight, float eps, const float* cos, const float* sin, int64_t n,
                   int32_t dtype, float* scratch) {
  if (norm_weight) {
    normalise(x, norm_weight, eps, n, dtype, scratch);
    round_numbers(x, n, dtype);
  }
  if (cos) rotate(x, cos, sin, n, dtype);
}

template <class T>
void attend_as(const Attend& a) {
  typedef typename T::Number Number;
  float q[kMaxHeadDim], k[kMaxHeadDim], v[kMaxHeadDim], out[kMaxHeadDim], cos[kMaxHeadDim], sin[kMaxHeadDim];
  const int64_t n = a.head_dim;
  load_numbers(a.q, q, n, a.dtype);
  load_numbers(a.k, k, n, a.dtype);
  load_numbers(a.v, v, n, a.dtype);
  if (a.cos) {
    load_numbers(a.cos, cos, n, a.dtype);
    load_numbers(a.sin, sin, n, a.dtype);
  }
  turned(q, a.q_norm, a.q_eps, a.cos ? cos : nullptr, sin, n, a.dtype, out);
  turned(k, a.k_norm, a.k_eps, a.cos ? cos : nullptr, sin, n, a.dtype, out);
  Number* keys = static_cast<Number*>(a.keys);
  Number* values = static_cast<Number*>(a.values);
  if (a.append) {
    store_numbers(k, keys + a.past * a.token_stride, n, a.dtype);
    store_numbers(v, values + a.past * a.token_stride, n, a.dtype);
  }
  // the new token is taken from here: another thread may be the one that appends it
  const int64_t before = a.past - a.first, count = before + 1;
  score<T>(a, q, keys + a.first * a.token_stride, before);
  a.scores[before] = sum(dot<Single>(q, k, n));
  if (a.keep) {
    for (int64_t t = 0; t < count; ++t) a.scores[t] = a.keep[a.first + t] ? a.scores[t] : -INFINITY;
  }
  const float total = soften(a.scores, count, a.scaling), newest = a.scores[before];
  for (int64_t i = 0; i < n; ++i) out[i] = v[i] * newest;
  mix<T>(a, values + a.first * a.token_stride, before, out);
  const float share = 1.0f / total;
  for (int64_t i = 0; i < n; ++i) out[i] *= share;
  store_numbers(out, a.out, n, a.dtype);
}

void attend(const Attend& a) {
  if (a.dtype == HFQ_F32) {
    attend_as<Single>(a);
  } else if (a.dtype == HFQ_BF16) {
    attend_as<Brain>(a);
  } else {
    attend_as<Half>(a);
  }
}

void turn(const Turn& t) {
  float x[kMaxHeadDim], scratch[kMaxHeadDim], cos[kMaxHeadDim], sin[kMaxHeadDim];
  const int64_t n = t.head_dim;
  if (t.cos) {
    load_numbers(t.cos, cos, n, t.dtype);
    load_numbers(t.sin, sin, n, t.dtype);
  }
  for (int64_t h = 0; h < t.heads; ++h) {
    void* at = advance(t.x, h * n, t.dtype);
    load_numbers(at, x, n, t.dtype);
    turned(x, t.norm, t.eps, t.cos ? cos : nullptr, sin, n, t.dtype, scratch);
    store_numbers(x, at, n, t.dtype);
  }
}

#if !defined(__AVX512F__)
// Without the panels of AVX-512: one query after the other.
template <class T>
void attend_block_as(const AttendBlock& b) {
  typedef typename T::Number Number;
  float q[kMaxHeadDim], out[kMaxHeadDim];
  Attend a = {};
  a.dtype = b.dtype;
  a.head_dim = b.head_dim;
  a.token_stride = b.token_stride;
  a.scores = static_cast<float*>(b.scratch);
  const Number* keys = static_cast<const Number*>(b.keys) + b.first * b.token_stride;
  const Number* values = static_cast<const Number*>(b.values) + b.first * b.token_stride;
  for (int64_t i = 0; i < b.tokens; ++i) {
    const int64_t count = b.past + i + 1 - b.first;
    for (int64_t h = 0; h < b.heads; ++h) {
      memset(out, 0, sizeof out);
      bool any = false;
      if (count > 0) {
        load_numbers(advance(b.q, i * b.q_stride + h * b.head_dim, b.dtype), q, b.head_dim, b.dtype);
        score<T>(a, q, keys, count);
        for (int64_t t = 0; t < count; ++t) {
          const bool kept = !b.keep || b.keep[b.first + t];
          any = any || kept;
          a.scores[t] = kept ? a.scores[t] : -INFINITY;
        }
      }
      if (any) {
        const float share = 1.0f / soften(a.scores, count, b.scaling);
        mix<T>(a, values, count, out);
        for (int64_t d = 0; d < b.head_dim; ++d) out[d] *= share;
      }
      store_numbers(out, advance(b.out, i * b.out_stride + h * b.head_dim, b.dtype), b.head_dim, b.dtype);
    }
  }
}

size_t block_scratch(int64_t, int64_t length) { return static_cast<size_t>(length + 16) * sizeof(float); }

void attend_block(const AttendBlock& a) {
  if (a.dtype == HFQ_F32) {
    attend_block_as<Single>(a);
  } else if (a.dtype == HFQ_BF16) {
    attend_block_as<Brain>(a);
  } else {
    attend_block_as<Half>(a);
  }
}
#endif

}  // namespace
}  // namespace hfq
