// AVX-512, few rows of x: bf16 dot products of codes as they are, scaled once a group.
//
// Codes 0..15, -8..7 and both nibbles of an 8-bit code are exact in bf16; the levels of a table are split into two bf16
// numbers, and so is x when it is not bf16 itself. Nothing is rounded but the float32 sums. vpermw looks at 5 bits of a
// word, so with the table stored twice no nibble has to be masked.
#include "avx512.h"
#include "fill.h"

namespace hfq {
namespace {

enum Kind { kInt4, kTable, kInt8Codes };

// Bytes ahead of the codes in use that are asked for. One row needs about 5 cycles for 64 bytes, memory some hundreds.
constexpr int64_t kPrefetch = 4096;

struct Tables {
  __m512i first, second;  // kInt4: codes; kTable: high and low parts of the levels; kInt8Codes: low and high nibbles
};

Tables tables_of(const hfq_weight& w, Kind kind) {
  alignas(64) uint16_t first[32], second[32];
  for (int i = 0; i < 32; ++i) {
    const int n = i % 16;
    float a = 0.0f, b = 0.0f;
    if (kind == kInt4) {
      a = static_cast<float>(n - implied_zero(w));
    } else if (kind == kInt8Codes) {
      a = static_cast<float>(n);
      b = static_cast<float>(16 * n - implied_zero(w));
    } else {
      a = from_bf16(to_bf16(w.table[n]));
      b = w.table[n] - a;
    }
    first[i] = to_bf16(a);
    second[i] = to_bf16(b);
  }
  return {_mm512_load_si512(first), _mm512_load_si512(second)};
}

template <int MR, int PLANES, Kind KIND>
struct Micro {
  // Independent sums per row, so that the latency of a dot product (6 cycles) is hidden when rows are few.
  static constexpr int K = MR == 1 ? 4 : MR <= 3 ? 2 : 1;
  const int32_t* x[PLANES];  // pairs of bf16
  int64_t stride;            // between rows, in bf16
  __m512 acc[MR][K];

  HFQ_INLINE void dot(__m512i weights, int64_t pair, int k) {
#pragma GCC unroll 3
    for (int p = 0; p < PLANES; ++p) {
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) {
        int32_t two;
        memcpy(&two, reinterpret_cast<const uint16_t*>(x[p]) + m * stride + 2 * pair, 4);
        acc[m][k % K] = _mm512_dpbf16_ps(acc[m][k % K], (__m512bh)weights, (__m512bh)_mm512_set1_epi32(two));
      }
    }
  }

  HFQ_INLINE void word(__m512i v, int64_t pair, int k, const Tables& t) {
    dot(_mm512_permutexvar_epi16(v, t.first), pair, k);
    if (KIND == kTable) dot(_mm512_permutexvar_epi16(v, t.second), pair, k);
  }

  HFQ_INLINE void block(const uint8_t* codes, int64_t b, const Tables& t) {
    const __m512i v = _mm512_loadu_si512(codes);
    if (MR <= 4) _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetch), _MM_HINT_T0);
    if (KIND != kInt8Codes) {
      word(v, 4 * b, 0, t);
      word(_mm512_srli_epi16(v, 4), 4 * b + 1, 1, t);
      word(_mm512_srli_epi16(v, 8), 4 * b + 2, 2, t);
      word(_mm512_srli_epi16(v, 12), 4 * b + 3, 3, t);
    } else {
      if (MR <= 4) _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetch + 64), _MM_HINT_T0);
      bytes(v, 4 * b, 4 * b + 2, t);
      bytes(_mm512_loadu_si512(codes + 64), 4 * b + 1, 4 * b + 3, t);
    }
  }

  HFQ_INLINE void bytes(__m512i v, int64_t low, int64_t high, const Tables& t) {
    dot(_mm512_permutexvar_epi16(v, t.first), low, 0);
    dot(_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), t.second), low, 1);
    dot(_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), t.first), high, 2);
    dot(_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), t.second), high, 3);
  }
};

template <int MR, int PLANES, Kind KIND>
void few_tile(const Job& job, int64_t tile, int64_t row, const Tables& tables) {
  const hfq_weight& w = *job.weight;
  const Activations& a = *job.x;
  Micro<MR, PLANES, KIND> micro;
  for (int p = 0; p < PLANES; ++p) {
    micro.x[p] = reinterpret_cast<const int32_t*>(static_cast<const uint16_t*>(a.data) + p * a.plane_stride + row * a.row_stride);
  }
  micro.stride = a.row_stride;
  constexpr int64_t block_bytes = KIND == kInt8Codes ? 128 : 64;
  const int64_t group_blocks = group_blocks_of(w), groups = groups_of(w);  // x may be planned for another group
  const uint8_t* codes = w.codes + tile * tile_bytes_of(w);
  __m512 total[MR];
  for (int m = 0; m < MR; ++m) total[m] = _mm512_setzero_ps();
  int64_t b = 0;
  for (int64_t g = 0; g < groups; ++g) {
    for (int m = 0; m < MR; ++m) {
      for (int k = 0; k < micro.K; ++k) micro.acc[m][k] = _mm512_setzero_ps();
    }
    for (const int64_t end = b + group_blocks; b < end; ++b, codes += block_bytes) micro.block(codes, b, tables);
    const __m512 scale = load_scales(w.scale, tile * groups + g, w.scale_type);
    for (int m = 0; m < MR; ++m) {
      __m512 sum = micro.acc[m][0];
      if (micro.K >= 2) sum = _mm512_add_ps(sum, micro.acc[m][1 % micro.K]);
      if (micro.K == 4) sum = _mm512_add_ps(sum, _mm512_add_ps(micro.acc[m][2 % micro.K], micro.acc[m][3 % micro.K]));
      total[m] = _mm512_fmadd_ps(sum, scale, total[m]);
    }
    if (w.zero) {
      const __m512 shift = _mm512_mul_ps(load_zeros(w.zero, tile * groups + g), scale);
      for (int m = 0; m < MR; ++m) {
        total[m] = _mm512_fnmadd_ps(shift, _mm512_set1_ps(a.sums[(row + m) * groups + g]), total[m]);
      }
    }
  }
  const __mmask16 mask = tile_mask(w, tile);
  const __m512 bias = load_bias(job, tile, mask);
  for (int m = 0; m < MR; ++m) store_tile(job, row + m, tile, mask, _mm512_add_ps(total[m], bias));
}

template <int PLANES, Kind KIND>
void few_rows(const Job& job, int64_t tile, const Tables& tables) {
  const int64_t rows = job.x->rows;
  for (int64_t row = 0; row < rows;) {
    switch (rows - row) {
      case 1: few_tile<1, PLANES, KIND>(job, tile, row, tables), row += 1; break;
      case 2: few_tile<2, PLANES, KIND>(job, tile, row, tables), row += 2; break;
      case 3: few_tile<3, PLANES, KIND>(job, tile, row, tables), row += 3; break;
      case 4: few_tile<4, PLANES, KIND>(job, tile, row, tables), row += 4; break;
      case 5: few_tile<5, PLANES, KIND>(job, tile, row, tables), row += 5; break;
      case 6: case 9: few_tile<6, PLANES, KIND>(job, tile, row, tables), row += 6; break;
      case 7: few_tile<7, PLANES, KIND>(job, tile, row, tables), row += 7; break;
      default: few_tile<8, PLANES, KIND>(job, tile, row, tables), row += 8; break;
    }
  }
}

template <Kind KIND>
void few_kind(const Job& job, int64_t first_tile, int64_t last_tile) {
  const Tables tables = tables_of(*job.weight, KIND);
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    switch (job.x->planes) {
      case 1: few_rows<1, KIND>(job, tile, tables); break;
      case 2: few_rows<2, KIND>(job, tile, tables); break;
      default: few_rows<3, KIND>(job, tile, tables); break;
    }
  }
}

// Rounds 128 numbers at a time with vpmovdb and a byte shuffle.
struct VectorRounder {
  static float quantize(const float* x, int64_t n, int8_t* to, int32_t* sum) {
    const int64_t padded = ceil_div(n, 8) * 8;
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < padded; i += 16) {
      largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
    }
    const uint32_t top = _mm512_reduce_max_epu32(largest);
    const bool finite = top < 0x7f800000, counts = finite && float_of(top) > kSmallestBlock;
    const __m512 inverse = _mm512_set1_ps(counts ? 127.0f / float_of(top) : 0.0f);
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < padded; i += 16) {
      const __mmask16 some = finite ? 0xffff : 0;
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(some, x + i), inverse));
      total = _mm512_add_epi32(total, rounded);
      const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(rounded), order);
      if (padded - i >= 16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bytes);
      } else {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i), bytes);
      }
    }
    *sum = _mm512_reduce_add_epi32(total);
    if (!finite) return float_of(0x7fc00000);
    return counts ? float_of(top) / 127.0f : 0.0f;
  }
};

// Up to how many rows codes are used as they are; above, a tile is decoded once and multiplied as a dense matrix.
// Measured: 4-bit integers need one dot product for a pair of columns as the dense path does, the others need two.
int64_t few_rows_of(const hfq_weight& w, int32_t dtype) {
  if (dtype != HFQ_BF16) return w.bits == 4 && !w.table_grid ? 8 : 4;
  return w.table_grid ? 12 : w.bits == 8 ? 8 : 64;
}

Form form(const hfq_weight& w, int32_t dtype, int64_t rows, int32_t mode) {
  if (mode == HFQ_INT8 && !w.table_grid) return Form::kInt8;
  // two bf16 tables hold 16 bits of a level: not enough beside float32 activations
  const bool precise = w.table_grid && dtype == HFQ_F32;
  if (rows <= few_rows_of(w, dtype) && !precise) return Form::kBf16;
  return dtype == HFQ_BF16 ? Form::kDense : Form::kFloat;
}

bool wants_sums(const hfq_weight& w, Form form) { return w.zero && (form == Form::kBf16 || form == Form::kInt8); }

void run(const Job& job, int64_t first_tile, int64_t last_tile) {
  switch (job.x->form) {
    case Form::kInt8: avx512_int8(job, first_tile, last_tile); break;
    case Form::kBf16: avx512_few(job, first_tile, last_tile); break;
    default: avx512_dense(job, first_tile, last_tile); break;
  }
}

const Variant kAvx512 = {"avx512", form, wants_sums, fill_rows<VectorRounder>, run};

}  // namespace

void avx512_few(const Job& job, int64_t first_tile, int64_t last_tile) {
  if (job.weight->table_grid) {
    few_kind<kTable>(job, first_tile, last_tile);
  } else if (job.weight->bits == 4) {
    few_kind<kInt4>(job, first_tile, last_tile);
  } else {
    few_kind<kInt8Codes>(job, first_tile, last_tile);
  }
}

const Variant* avx512_variant() { return &kAvx512; }

}  // namespace hfq
