// AVX-512, many rows of x: two tiles are decoded into a panel, which is multiplied as a dense matrix.
//
// bf16 activations take weights rounded to bf16, as the reference path does; float32 activations (and float16 ones, as
// float32) take float32 weights.
#include "panel_avx512.h"

namespace hfq {
namespace {

constexpr int64_t kRowBlock = 512 << 10;   // bytes of x that stay in the cache while the tiles pass
constexpr int64_t kLeastRowBlock = 516;    // decoding two tiles costs as much as 8 rows: 192 rows were 6 % slower

// The scaled weights of one column of a tile.
struct Decoder {
  const hfq_weight& w;
  __m512 table, scale, zero;
  explicit Decoder(const hfq_weight& weight) : w(weight), scale(_mm512_setzero_ps()), zero(scale) {
    alignas(64) float levels[16];
    for (int n = 0; n < 16; ++n) levels[n] = w.table_grid ? w.table[n] : static_cast<float>(n);
    table = _mm512_load_ps(levels);
  }
  void group(int64_t at) {
    scale = load_scales(w.scale, at, w.scale_type);
    zero = w.zero ? load_zeros(w.zero, at) : _mm512_set1_ps(w.table_grid ? 0.0f : static_cast<float>(implied_zero(w)));
  }
  // field: the code at the bottom of every dword; 4-bit codes may have others above them
  template <int BITS>
  HFQ_INLINE __m512 value(__m512i field) const {
    const __m512 code = BITS == 4 ? _mm512_permutexvar_ps(field, table)
                                  : _mm512_cvtepi32_ps(_mm512_and_si512(field, _mm512_set1_epi32(255)));
    return _mm512_mul_ps(_mm512_sub_ps(code, zero), scale);
  }
};

HFQ_INLINE void put_pair(__m512 even, __m512 odd, uint16_t* to) {
  const __m512i low = _mm512_cvtepu16_epi32(to_bf16x16(even)), high = _mm512_cvtepu16_epi32(to_bf16x16(odd));
  _mm512_store_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

HFQ_INLINE void put_pair(__m512 even, __m512 odd, float* to) {
  _mm512_store_ps(to, even);
  _mm512_store_ps(to + 16, odd);
}

// One tile as [columns / 2][16 rows][2] bf16 or [columns][16 rows] float32.
template <int BITS, class T>
void decode_tile(const hfq_weight& w, int64_t tile, T* to) {
  Decoder d(w);
  const int64_t groups = groups_of(w), group_blocks = group_blocks_of(w);
  const uint8_t* codes = w.codes + tile * tile_bytes_of(w);
  for (int64_t g = 0; g < groups; ++g) {
    d.group(tile * groups + g);
    for (int64_t b = 0; b < group_blocks; ++b, codes += 16 * BITS, to += 128) {
      const __m512i v = _mm512_loadu_si512(codes);
      if (BITS == 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          put_pair(d.value<4>(_mm512_srli_epi32(v, 4 * j)), d.value<4>(_mm512_srli_epi32(v, 4 * j + 16)), to + 32 * j);
        }
      } else {
        const __m512i u = _mm512_loadu_si512(codes + 64);
        put_pair(d.value<8>(v), d.value<8>(_mm512_srli_epi32(v, 16)), to);
        put_pair(d.value<8>(u), d.value<8>(_mm512_srli_epi32(u, 16)), to + 32);
        put_pair(d.value<8>(_mm512_srli_epi32(v, 8)), d.value<8>(_mm512_srli_epi32(v, 24)), to + 64);
        put_pair(d.value<8>(_mm512_srli_epi32(u, 8)), d.value<8>(_mm512_srli_epi32(u, 24)), to + 96);
      }
    }
  }
}

// Rows of y for NT tiles that are decoded in `panel`.
template <int NT, class T>
struct Tiles {
  const Job& job;
  const T* panel;
  int64_t panel_stride, tile;

  template <int MR>
  void rows(int64_t row) const {
    const Activations& a = *job.x;
    const int64_t stride = a.row_stride * static_cast<int64_t>(sizeof(T));
    __m512 acc[NT][MR];
#pragma GCC unroll 2
    for (int n = 0; n < NT; ++n) {
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) acc[n][m] = _mm512_setzero_ps();
    }
    panel_steps<MR, NT, T>(acc, panel, panel_stride, static_cast<const char*>(a.data) + row * stride, stride,
                           a.padded * static_cast<int64_t>(sizeof(T)) / 4);
#pragma GCC unroll 2
    for (int n = 0; n < NT; ++n) {
      const __mmask16 mask = tile_mask(*job.weight, tile + n);
      const __m512 bias = load_bias(job, tile + n, mask);
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) store_tile(job, row + m, tile + n, mask, _mm512_add_ps(acc[n][m], bias));
    }
  }
};

template <class T>
void dense(const Job& job, int64_t first_tile, int64_t last_tile) {
  const hfq_weight& w = *job.weight;
  const Activations& a = *job.x;
  const int64_t tile_numbers = a.padded * 16;
  T* panel = static_cast<T*>(scratch(static_cast<size_t>(tile_numbers) * 2 * sizeof(T)));
  const int64_t fit = kRowBlock / (a.row_stride * static_cast<int64_t>(sizeof(T))) / kPanelRows * kPanelRows;
  const int64_t block = fit < kLeastRowBlock ? kLeastRowBlock : fit;
  for (int64_t row = 0; row < a.rows; row += block) {
    const int64_t end = row + block < a.rows ? row + block : a.rows;
    for (int64_t tile = first_tile; tile < last_tile; tile += 2) {
      const int tiles = last_tile - tile >= 2 ? 2 : 1;
      for (int n = 0; n < tiles; ++n) {
        if (w.bits == 4) {
          decode_tile<4>(w, tile + n, panel + n * tile_numbers);
        } else {
          decode_tile<8>(w, tile + n, panel + n * tile_numbers);
        }
      }
      if (tiles == 2) {
        by_passes(Tiles<2, T>{job, panel, tile_numbers, tile}, row, end);
      } else {
        by_passes(Tiles<1, T>{job, panel, tile_numbers, tile}, row, end);
      }
    }
  }
}

}  // namespace

void avx512_dense(const Job& job, int64_t first_tile, int64_t last_tile) {
  if (job.x->form == Form::kFloat) {
    dense<float>(job, first_tile, last_tile);
  } else {
    dense<uint16_t>(job, first_tile, last_tile);
  }
}

}  // namespace hfq
