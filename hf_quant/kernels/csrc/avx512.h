// What the AVX-512 files share: loads of scales, stores of results. Everything has internal linkage.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 warns of the undefined registers in its own intrinsics (PR 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "convert.h"
#include "linear.h"

namespace hfq {

// Products of rows of x with tiles, by the form of the activations (linear_, int8_ and dense_avx512.cpp).
void avx512_few(const Job& job, int64_t first_tile, int64_t last_tile);
void avx512_int8(const Job& job, int64_t first_tile, int64_t last_tile);
void avx512_dense(const Job& job, int64_t first_tile, int64_t last_tile);

namespace {

#define HFQ_INLINE inline __attribute__((always_inline))

HFQ_INLINE __m512 load_scales(const void* scale, int64_t group, int32_t type) {
  if (type == HFQ_F32) return _mm512_loadu_ps(static_cast<const float*>(scale) + group * 16);
  const uint16_t* at = static_cast<const uint16_t*>(scale) + group * 16;
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  if (type == HFQ_F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

HFQ_INLINE __m512 load_zeros(const uint8_t* zero, int64_t group) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zero + group * 16));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

// 4 bytes of x in every lane, loaded once: left alone, the compiler loads them again for every tile that they meet.
HFQ_INLINE __m512i broadcast(int32_t value) {
  __m512i v = _mm512_set1_epi32(value);
  __asm__("" : "+v"(v));
  return v;
}

HFQ_INLINE __mmask16 tile_mask(const hfq_weight& w, int64_t tile) {
  const int64_t left = w.out - tile * 16;
  return static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1);
}

HFQ_INLINE __m512 load_bias(const Job& job, int64_t tile, __mmask16 mask) {
  if (!job.bias) return _mm512_setzero_ps();
  const void* at = advance(job.bias, tile * 16, job.dtype);
  if (job.dtype == HFQ_F32) return _mm512_maskz_loadu_ps(mask, at);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, at);
  if (job.dtype == HFQ_F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// bf16 of 16 floats, nearest even. The instruction takes subnormal numbers for zero, as its dot product does.
HFQ_INLINE __m256i to_bf16x16(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

HFQ_INLINE void store_tile(const Job& job, int64_t row, int64_t tile, __mmask16 mask, __m512 v) {
  void* at = advance(job.y, row * job.y_stride + tile * 16, job.dtype);
  if (job.dtype == HFQ_F32) {
    _mm512_mask_storeu_ps(at, mask, v);
  } else {
    const __m256i half = job.dtype == HFQ_BF16 ? to_bf16x16(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16(at, mask, half);
  }
}

}  // namespace
}  // namespace hfq
