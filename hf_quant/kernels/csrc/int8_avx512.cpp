// AVX-512 VNNI: products with activations rounded to int8. Sums of a group and a block of activations are int32.
#include "avx512.h"

namespace hfq {
namespace {

constexpr int64_t kPrefetch = 4096;      // from memory, where few rows wait for it
constexpr int64_t kPrefetchNear = 1024;  // from the second-level cache
constexpr int64_t kRowBlock = 256 << 10;   // bytes of x that stay in the cache while the tiles pass
constexpr int64_t kLeastRowBlock = 516;    // reading the codes again every 96 rows was 7 % slower
constexpr int64_t kUnpackRows = 24;        // from here on 4-bit codes are unpacked once for all rows

// The codes of NT tiles: those of the weight, or an unpacked copy in the 8-bit layout.
struct Codes {
  const uint8_t* at;
  int64_t tile_bytes;
};

// y[row .. row + MR) for NT tiles. With MR * NT <= 12 all sums stay in registers.
template <int MR, int NT, int BITS>
void int8_rows(const Job& job, Codes codes, int64_t tile, int64_t row) {
  const hfq_weight& w = *job.weight;
  const Activations& a = *job.x;
  const int8_t* x = static_cast<const int8_t*>(a.data) + row * a.row_stride;
  const int64_t stride = a.row_stride, groups = a.groups, group_blocks = group_blocks_of(w), parts = a.group_parts;
  const int64_t row_parts = groups * parts;
  const __m512i nibble = _mm512_set1_epi8(0x0f);
  const uint8_t* at = codes.at;
  // independent sums for the two halves of a block when rows are few
  constexpr int K = MR * NT <= 4 ? 2 : 1;
  __m512 total[NT][MR];
#pragma GCC unroll 2
  for (int n = 0; n < NT; ++n) {
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) total[n][m] = _mm512_setzero_ps();
  }
  int64_t part = row * row_parts;
  for (int64_t g = 0; g < groups; ++g) {
    int64_t left = group_blocks;
    for (int64_t p = 0; p < parts; ++p, ++part, left -= kInt8Block / 8) {
      __m512i acc[NT][MR][K];
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) {
        const __m512i start = _mm512_set1_epi32(a.starts[part + m * row_parts]);
#pragma GCC unroll 2
        for (int n = 0; n < NT; ++n) {
          acc[n][m][0] = start;
          if (K == 2) acc[n][m][K - 1] = _mm512_setzero_si512();
        }
      }
      const int64_t blocks = left < kInt8Block / 8 ? left : kInt8Block / 8;
      for (int64_t b = 0; b < blocks; ++b, at += 16 * BITS, x += 8) {
        __m512i half[2][NT];
#pragma GCC unroll 2
        for (int n = 0; n < NT; ++n) {
          const uint8_t* block = at + n * codes.tile_bytes;
          const char* ahead = reinterpret_cast<const char*>(block + (MR <= 4 ? kPrefetch : kPrefetchNear));
          half[0][n] = _mm512_loadu_si512(block);
          _mm_prefetch(ahead, _MM_HINT_T0);
          if (BITS == 4) {
            half[1][n] = _mm512_and_si512(_mm512_srli_epi16(half[0][n], 4), nibble);
            half[0][n] = _mm512_and_si512(half[0][n], nibble);
          } else {
            half[1][n] = _mm512_loadu_si512(block + 64);
            _mm_prefetch(ahead + 64, _MM_HINT_T0);
          }
        }
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 12
          for (int m = 0; m < MR; ++m) {
            int32_t four;
            memcpy(&four, x + m * stride + 4 * h, 4);
            const __m512i columns = NT == 1 ? _mm512_set1_epi32(four) : broadcast(four);
#pragma GCC unroll 2
            for (int n = 0; n < NT; ++n) {
              acc[n][m][h % K] = _mm512_dpbusd_epi32(acc[n][m][h % K], half[h][n], columns);
            }
          }
        }
      }
#pragma GCC unroll 2
      for (int n = 0; n < NT; ++n) {
        const int64_t group = (tile + n) * groups + g;
        const __m512 scale = load_scales(w.scale, group, w.scale_type);
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) {
          const __m512i sum = K == 2 ? _mm512_add_epi32(acc[n][m][0], acc[n][m][K - 1]) : acc[n][m][0];
          const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(a.scales[part + m * row_parts]));
          total[n][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, total[n][m]);
        }
        if (w.zero) {
          const __m512 shift = _mm512_mul_ps(load_zeros(w.zero, group), scale);
#pragma GCC unroll 12
          for (int m = 0; m < MR; ++m) {
            const __m512 sum = _mm512_set1_ps(a.sums[part + m * row_parts]);
            total[n][m] = _mm512_fnmadd_ps(shift, sum, total[n][m]);
          }
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int n = 0; n < NT; ++n) {
    const __mmask16 mask = tile_mask(w, tile + n);
    const __m512 bias = load_bias(job, tile + n, mask);
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) store_tile(job, row + m, tile + n, mask, _mm512_add_ps(total[n][m], bias));
  }
}

template <int BITS>
void one_tile(const Job& job, Codes codes, int64_t tile, int64_t row, int64_t end) {
  while (row < end) {
    switch (end - row) {
      case 1: int8_rows<1, 1, BITS>(job, codes, tile, row), row += 1; break;
      case 2: int8_rows<2, 1, BITS>(job, codes, tile, row), row += 2; break;
      case 3: int8_rows<3, 1, BITS>(job, codes, tile, row), row += 3; break;
      case 4: int8_rows<4, 1, BITS>(job, codes, tile, row), row += 4; break;
      case 5: int8_rows<5, 1, BITS>(job, codes, tile, row), row += 5; break;
      case 6: case 7: int8_rows<6, 1, BITS>(job, codes, tile, row), row += 6; break;
      case 8: case 9: case 10: case 11: int8_rows<8, 1, BITS>(job, codes, tile, row), row += 8; break;
      default: int8_rows<12, 1, BITS>(job, codes, tile, row), row += 12; break;
    }
  }
}

// Two tiles share the loads of x.
template <int BITS>
void two_tiles(const Job& job, Codes codes, int64_t tile, int64_t row, int64_t end) {
  for (; end - row >= 6; row += 6) int8_rows<6, 2, BITS>(job, codes, tile, row);
  if (end - row >= 4) int8_rows<4, 2, BITS>(job, codes, tile, row), row += 4;
  if (end - row >= 2) int8_rows<2, 2, BITS>(job, codes, tile, row), row += 2;
  if (end - row >= 1) int8_rows<1, 2, BITS>(job, codes, tile, row), row += 1;
}

// 4-bit codes of a tile in the 8-bit layout: low nibbles first.
void unpack_tile(const hfq_weight& w, int64_t tile, uint8_t* to) {
  const uint8_t* from = w.codes + tile * tile_bytes_of(w);
  const __m512i nibble = _mm512_set1_epi8(0x0f);
  for (const uint8_t* end = from + tile_bytes_of(w); from < end; from += 64, to += 128) {
    const __m512i v = _mm512_loadu_si512(from);
    _mm512_store_si512(to, _mm512_and_si512(v, nibble));
    _mm512_store_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble));
  }
}

void row_block(const Job& job, int64_t first_tile, int64_t last_tile, int64_t row, int64_t end) {
  const hfq_weight& w = *job.weight;
  const int64_t tile_bytes = tile_bytes_of(w);
  const bool unpack = w.bits == 4 && end - row >= kUnpackRows;
  uint8_t* unpacked = unpack ? static_cast<uint8_t*>(scratch(static_cast<size_t>(tile_bytes) * 4)) : nullptr;
  for (int64_t tile = first_tile; tile < last_tile;) {
    const int tiles = end - row >= 6 && last_tile - tile >= 2 ? 2 : 1;
    Codes codes{w.codes + tile * tile_bytes, tile_bytes};
    if (unpack) {
      codes = {unpacked, 2 * tile_bytes};
      for (int n = 0; n < tiles; ++n) unpack_tile(w, tile + n, unpacked + n * codes.tile_bytes);
    }
    if (unpack || w.bits == 8) {
      tiles == 2 ? two_tiles<8>(job, codes, tile, row, end) : one_tile<8>(job, codes, tile, row, end);
    } else {
      tiles == 2 ? two_tiles<4>(job, codes, tile, row, end) : one_tile<4>(job, codes, tile, row, end);
    }
    tile += tiles;
  }
}

}  // namespace

void avx512_int8(const Job& job, int64_t first_tile, int64_t last_tile) {
  const Activations& a = *job.x;
  const int64_t fit = kRowBlock / a.row_stride / 12 * 12;
  const int64_t step = fit < kLeastRowBlock ? kLeastRowBlock : fit;
  for (int64_t row = 0; row < a.rows; row += step) {
    row_block(job, first_tile, last_tile, row, row + step < a.rows ? row + step : a.rows);
  }
}

}  // namespace hfq
