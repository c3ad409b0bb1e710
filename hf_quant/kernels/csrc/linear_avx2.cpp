// AVX2 and FMA: float32 products of decoded codes; int8 products with maddubs on 4-bit fields, which cannot overflow.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "convert.h"
#include "fill.h"
#include "linear.h"

namespace hfq {
namespace {

#define HFQ_INLINE inline __attribute__((always_inline))

constexpr int kShift[8] = {0, 16, 4, 20, 8, 24, 12, 28};  // of the nibble of column k in a row's 4 bytes
constexpr int64_t kPrefetch = 2048;

// The 16 rows of a tile in two registers.
struct Rows {
  __m256 low, high;
};

HFQ_INLINE __m256 load8(const void* from, int64_t i, int32_t type) {
  if (type == HFQ_F32) return _mm256_loadu_ps(static_cast<const float*>(from) + i);
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + i));
  if (type == HFQ_F16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

HFQ_INLINE Rows load_scales(const hfq_weight& w, int64_t group) {
  return {load8(w.scale, group * 16, w.scale_type), load8(w.scale, group * 16 + 8, w.scale_type)};
}

HFQ_INLINE Rows load_zeros(const hfq_weight& w, int64_t group) {
  if (!w.zero) {
    const __m256 zero = _mm256_set1_ps(w.table_grid ? 0.0f : static_cast<float>(implied_zero(w)));
    return {zero, zero};
  }
  const uint8_t* at = w.zero + group * 16;
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)))),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 8))))};
}

struct Decoder {
  __m256 first, second;  // levels 0..7 and 8..15 of a table
  bool table;
  explicit Decoder(const hfq_weight& w) : first(_mm256_setzero_ps()), second(first), table(w.table_grid) {
    if (table) first = _mm256_loadu_ps(w.table), second = _mm256_loadu_ps(w.table + 8);
  }
  template <int BITS>
  HFQ_INLINE __m256 code(__m256i v, int shift) const {
    const __m256i field = _mm256_srli_epi32(v, shift);
    if (BITS == 8) return _mm256_cvtepi32_ps(_mm256_and_si256(field, _mm256_set1_epi32(255)));
    if (!table) return _mm256_cvtepi32_ps(_mm256_and_si256(field, _mm256_set1_epi32(15)));
    // vpermps reads three bits; the fourth one, moved to the sign, chooses between the halves of the table
    const __m256 pick = _mm256_castsi256_ps(_mm256_slli_epi32(field, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, field), _mm256_permutevar8x32_ps(second, field), pick);
  }
};

HFQ_INLINE __m256i load_codes(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

// f(column, codes of rows 0-7, codes of rows 8-15) for the 8 columns of a block.
template <int BITS, class F>
HFQ_INLINE void each_column(const Decoder& d, const uint8_t* block, F f) {
  if (BITS == 4) {
    const __m256i low = load_codes(block), high = load_codes(block + 32);
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) f(k, d.code<4>(low, kShift[k]), d.code<4>(high, kShift[k]));
  } else {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i low = load_codes(block + 64 * half), high = load_codes(block + 64 * half + 32);
      constexpr int column_at[4] = {0, 4, 1, 5};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) f(column_at[k] + 2 * half, d.code<8>(low, 8 * k), d.code<8>(high, 8 * k));
    }
  }
}

void store_rows(const Job& job, int64_t row, int64_t tile, const float* sums) {
  const int64_t left = job.weight->out - tile * 16, n = left < 16 ? left : 16;
  float out[16];
  for (int r = 0; r < 16; ++r) out[r] = sums[r];
  if (job.bias) {
    for (int64_t r = 0; r < n; ++r) out[r] += load_number(job.bias, tile * 16 + r, job.dtype);
  }
  store_numbers(out, advance(job.y, row * job.y_stride + tile * 16, job.dtype), n, job.dtype);
}

// Few rows of x: codes as they are, scaled once a group; zero points through the sums of x.
template <int MR, int BITS>
void few_tile(const Job& job, const Decoder& d, int64_t tile, int64_t row) {
  const hfq_weight& w = *job.weight;
  const Activations& a = *job.x;
  const int64_t groups = groups_of(w), group_blocks = group_blocks_of(w);
  const float* x = static_cast<const float*>(a.data) + row * a.row_stride;
  const uint8_t* codes = w.codes + tile * tile_bytes_of(w);
  alignas(32) float totals[MR][16] = {};
  for (int64_t g = 0; g < groups; ++g) {
    // two independent sums per row and half: the columns of a block take turns
    __m256 low[MR][2], high[MR][2];
    for (int m = 0; m < MR; ++m) {
      for (int k = 0; k < 2; ++k) low[m][k] = high[m][k] = _mm256_setzero_ps();
    }
    for (int64_t b = 0; b < group_blocks; ++b, codes += 16 * BITS, x += 8) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetch), _MM_HINT_T0);
      each_column<BITS>(d, codes, [&](int k, __m256 first, __m256 second) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int m = 0; m < MR; ++m) {
          const __m256 value = _mm256_broadcast_ss(x + m * a.row_stride + k);
          low[m][k % 2] = _mm256_fmadd_ps(first, value, low[m][k % 2]);
          high[m][k % 2] = _mm256_fmadd_ps(second, value, high[m][k % 2]);
        }
      });
    }
    const Rows scale = load_scales(w, tile * groups + g), zero = load_zeros(w, tile * groups + g);
    for (int m = 0; m < MR; ++m) {
      __m256 first = _mm256_add_ps(low[m][0], low[m][1]), second = _mm256_add_ps(high[m][0], high[m][1]);
      if (!w.table_grid) {
        const __m256 sum = _mm256_set1_ps(a.sums[(row + m) * groups + g]);
        first = _mm256_fnmadd_ps(zero.low, sum, first);
        second = _mm256_fnmadd_ps(zero.high, sum, second);
      }
      _mm256_store_ps(totals[m], _mm256_fmadd_ps(first, scale.low, _mm256_load_ps(totals[m])));
      _mm256_store_ps(totals[m] + 8, _mm256_fmadd_ps(second, scale.high, _mm256_load_ps(totals[m] + 8)));
    }
  }
  for (int m = 0; m < MR; ++m) store_rows(job, row + m, tile, totals[m]);
}

// Scaled weights of one tile as [columns][16] float32.
template <int BITS>
void decode_tile(const hfq_weight& w, const Decoder& d, int64_t tile, float* to) {
  const int64_t groups = groups_of(w), group_blocks = group_blocks_of(w);
  const uint8_t* codes = w.codes + tile * tile_bytes_of(w);
  for (int64_t g = 0; g < groups; ++g) {
    const Rows scale = load_scales(w, tile * groups + g), zero = load_zeros(w, tile * groups + g);
    for (int64_t b = 0; b < group_blocks; ++b, codes += 16 * BITS, to += 128) {
      each_column<BITS>(d, codes, [&](int k, __m256 first, __m256 second) __attribute__((always_inline)) {
        _mm256_store_ps(to + 16 * k, _mm256_mul_ps(_mm256_sub_ps(first, zero.low), scale.low));
        _mm256_store_ps(to + 16 * k + 8, _mm256_mul_ps(_mm256_sub_ps(second, zero.high), scale.high));
      });
    }
  }
}

template <int MR>
void multiply(const Job& job, const float* panel, int64_t tile, int64_t row) {
  const Activations& a = *job.x;
  const float* x = static_cast<const float*>(a.data) + row * a.row_stride;
  __m256 low[MR], high[MR];
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m) low[m] = high[m] = _mm256_setzero_ps();
  for (int64_t c = 0; c < a.padded; ++c, panel += 16) {
    const __m256 first = _mm256_load_ps(panel), second = _mm256_load_ps(panel + 8);
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) {
      const __m256 value = _mm256_broadcast_ss(x + m * a.row_stride + c);
      low[m] = _mm256_fmadd_ps(first, value, low[m]);
      high[m] = _mm256_fmadd_ps(second, value, high[m]);
    }
  }
  for (int m = 0; m < MR; ++m) {
    alignas(32) float sums[16];
    _mm256_store_ps(sums, low[m]);
    _mm256_store_ps(sums + 8, high[m]);
    store_rows(job, row + m, tile, sums);
  }
}

template <int BITS>
void float_tiles(const Job& job, int64_t first_tile, int64_t last_tile) {
  const Decoder decoder(*job.weight);
  const Activations& a = *job.x;
  if (a.rows <= 2) {
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      a.rows == 2 ? few_tile<2, BITS>(job, decoder, tile, 0) : few_tile<1, BITS>(job, decoder, tile, 0);
    }
    return;
  }
  float* panel = static_cast<float*>(scratch(static_cast<size_t>(a.padded) * 64));
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    decode_tile<BITS>(*job.weight, decoder, tile, panel);
    int64_t row = 0;
    for (; a.rows - row >= 6; row += 6) multiply<6>(job, panel, tile, row);
    if (a.rows - row >= 3) multiply<3>(job, panel, tile, row), row += 3;
    if (a.rows - row >= 2) multiply<2>(job, panel, tile, row), row += 2;
    if (a.rows - row >= 1) multiply<1>(job, panel, tile, row);
  }
}

// Four columns a dword: 15 * 127 * 2 fits the 16 bits that maddubs adds up in, 255 * 127 * 2 would not.
HFQ_INLINE __m256i dot4(__m256i nibbles, __m256i x) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(nibbles, x), _mm256_set1_epi16(1));
}

// int32 sums of `blocks` blocks for 8 of the rows of a tile (half: 0 or 1) and MR rows of x.
template <int MR, int BITS>
HFQ_INLINE void int8_blocks(const uint8_t* codes, int half, int64_t blocks, const int8_t* x, int64_t stride,
                            __m256i* acc) {
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  __m256i sixteens[MR];  // of the high nibbles of 8-bit codes
  for (int m = 0; m < MR; ++m) sixteens[m] = _mm256_setzero_si256();
  for (int64_t b = 0; b < blocks; ++b, codes += 16 * BITS, x += 8) {
    const __m256i v = load_codes(codes + 32 * half);
    const __m256i u = BITS == 8 ? load_codes(codes + 64 + 32 * half) : v;
    const __m256i v_low = _mm256_and_si256(v, nibble), v_high = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    const __m256i u_low = _mm256_and_si256(u, nibble), u_high = _mm256_and_si256(_mm256_srli_epi16(u, 4), nibble);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      int32_t four, next;
      memcpy(&four, x + m * stride, 4);
      memcpy(&next, x + m * stride + 4, 4);
      const __m256i first = _mm256_set1_epi32(four), second = _mm256_set1_epi32(next);
      acc[m] = _mm256_add_epi32(acc[m], dot4(v_low, first));
      if (BITS == 4) {
        acc[m] = _mm256_add_epi32(acc[m], dot4(v_high, second));
      } else {
        acc[m] = _mm256_add_epi32(acc[m], dot4(u_low, second));
        sixteens[m] = _mm256_add_epi32(sixteens[m], _mm256_add_epi32(dot4(v_high, first), dot4(u_high, second)));
      }
    }
  }
  if (BITS == 8) {
    for (int m = 0; m < MR; ++m) acc[m] = _mm256_add_epi32(acc[m], _mm256_slli_epi32(sixteens[m], 4));
  }
}

template <int MR, int BITS>
void int8_rows(const Job& job, int64_t tile, int64_t row) {
  const hfq_weight& w = *job.weight;
  const Activations& a = *job.x;
  const int64_t groups = a.groups, group_blocks = group_blocks_of(w), row_parts = groups * a.group_parts;
  const int8_t* x = static_cast<const int8_t*>(a.data) + row * a.row_stride;
  const uint8_t* codes = w.codes + tile * tile_bytes_of(w);
  alignas(32) float totals[MR][16] = {};
  int64_t part = row * row_parts;
  for (int64_t g = 0; g < groups; ++g) {
    const Rows scale = load_scales(w, tile * groups + g), zero = load_zeros(w, tile * groups + g);
    int64_t left = group_blocks;
    for (int64_t p = 0; p < a.group_parts; ++p, ++part, left -= kInt8Block / 8) {
      const int64_t blocks = left < kInt8Block / 8 ? left : kInt8Block / 8;
      for (int half = 0; half < 2; ++half) {
        __m256i acc[MR];
        for (int m = 0; m < MR; ++m) acc[m] = _mm256_set1_epi32(a.starts[part + m * row_parts]);
        int8_blocks<MR, BITS>(codes, half, blocks, x, a.row_stride, acc);
        for (int m = 0; m < MR; ++m) {
          const int64_t i = part + m * row_parts;
          float* total = totals[m] + 8 * half;
          __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[m]), _mm256_set1_ps(a.scales[i]));
          if (w.zero) sum = _mm256_fnmadd_ps(half ? zero.high : zero.low, _mm256_set1_ps(a.sums[i]), sum);
          _mm256_store_ps(total, _mm256_fmadd_ps(sum, half ? scale.high : scale.low, _mm256_load_ps(total)));
        }
      }
      codes += blocks * 16 * BITS;
      x += blocks * 8;
    }
  }
  for (int m = 0; m < MR; ++m) store_rows(job, row + m, tile, totals[m]);
}

template <int BITS>
void int8_tiles(const Job& job, int64_t first_tile, int64_t last_tile) {
  const int64_t rows = job.x->rows;
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    int64_t row = 0;
    for (; rows - row >= 4; row += 4) int8_rows<4, BITS>(job, tile, row);
    if (rows - row >= 2) int8_rows<2, BITS>(job, tile, row), row += 2;
    if (rows - row >= 1) int8_rows<1, BITS>(job, tile, row);
  }
}

Form form(const hfq_weight& w, int32_t, int64_t, int32_t mode) {
  return mode == HFQ_INT8 && !w.table_grid ? Form::kInt8 : Form::kFloat;
}

bool wants_sums(const hfq_weight& w, Form form) { return form == Form::kInt8 ? w.zero != nullptr : !w.table_grid; }

void run(const Job& job, int64_t first_tile, int64_t last_tile) {
  const bool four = job.weight->bits == 4;
  if (job.x->form == Form::kInt8) {
    four ? int8_tiles<4>(job, first_tile, last_tile) : int8_tiles<8>(job, first_tile, last_tile);
  } else {
    four ? float_tiles<4>(job, first_tile, last_tile) : float_tiles<8>(job, first_tile, last_tile);
  }
}

const Variant kAvx2 = {"avx2", form, wants_sums, fill_rows<PlainRounder>, run};

}  // namespace

const Variant* avx2_variant() { return &kAvx2; }

}  // namespace hfq
