// The variant that any compiler vectorises as it can: plain loops over the 16 rows of a tile.
#include "convert.h"
#include "fill.h"
#include "linear.h"

namespace hfq {
namespace {

constexpr int64_t kRows = 2;        // rows of x done together: their sums take half of 16 registers
constexpr int64_t kChunk = 128;     // columns decoded at a time: 8 KB of float32
constexpr int kShift[8] = {0, 16, 4, 20, 8, 24, 12, 28};  // of the nibble of column k in a row's 4 bytes
constexpr int kByte[8] = {0, 2, 64, 66, 1, 3, 65, 67};    // of column k from a row's first byte in an 8-bit block


// Codes of one block as [8 columns][16 rows].
template <class T>
inline void unpack_block(const hfq_weight& w, const uint8_t* block, T* to) {
  if (w.bits == 4) {
    uint32_t rows[16];
    memcpy(rows, block, 64);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (int r = 0; r < 16; ++r) rows[r] = __builtin_bswap32(rows[r]);
#endif
    for (int k = 0; k < 8; ++k) {
      for (int r = 0; r < 16; ++r) to[k * 16 + r] = static_cast<T>((rows[r] >> kShift[k]) & 15);
    }
  } else {
    for (int k = 0; k < 8; ++k) {
      for (int r = 0; r < 16; ++r) to[k * 16 + r] = static_cast<T>(block[kByte[k] + 4 * r]);
    }
  }
}

struct GroupScales {
  float scale[16], zero[16];
  GroupScales(const hfq_weight& w, int64_t tile, int64_t g) {
    const int64_t at = (tile * groups_of(w) + g) * 16;
    for (int r = 0; r < 16; ++r) {
      scale[r] = load_number(w.scale, at + r, w.scale_type);
      zero[r] = w.zero ? static_cast<float>(w.zero[at + r]) : static_cast<float>(implied_zero(w));
    }
  }
};

// Scaled weights of `blocks` blocks as [columns][16].
void decode_blocks(const hfq_weight& w, const GroupScales& s, const uint8_t* codes, int64_t blocks, float* to) {
  for (int64_t b = 0; b < blocks; ++b, to += 128) {
    int32_t block[128];
    unpack_block(w, codes + b * 16 * w.bits, block);
    for (int k = 0; k < 8; ++k) {
      if (w.table_grid) {
        for (int r = 0; r < 16; ++r) to[k * 16 + r] = w.table[block[k * 16 + r]] * s.scale[r];
      } else {
        for (int r = 0; r < 16; ++r) {
          to[k * 16 + r] = (static_cast<float>(block[k * 16 + r]) - s.zero[r]) * s.scale[r];
        }
      }
    }
  }
}

// Four lanes that gcc and clang map to the registers of any SIMD instruction set.
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

template <int MR>
void float_rows(const float* panel, int64_t columns, const float* x, int64_t stride, float* totals) {
  Float4 acc[MR][4] = {};
  for (int64_t c = 0; c < columns; ++c) {
    Float4 weights[4];
    memcpy(weights, panel + c * 16, 64);
    for (int m = 0; m < MR; ++m) {
      const float value = x[m * stride + c];
      for (int r = 0; r < 4; ++r) acc[m][r] += weights[r] * value;
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int r = 0; r < 16; ++r) totals[m * 16 + r] += acc[m][r / 4][r % 4];
  }
}

template <int MR>
void int8_rows(const int32_t* panel, int64_t columns, const int8_t* x, int64_t stride, int32_t (*sums)[16]) {
  Int4 acc[MR][4] = {};
  for (int64_t c = 0; c < columns; ++c) {
    Int4 weights[4];
    memcpy(weights, panel + c * 16, 64);
    for (int m = 0; m < MR; ++m) {
      const int32_t value = x[m * stride + c];
      for (int r = 0; r < 4; ++r) acc[m][r] += weights[r] * value;
    }
  }
  memcpy(sums, acc, sizeof(acc));
}

// totals: [rows][16] of the job's rows.
void float_tile(const Job& job, int64_t tile, float* totals) {
  const hfq_weight& w = *job.weight;
  const Activations& a = *job.x;
  const int64_t group_blocks = group_blocks_of(w), block_bytes = 16 * w.bits, groups = groups_of(w);
  const uint8_t* codes = w.codes + tile * tile_bytes_of(w);
  alignas(64) float panel[kChunk * 16];
  for (int64_t g = 0; g < groups; ++g) {
    const GroupScales scales(w, tile, g);
    for (int64_t b = 0; b < group_blocks; b += kChunk / 8) {
      const int64_t blocks = group_blocks - b < kChunk / 8 ? group_blocks - b : kChunk / 8;
      const int64_t at = g * group_blocks + b;
      decode_blocks(w, scales, codes + at * block_bytes, blocks, panel);
      for (int64_t m = 0; m < a.rows;) {
        const float* x = static_cast<const float*>(a.data) + m * a.row_stride + at * 8;
        if (a.rows - m >= kRows) {
          float_rows<kRows>(panel, blocks * 8, x, a.row_stride, totals + m * 16);
          m += kRows;
        } else {
          float_rows<1>(panel, blocks * 8, x, a.row_stride, totals + m * 16);
          m += 1;
        }
      }
    }
  }
}

void int8_tile(const Job& job, int64_t tile, float* totals) {
  const hfq_weight& w = *job.weight;
  const Activations& a = *job.x;
  const int64_t group_blocks = group_blocks_of(w), block_bytes = 16 * w.bits, parts = a.groups * a.group_parts;
  const uint8_t* codes = w.codes + tile * tile_bytes_of(w);
  alignas(64) int32_t panel[kInt8Block * 16];
  for (int64_t g = 0; g < a.groups; ++g) {
    const GroupScales scales(w, tile, g);
    for (int64_t p = 0; p < a.group_parts; ++p) {
      const int64_t left = group_blocks - p * (kInt8Block / 8), at = g * group_blocks + p * (kInt8Block / 8);
      const int64_t blocks = left < kInt8Block / 8 ? left : kInt8Block / 8;
      for (int64_t b = 0; b < blocks; ++b) {
        // in the order of the permuted activations
        int32_t block[128];
        constexpr int column_at[8] = {0, 4, 1, 5, 2, 6, 3, 7};
        unpack_block(w, codes + (at + b) * block_bytes, block);
        for (int k = 0; k < 8; ++k) memcpy(panel + b * 128 + k * 16, block + column_at[k] * 16, 64);
      }
      for (int64_t m = 0; m < a.rows;) {
        const int8_t* x = static_cast<const int8_t*>(a.data) + m * a.row_stride + at * 8;
        const int n = a.rows - m >= kRows ? kRows : 1;
        int32_t acc[kRows][16];
        if (n == kRows) {
          int8_rows<kRows>(panel, blocks * 8, x, a.row_stride, acc);
        } else {
          int8_rows<1>(panel, blocks * 8, x, a.row_stride, acc);
        }
        for (int i = 0; i < n; ++i, ++m) {
          const float scale = a.scales[m * parts + g * a.group_parts + p];
          const int32_t start = a.starts[m * parts + g * a.group_parts + p];
          const float sum = w.zero ? a.sums[m * parts + g * a.group_parts + p] : 0.0f;
          for (int r = 0; r < 16; ++r) {
            const float product = static_cast<float>(acc[i][r] + start) * scale;
            totals[m * 16 + r] += (product - (w.zero ? scales.zero[r] * sum : 0.0f)) * scales.scale[r];
          }
        }
      }
    }
  }
}

Form form(const hfq_weight& w, int32_t, int64_t, int32_t mode) {
  return mode == HFQ_INT8 && !w.table_grid ? Form::kInt8 : Form::kFloat;
}

bool wants_sums(const hfq_weight& w, Form form) { return w.zero && form == Form::kInt8; }

void run(const Job& job, int64_t first_tile, int64_t last_tile) {
  const hfq_weight& w = *job.weight;
  const int64_t rows = job.x->rows;
  float* totals = static_cast<float*>(scratch(static_cast<size_t>(rows) * 64));
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    memset(totals, 0, static_cast<size_t>(rows) * 64);
    if (job.x->form == Form::kInt8) {
      int8_tile(job, tile, totals);
    } else {
      float_tile(job, tile, totals);
    }
    const int64_t left = w.out - tile * 16, n = left < 16 ? left : 16;
    float bias[16] = {};
    if (job.bias) load_numbers(advance(job.bias, tile * 16, job.dtype), bias, n, job.dtype);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t r = 0; r < n; ++r) totals[m * 16 + r] += bias[r];
      store_numbers(totals + m * 16, advance(job.y, m * job.y_stride + tile * 16, job.dtype), n, job.dtype);
    }
  }
}

const Variant kPortable = {"portable", form, wants_sums, fill_rows<PlainRounder>, run};

}  // namespace

const Variant* portable_variant() { return &kPortable; }

}  // namespace hfq
