// AVX-512: causal attention of many new tokens, a block of queries against 128 keys at a time.
//
// Scores and their sums with the values are products with panels, as dense weights are multiplied; what softmax needs is
// kept per query and corrected when a later block has a larger score (Milakov and Gimelshein, 2018; FlashAttention, Dao
// et al., 2022). bf16 probabilities are rounded to bf16, as torch's own attention does; other dtypes stay float32.
#include <cmath>

#include "glue.h"
#include "panel_avx512.h"

namespace hfq {
namespace {

constexpr int64_t kKeys = 128;              // a multiple of 32
constexpr int64_t kScoreStride = kKeys + 16;
constexpr float kNothing = -INFINITY;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A number of the panels, and how the numbers of the model become such.
template <class T>
struct Numbers;
template <>
struct Numbers<uint16_t> {
  static constexpr int64_t kPerStep = 2;
};
template <>
struct Numbers<float> {
  static constexpr int64_t kPerStep = 1;
};

// e^x for x <= 0 to about 1e-7 of itself; 0 for minus infinity.
HFQ_INLINE __m512 exponential16(__m512 x) {
  const __m512 low = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // in this order NaN stays
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(low, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), low);
  r = _mm512_fmadd_ps(whole, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_scalef_ps(p, whole);
  return _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, _mm512_set1_ps(-103.0f), _CMP_LT_OQ), _mm512_setzero_ps());
}

// rows[i] lane j -> rows[j] lane i, of 32-bit lanes.
HFQ_INLINE void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// 16 dwords of a row of the model as a panel has them: pairs of bf16 as they are, float16 and float32 as float32.
// `left`: how many dwords there are.
template <class T>
HFQ_INLINE __m512i dwords(const void* row, int64_t at, int64_t left, int32_t dtype) {
  const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1);
  if (sizeof(T) == 2 || dtype == HFQ_F32) return _mm512_maskz_loadu_epi32(mask, static_cast<const int32_t*>(row) + at);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + at);
  return _mm512_castps_si512(_mm512_cvtph_ps(half));
}

template <class T>
class Block {
 public:
  explicit Block(const AttendBlock& a) : a_(a), rows_(a.tokens * a.heads), steps_(a.head_dim / Numbers<T>::kPerStep) {
    char* next = static_cast<char*>(a.scratch);
    const auto take = [&next](int64_t bytes) {
      char* found = next;
      next += round_up(bytes, 64);
      return found;
    };
    x_stride_ = row_stride(a.head_dim);
    x_ = reinterpret_cast<T*>(take(kBlockRows * x_stride_ * sizeof(T)));
    p_ = reinterpret_cast<T*>(take(kBlockRows * kScoreStride * sizeof(T)));
    scores_ = reinterpret_cast<float*>(take(kBlockRows * kScoreStride * 4));
    key_panels_ = reinterpret_cast<T*>(take(kKeys * a.head_dim * sizeof(T)));
    value_panels_ = reinterpret_cast<T*>(take(kKeys * a.head_dim * sizeof(T)));
    out_ = reinterpret_cast<float*>(take(kBlockRows * a.head_dim * 4));
    largest_ = reinterpret_cast<float*>(take(kBlockRows * 4));
    total_ = reinterpret_cast<float*>(take(kBlockRows * 4));
    used_ = static_cast<size_t>(next - static_cast<char*>(a.scratch));
  }

  size_t used() const { return used_; }

  void run() {
    for (int64_t r = 0; r < rows_; ++r) {
      largest_[r] = kNothing;
      total_[r] = 0.0f;
    }
    memset(out_, 0, static_cast<size_t>(rows_ * a_.head_dim) * 4);
    take_queries();
    const int64_t end = a_.past + a_.tokens;
    for (int64_t start = a_.first; start < end; start += kKeys) {
      const int64_t count = end - start < kKeys ? end - start : kKeys;
      pack_keys(start, count);
      by_panels<Scores>(key_panels_, steps_ * (64 / sizeof(T)), round_up(count, 16) / 16);
      for (int64_t r = 0; r < rows_; ++r) soften(r, start, count);
      pack_values(start, count);
      value_steps_ = round_up(count, Numbers<T>::kPerStep) / Numbers<T>::kPerStep;
      by_panels<Sums>(value_panels_, kKeys * 16, a_.head_dim / 16);
    }
    for (int64_t r = 0; r < rows_; ++r) store(r);
  }

 private:
  // off the powers of two, so that rows do not meet in the same sets of the cache
  static int64_t row_stride(int64_t numbers) { return round_up(numbers, 32) + 32; }

  void take_queries() {
    for (int64_t r = 0; r < rows_; ++r) {
      const void* q = advance(a_.q, r / a_.heads * a_.q_stride + r % a_.heads * a_.head_dim, a_.dtype);
      T* to = x_ + r * x_stride_;
      for (int64_t at = 0; at < steps_; at += 16) {
        _mm512_storeu_si512(to + at * Numbers<T>::kPerStep, dwords<T>(q, at, steps_ - at, a_.dtype));
      }
    }
  }

  const void* token(const void* base, int64_t at) const { return advance(base, at * a_.token_stride, a_.dtype); }

  // [tiles of 16 keys][steps][16 keys] dwords; keys past the end repeat the last one
  void pack_keys(int64_t start, int64_t count) {
    for (int64_t tile = 0; tile * 16 < count; ++tile) {
      T* panel = key_panels_ + tile * steps_ * (64 / sizeof(T));
      for (int64_t at = 0; at < steps_; at += 16) {
        __m512i block[16];
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t key = tile * 16 + i < count ? tile * 16 + i : count - 1;
          block[i] = dwords<T>(token(a_.keys, start + key), at, steps_ - at, a_.dtype);
        }
        transpose16(block);
        for (int64_t i = 0; i < 16 && at + i < steps_; ++i) {
          _mm512_store_si512(panel + (at + i) * (64 / sizeof(T)), block[i]);
        }
      }
    }
  }

  // [tiles of 16 dimensions][keys or pairs of keys][16 dimensions]; the partner of an odd last key is 0
  void pack_values(int64_t start, int64_t count) {
    for (int64_t tile = 0; tile < a_.head_dim / 16; ++tile) {
      T* panel = value_panels_ + tile * kKeys * 16;
      for (int64_t key = 0; key < count; key += Numbers<T>::kPerStep, panel += 64 / sizeof(T)) {
        const void* v = token(a_.values, start + key);
        if (sizeof(T) == 4) {
          _mm512_store_si512(panel, dwords<T>(v, tile * 16, 16, a_.dtype));
          continue;
        }
        __m512i both = halves(v, tile);
        if (key + 1 < count) {
          both = _mm512_or_si512(both, _mm512_slli_epi32(halves(token(a_.values, start + key + 1), tile), 16));
        }
        _mm512_store_si512(panel, both);
      }
    }
  }

  static __m512i halves(const void* row, int64_t tile) {
    const __m256i* at = reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(row) + tile * 16);
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(at));
  }

  // q . k
  template <int NT>
  struct Scores {
    const Block& b;
    const T* panel;
    int64_t panel_stride, tile;
    template <int MR>
    void rows(int64_t row) const {
      __m512 acc[NT][MR];
      for (int n = 0; n < NT; ++n) {
        for (int m = 0; m < MR; ++m) acc[n][m] = _mm512_setzero_ps();
      }
      const int64_t stride = b.x_stride_ * static_cast<int64_t>(sizeof(T));
      const char* x = reinterpret_cast<const char*>(b.x_ + row * b.x_stride_);
      panel_steps<MR, NT, T>(acc, panel, panel_stride, x, stride, b.steps_);
      for (int n = 0; n < NT; ++n) {
        for (int m = 0; m < MR; ++m) {
          _mm512_store_ps(b.scores_ + (row + m) * kScoreStride + (tile + n) * 16, acc[n][m]);
        }
      }
    }
  };

  // out += p . v
  template <int NT>
  struct Sums {
    const Block& b;
    const T* panel;
    int64_t panel_stride, tile;
    template <int MR>
    void rows(int64_t row) const {
      __m512 acc[NT][MR];
      float* out = b.out_ + row * b.a_.head_dim + tile * 16;
      for (int n = 0; n < NT; ++n) {
        for (int m = 0; m < MR; ++m) acc[n][m] = _mm512_load_ps(out + m * b.a_.head_dim + n * 16);
      }
      constexpr int64_t stride = kScoreStride * static_cast<int64_t>(sizeof(T));
      const char* p = reinterpret_cast<const char*>(b.p_ + row * kScoreStride);
      panel_steps<MR, NT, T>(acc, panel, panel_stride, p, stride, b.value_steps_);
      for (int n = 0; n < NT; ++n) {
        for (int m = 0; m < MR; ++m) _mm512_store_ps(out + m * b.a_.head_dim + n * 16, acc[n][m]);
      }
    }
  };

  template <template <int> class Each>
  void by_panels(const T* panels, int64_t panel_stride, int64_t count) {
    int64_t tile = 0;
    for (; count - tile >= 2; tile += 2) {
      by_passes(Each<2>{*this, panels + tile * panel_stride, panel_stride, tile}, 0, rows_);
    }
    if (tile < count) by_passes(Each<1>{*this, panels + tile * panel_stride, panel_stride, tile}, 0, rows_);
  }

  // Scores of one query to probabilities relative to the largest so far.
  void soften(int64_t r, int64_t start, int64_t count) {
    float* scores = scores_ + r * kScoreStride;
    T* p = p_ + r * kScoreStride;
    const int64_t seen = a_.past + r / a_.heads + 1 - start, limit = seen < count ? (seen < 0 ? 0 : seen) : count;
    const __m512 nothing = _mm512_set1_ps(kNothing), scaling = _mm512_set1_ps(a_.scaling);
    __m512 most = nothing;
    __mmask16 bad = 0;
    for (int64_t t = 0; t < limit; t += 16) {
      const __mmask16 mask = allowed(start, t, limit);
      const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(scores + t), scaling);
      const __m512 s = _mm512_mask_mov_ps(nothing, mask, scaled);
      _mm512_store_ps(scores + t, s);
      most = _mm512_max_ps(most, s);
      bad |= _mm512_cmp_ps_mask(s, s, _CMP_UNORD_Q);
    }
    const float before = largest_[r], found = _mm512_reduce_max_ps(most), now = found > before ? found : before;
    const int64_t padded = round_up(count, 16);
    if (bad) total_[r] = NAN;  // the largest of numbers that are none says nothing
    if (now == kNothing) {  // nothing to attend to yet
      for (int64_t t = 0; t < padded; t += 16) put(p + t, _mm512_setzero_ps());
      return;
    }
    const __m512 shift = _mm512_set1_ps(now);
    __m512 sums = _mm512_setzero_ps();
    int64_t t = 0;
    for (; t < limit; t += 16) {
      const __m512 e = exponential16(_mm512_sub_ps(_mm512_load_ps(scores + t), shift));
      sums = _mm512_add_ps(sums, e);
      put(p + t, e);
    }
    for (; t < padded; t += 16) put(p + t, _mm512_setzero_ps());
    if (now != before) {
      const float less = before == kNothing ? 0.0f : std::exp(before - now);
      total_[r] *= less;
      float* out = out_ + r * a_.head_dim;
      const __m512 factor = _mm512_set1_ps(less);
      for (int64_t d = 0; d < a_.head_dim; d += 16) {
        _mm512_store_ps(out + d, _mm512_mul_ps(_mm512_load_ps(out + d), factor));
      }
      largest_[r] = now;
    }
    total_[r] += _mm512_reduce_add_ps(sums);
  }

  __mmask16 allowed(int64_t start, int64_t t, int64_t limit) const {
    const int64_t left = limit - t;
    const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1);
    if (!a_.keep) return mask;
    const __m128i bytes = _mm_maskz_loadu_epi8(mask, a_.keep + start + t);
    return _mm_test_epi8_mask(bytes, bytes);
  }

  static void put(uint16_t* to, __m512 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16x16(v)); }
  static void put(float* to, __m512 v) { _mm512_storeu_ps(to, v); }

  void store(int64_t r) {
    float* out = out_ + r * a_.head_dim;
    const __m512 share = _mm512_set1_ps(total_[r] != 0.0f ? 1.0f / total_[r] : 0.0f);
    for (int64_t d = 0; d < a_.head_dim; d += 16) {
      _mm512_store_ps(out + d, _mm512_mul_ps(_mm512_load_ps(out + d), share));
    }
    const int64_t at = r / a_.heads * a_.out_stride + r % a_.heads * a_.head_dim;
    store_numbers(out, advance(a_.out, at, a_.dtype), a_.head_dim, a_.dtype);
  }

  const AttendBlock& a_;
  const int64_t rows_, steps_;
  int64_t x_stride_, value_steps_ = 0;
  T *x_, *p_, *key_panels_, *value_panels_;
  float *scores_, *out_, *largest_, *total_;
  size_t used_;
};

}  // namespace

size_t avx512_block_scratch(int64_t head_dim, int64_t) {
  AttendBlock a = {};
  a.head_dim = head_dim;
  return Block<float>(a).used();
}

void avx512_attend_block(const AttendBlock& a) {
  if (a.dtype == HFQ_BF16) {
    Block<uint16_t>(a).run();
  } else {
    Block<float>(a).run();
  }
}

}  // namespace hfq
