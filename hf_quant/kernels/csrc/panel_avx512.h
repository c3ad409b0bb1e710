// The inner product of rows of x with panels of 16 outputs: what dense products and attention over many tokens share.
//
// A panel holds [columns / 2][16 outputs][2] bf16 or [columns][16 outputs] float32 numbers; either way a step is 64 bytes
// of it and 4 bytes of a row of x. Everything has internal linkage.
#pragma once
#include "avx512.h"

namespace hfq {
namespace {

constexpr int kPanelRows = 12;  // rows of x in one pass; with two panels 24 of the 32 registers are sums

// One step of the inner product: a pair of columns (bf16) or one column (float32).
HFQ_INLINE __m512 step(__m512 acc, const uint16_t* w, __m512i x) {
  return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_load_si512(w), (__m512bh)x);
}
HFQ_INLINE __m512 step(__m512 acc, const float* w, __m512i x) {
  return _mm512_fmadd_ps(_mm512_load_ps(w), _mm512_castsi512_ps(x), acc);
}

// acc[n][m] += row m of x times panel n; rows are `stride` bytes apart, panels `panel_stride` numbers.
template <int MR, int NT, class T>
HFQ_INLINE void panel_steps(__m512 (&acc)[NT][MR], const T* panel, int64_t panel_stride, const char* x, int64_t stride,
                            int64_t steps) {
  constexpr int64_t kWidth = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t s = 0; s < steps; ++s, panel += kWidth, x += 4) {
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
      int32_t value;
      memcpy(&value, x + m * stride, 4);
      const __m512i columns = broadcast(value);
#pragma GCC unroll 2
      for (int n = 0; n < NT; ++n) acc[n][m] = step(acc[n][m], panel + n * panel_stride, columns);
    }
  }
}

// Calls each.template rows<MR>(row) for rows [row, end), in passes of as many as the registers hold.
template <class Each>
HFQ_INLINE void by_passes(const Each& each, int64_t row, int64_t end) {
  for (; end - row >= kPanelRows; row += kPanelRows) each.template rows<kPanelRows>(row);
  if (end - row >= 8) each.template rows<8>(row), row += 8;
  if (end - row >= 4) each.template rows<4>(row), row += 4;
  if (end - row >= 2) each.template rows<2>(row), row += 2;
  if (end - row >= 1) each.template rows<1>(row), row += 1;
}

}  // namespace
}  // namespace hfq
