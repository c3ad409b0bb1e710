// AVX-512 VNNI: products with activations rounded to int8. Sums of a group and a block of activations are int32.
#include "avx512.h"

namespace hfq {
namespace {

constexpr int64_t kPrefetch = 4096;
constexpr int64_t kRowBlock = 512 << 10;  // bytes of x that stay in the cache while the tiles pass

template <int MR, int BITS>
void int8_rows(const Job& job, int64_t tile, int64_t row) {
  const hfq_weight& w = *job.weight;
  const Activations& a = *job.x;
  const int8_t* x = static_cast<const int8_t*>(a.data) + row * a.row_stride;
  const int64_t stride = a.row_stride, groups = a.groups, group_blocks = group_blocks_of(w), parts = a.group_parts;
  const int64_t row_parts = groups * parts;
  const uint8_t* codes = w.codes + tile * tile_bytes_of(w);
  const __m512i nibble = _mm512_set1_epi8(0x0f);
  const int32_t implied = implied_zero(w);
  // independent sums for the low and the high nibbles (or the two halves of an 8-bit block) when rows are few
  constexpr int K = MR <= 4 ? 2 : 1;
  __m512 total[MR];
  for (int m = 0; m < MR; ++m) total[m] = _mm512_setzero_ps();
  int64_t part = row * row_parts;
  for (int64_t g = 0; g < groups; ++g) {
    const __m512 scale = load_scales(w.scale, tile * groups + g, w.scale_type);
    int64_t left = group_blocks;
    for (int64_t p = 0; p < parts; ++p, ++part, left -= kInt8Block / 8) {
      __m512i acc[MR][K];
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) {
        acc[m][0] = _mm512_set1_epi32(-implied * a.code_sums[part + m * row_parts]);
        if (K == 2) acc[m][K - 1] = _mm512_setzero_si512();
      }
      const int64_t blocks = left < kInt8Block / 8 ? left : kInt8Block / 8;
      for (int64_t b = 0; b < blocks; ++b, codes += 16 * BITS, x += 8) {
        __m512i first = _mm512_loadu_si512(codes), second;
        if (MR <= 4) _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetch), _MM_HINT_T0);
        if (BITS == 4) {
          second = _mm512_and_si512(_mm512_srli_epi16(first, 4), nibble);
          first = _mm512_and_si512(first, nibble);
        } else {
          second = _mm512_loadu_si512(codes + 64);
          if (MR <= 4) _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetch + 64), _MM_HINT_T0);
        }
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) {
          int32_t four;
          memcpy(&four, x + m * stride, 4);
          acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], first, _mm512_set1_epi32(four));
        }
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) {
          int32_t four;
          memcpy(&four, x + m * stride + 4, 4);
          acc[m][K - 1] = _mm512_dpbusd_epi32(acc[m][K - 1], second, _mm512_set1_epi32(four));
        }
      }
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) {
        const __m512i sum = K == 2 ? _mm512_add_epi32(acc[m][0], acc[m][K - 1]) : acc[m][0];
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(a.scales[part + m * row_parts]));
        total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, total[m]);
      }
      if (w.zero) {
        const __m512 shift = _mm512_mul_ps(load_zeros(w.zero, tile * groups + g), scale);
        for (int m = 0; m < MR; ++m) {
          const int64_t at = part + m * row_parts;
          const float sum = static_cast<float>(a.code_sums[at]) * a.scales[at];
          total[m] = _mm512_fnmadd_ps(shift, _mm512_set1_ps(sum), total[m]);
        }
      }
    }
  }
  const __mmask16 mask = tile_mask(w, tile);
  const __m512 bias = load_bias(job, tile, mask);
  for (int m = 0; m < MR; ++m) store_tile(job, row + m, tile, mask, _mm512_add_ps(total[m], bias));
}

template <int BITS>
void int8_tile(const Job& job, int64_t tile, int64_t row, int64_t end) {
  while (row < end) {
    switch (end - row) {
      case 1: int8_rows<1, BITS>(job, tile, row), row += 1; break;
      case 2: int8_rows<2, BITS>(job, tile, row), row += 2; break;
      case 3: int8_rows<3, BITS>(job, tile, row), row += 3; break;
      case 4: int8_rows<4, BITS>(job, tile, row), row += 4; break;
      case 5: int8_rows<5, BITS>(job, tile, row), row += 5; break;
      case 6: int8_rows<6, BITS>(job, tile, row), row += 6; break;
      case 7: int8_rows<7, BITS>(job, tile, row), row += 7; break;
      case 8: case 9: case 10: case 11: case 16: int8_rows<8, BITS>(job, tile, row), row += 8; break;
      default: int8_rows<12, BITS>(job, tile, row), row += 12; break;
    }
  }
}

}  // namespace

void avx512_int8(const Job& job, int64_t first_tile, int64_t last_tile) {
  const Activations& a = *job.x;
  const int64_t fit = kRowBlock / a.row_stride / 12 * 12, step = fit < 48 ? 48 : fit;
  for (int64_t row = 0; row < a.rows; row += step) {
    const int64_t end = row + step < a.rows ? row + step : a.rows;
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      if (job.weight->bits == 4) {
        int8_tile<4>(job, tile, row, end);
      } else {
        int8_tile<8>(job, tile, row, end);
      }
    }
  }
}

}  // namespace hfq
