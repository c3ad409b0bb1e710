// AVX-512, few rows of x: products with codes as they are, scaled once a group.
//
// Codes 0..15, -8..7 and both nibbles of an 8-bit code are exact in bf16, so nothing is rounded but the float32 sums.
// Levels of a table are rounded to bf16 beside bf16 activations, as the reference path rounds weights, but better:
// times a common factor that is chosen for the table. vpermw looks at 5 bits of a word, so with the table stored twice no
// nibble has to be masked; vpermps looks at 4 bits of a dword.
#include "avx512.h"
#include "fill.h"

namespace hfq {
namespace {

// Bytes ahead of the codes in use that are asked for. One row needs about 5 cycles for 64 bytes, memory some hundreds.
constexpr int64_t kPrefetch = 4096;

// The levels of a table times a factor, in bf16. For NF4 the factor leaves a relative error of 0.9e-3 (rms; 1.4e-3
// without it, 1.6e-3 when scaled weights are rounded); for FP4, whose levels are twelfths, none.
struct Levels {
  float table[16];
  uint16_t rounded[16];
  float factor;  // 0: nothing chosen yet

  void choose(const float* levels) {
    memcpy(table, levels, sizeof(table));
    float best = 1e30f;
    for (int i = 0; i < 1024; ++i) {
      const float candidate = 1.0f + static_cast<float>(i) / 1024.0f;
      float error = 0.0f;
      for (int n = 0; n < 16; ++n) {
        const float level = levels[n] * candidate, off = from_bf16(to_bf16(level)) - level;
        error += level != 0.0f ? off / level * (off / level) : 0.0f;
      }
      if (error >= best) continue;
      best = error;
      factor = candidate;
    }
    for (int n = 0; n < 16; ++n) rounded[n] = to_bf16(levels[n] * factor);
  }
};

// The choice takes some 50 microseconds, so each thread remembers the last two tables (a model has one or two).
const Levels& levels_of(const float* table) {
  static thread_local Levels kept[2] = {};
  static thread_local int next = 0;
  for (const Levels& levels : kept) {
    if (levels.factor != 0.0f && !memcmp(levels.table, table, sizeof(levels.table))) return levels;
  }
  Levels& levels = kept[next];
  next ^= 1;
  levels.choose(table);
  return levels;
}

// What a nibble stands for, in bf16: `first` at 4 bits; at 8 bits of the low and `second` of the high one. Sums are to
// be multiplied by `unit`.
struct PairTables {
  __m512i first, second;
  __m512 unit;
  explicit PairTables(const hfq_weight& w) : unit(_mm512_set1_ps(1.0f)) {
    alignas(64) uint16_t a[32], b[32];
    const Levels* levels = w.table_grid ? &levels_of(w.table) : nullptr;
    if (levels) unit = _mm512_set1_ps(1.0f / levels->factor);
    for (int i = 0; i < 32; ++i) {
      const int n = i % 16;
      a[i] = levels ? levels->rounded[n] : to_bf16(static_cast<float>(w.bits == 4 ? n - implied_zero(w) : n));
      b[i] = to_bf16(static_cast<float>(16 * n - implied_zero(w)));
    }
    first = _mm512_load_si512(a);
    second = _mm512_load_si512(b);
  }
};

struct FloatTables {
  __m512 levels, implied, unit;
  explicit FloatTables(const hfq_weight& w)
      : implied(_mm512_set1_ps(static_cast<float>(implied_zero(w)))), unit(_mm512_set1_ps(1.0f)) {
    alignas(64) float table[16];
    for (int n = 0; n < 16; ++n) table[n] = w.table_grid ? w.table[n] : static_cast<float>(n - implied_zero(w));
    levels = _mm512_load_ps(table);
  }
};

// bf16 activations: two columns a dot product.
template <int MR, int BITS>
struct PairMicro {
  using Number = uint16_t;
  using Tables = PairTables;
  // Independent sums per row, so that the latency of a dot product (6 cycles) is hidden when rows are few.
  static constexpr int K = MR == 1 ? 4 : MR <= 3 ? 2 : 1;
  const uint16_t* x;
  int64_t stride;  // between rows
  const PairTables t;
  __m512 acc[MR][K];

  HFQ_INLINE void dot(__m512i weights, int pair, int k) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      int32_t two;
      memcpy(&two, x + m * stride + 2 * pair, 4);
      acc[m][k % K] = _mm512_dpbf16_ps(acc[m][k % K], (__m512bh)weights, (__m512bh)_mm512_set1_epi32(two));
    }
  }

  HFQ_INLINE void word(__m512i v, int pair) {
    dot(_mm512_permutexvar_epi16(v, t.first), pair, pair);
  }

  HFQ_INLINE void bytes(__m512i v, int low, int high) {
    dot(_mm512_permutexvar_epi16(v, t.first), low, 0);
    dot(_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), t.second), low, 1);
    dot(_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), t.first), high, 2);
    dot(_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), t.second), high, 3);
  }

  HFQ_INLINE void block(const uint8_t* codes) {
    const __m512i v = _mm512_loadu_si512(codes);
    if (BITS == 4) {
      word(v, 0);
      word(_mm512_srli_epi16(v, 4), 1);
      word(_mm512_srli_epi16(v, 8), 2);
      word(_mm512_srli_epi16(v, 12), 3);
    } else {
      bytes(v, 0, 2);
      bytes(_mm512_loadu_si512(codes + 64), 1, 3);
    }
  }
};

// float32 activations (or float16 ones, as float32): one column a multiplication, and every code or level exact.
template <int MR, int BITS>
struct FloatMicro {
  using Number = float;
  using Tables = FloatTables;
  static constexpr int K = MR == 1 ? 4 : MR <= 3 ? 2 : 1;
  const float* x;
  int64_t stride;
  const FloatTables t;
  __m512 acc[MR][K];

  HFQ_INLINE void column(__m512i field, int k) {
    const __m512 code = BITS == 8
        ? _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(field, _mm512_set1_epi32(255))), t.implied)
        : _mm512_permutexvar_ps(field, t.levels);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      acc[m][k % K] = _mm512_fmadd_ps(code, _mm512_set1_ps(x[m * stride + k]), acc[m][k % K]);
    }
  }

  HFQ_INLINE void block(const uint8_t* codes) {
    const __m512i v = _mm512_loadu_si512(codes);
    if (BITS == 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        column(_mm512_srli_epi32(v, 4 * j), 2 * j);
        column(_mm512_srli_epi32(v, 4 * j + 16), 2 * j + 1);
      }
    } else {
      const __m512i u = _mm512_loadu_si512(codes + 64);
      constexpr int column_at[4] = {0, 4, 1, 5};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        column(_mm512_srli_epi32(v, 8 * k), column_at[k]);
        column(_mm512_srli_epi32(u, 8 * k), column_at[k] + 2);
      }
    }
  }
};

template <int MR, int BITS, template <int, int> class Micro>
void few_tile(const Job& job, int64_t tile, int64_t row, const typename Micro<1, BITS>::Tables& tables) {
  using Number = typename Micro<MR, BITS>::Number;
  const hfq_weight& w = *job.weight;
  const Activations& a = *job.x;
  Micro<MR, BITS> micro{static_cast<const Number*>(a.data) + row * a.row_stride, a.row_stride, tables, {}};
  constexpr int K = Micro<MR, BITS>::K;
  constexpr int64_t block_bytes = 16 * BITS;
  const int64_t group_blocks = group_blocks_of(w), groups = groups_of(w);  // x may be planned for another group
  const uint8_t* codes = w.codes + tile * tile_bytes_of(w);
  __m512 total[MR];
  for (int m = 0; m < MR; ++m) total[m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    for (int m = 0; m < MR; ++m) {
      for (int k = 0; k < K; ++k) micro.acc[m][k] = _mm512_setzero_ps();
    }
    for (int64_t b = 0; b < group_blocks; ++b, codes += block_bytes, micro.x += 8) {
      if (MR <= 4) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetch), _MM_HINT_T0);
        if (BITS == 8) _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetch + 64), _MM_HINT_T0);
      }
      micro.block(codes);
    }
    const __m512 scale = load_scales(w.scale, tile * groups + g, w.scale_type);
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 3
      for (int half = K / 2; half; half /= 2) {
#pragma GCC unroll 4
        for (int k = 0; k < half; ++k) micro.acc[m][k] = _mm512_add_ps(micro.acc[m][k], micro.acc[m][k + half]);
      }
      total[m] = _mm512_fmadd_ps(micro.acc[m][0], scale, total[m]);
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
  for (int m = 0; m < MR; ++m) store_tile(job, row + m, tile, mask, _mm512_fmadd_ps(total[m], tables.unit, bias));
}

template <int BITS, template <int, int> class Micro>
void few_tiles(const Job& job, int64_t first_tile, int64_t last_tile) {
  const int64_t rows = job.x->rows;
  const typename Micro<1, BITS>::Tables tables(*job.weight);
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    for (int64_t row = 0; row < rows;) {
      switch (rows - row) {
        case 1: few_tile<1, BITS, Micro>(job, tile, row, tables), row += 1; break;
        case 2: few_tile<2, BITS, Micro>(job, tile, row, tables), row += 2; break;
        case 3: few_tile<3, BITS, Micro>(job, tile, row, tables), row += 3; break;
        case 4: few_tile<4, BITS, Micro>(job, tile, row, tables), row += 4; break;
        case 5: few_tile<5, BITS, Micro>(job, tile, row, tables), row += 5; break;
        case 6: case 9: few_tile<6, BITS, Micro>(job, tile, row, tables), row += 6; break;
        case 7: few_tile<7, BITS, Micro>(job, tile, row, tables), row += 7; break;
        default: few_tile<8, BITS, Micro>(job, tile, row, tables), row += 8; break;
      }
    }
  }
}

template <int BITS>
void few(const Job& job, int64_t first_tile, int64_t last_tile) {
  if (job.x->form == Form::kBf16) {
    few_tiles<BITS, PairMicro>(job, first_tile, last_tile);
  } else {
    few_tiles<BITS, FloatMicro>(job, first_tile, last_tile);
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
// Measured: beside bf16, 4-bit codes take one dot product for two columns, as the dense path does, 8-bit ones two.
int64_t few_rows_of(const hfq_weight& w, int32_t dtype) {
  if (dtype != HFQ_BF16) return 8;
  return w.bits == 8 ? 8 : 64;
}

Form form(const hfq_weight& w, int32_t dtype, int64_t rows, int32_t mode) {
  if (mode == HFQ_INT8 && !w.table_grid) return Form::kInt8;
  if (dtype != HFQ_BF16) return Form::kFloat;
  return rows <= few_rows_of(w, dtype) ? Form::kBf16 : Form::kDense;
}

bool wants_sums(const hfq_weight& w, Form form) { return w.zero && form != Form::kDense; }

void run(const Job& job, int64_t first_tile, int64_t last_tile) {
  const Form form = job.x->form;
  if (form == Form::kInt8) {
    avx512_int8(job, first_tile, last_tile);
  } else if (form == Form::kBf16 || (form == Form::kFloat && job.x->rows <= few_rows_of(*job.weight, HFQ_F32))) {
    avx512_few(job, first_tile, last_tile);
  } else {
    avx512_dense(job, first_tile, last_tile);
  }
}

const Variant kAvx512 = {"avx512", form, wants_sums, fill_rows<VectorRounder>, run};

}  // namespace

void avx512_few(const Job& job, int64_t first_tile, int64_t last_tile) {
  if (job.weight->bits == 4) {
    few<4>(job, first_tile, last_tile);
  } else {
    few<8>(job, first_tile, last_tile);
  }
}

const Variant* avx512_variant() { return &kAvx512; }

}  // namespace hfq
