// The C ABI of hf-quant's native CPU kernels: what Python loads with ctypes.
//
// Layout of a weight ("tiled"): a tile is 16 output rows times all columns. `out` is padded to a multiple of 16 rows
// and the columns to a multiple of 8; padding has code 0 and scale 0. Codes are stored as [tiles][blocks], 8 columns a
// block. Inside a block, row r of the tile owns the 4 bytes at 4r of every 64 bytes:
//   4 bits, 64 bytes a block:  low nibbles of the 4 bytes = columns 0, 4, 1, 5; high nibbles = columns 2, 6, 3, 7;
//   8 bits, 128 bytes a block: columns 0, 4, 1, 5 in the first 64 bytes, columns 2, 6, 3, 7 in the second.
// Read as 16-bit words, any one bit field of both words of a row is then a pair of neighbouring columns, which is what
// bf16 dot products take; read as bytes, it is four columns of one row, which is what int8 dot products take.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define HFQ_ABI 2

enum { HFQ_F32 = 0, HFQ_BF16 = 1, HFQ_F16 = 2 };
enum { HFQ_EXACT = 0, HFQ_INT8 = 1 };
enum {
  HFQ_OK = 0,
  HFQ_BAD_WEIGHT = 1,
  HFQ_BAD_DTYPE = 2,
  HFQ_BAD_SHAPE = 3,
  HFQ_BAD_MODE = 4,
  HFQ_UNKNOWN_VARIANT = 5,
  HFQ_UNSUPPORTED_VARIANT = 6,
  HFQ_NO_MEMORY = 7,
};

typedef struct {
  int32_t table_grid;  // 0: int grid, value = (code - zero) * scale; 1: value = table[code] * scale
  int32_t bits;        // 4 or 8
  int32_t scale_type;  // HFQ_F32, HFQ_BF16 or HFQ_F16
  int32_t reserved;
  int64_t out, in, group;  // real sizes; group divides in, and is a multiple of 8 unless it is `in`
  const uint8_t* codes;    // tiled; 64-byte alignment is fastest, any works
  const void* scale;       // [tiles][in / group][16] in scale_type
  const uint8_t* zero;     // [tiles][in / group][16], or NULL: the implied zero point (8 or 128)
  const float* table;      // 16 levels, or NULL on the int grid
} hfq_weight;

// y_i[rows, out_i] = x[rows, in] @ W_i^T + bias_i for `count` weights that share x.
//
// dtype is that of x, the biases and the y; strides are in elements; `biases` or any biases[i] may be NULL. mode:
// HFQ_EXACT (activations as they are) or HFQ_INT8 (activations rounded to int8 with one scale per row and block of
// min(group, 128) columns; weights on a table grid run the exact path). `threads` is an upper bound. Returns HFQ_OK or
// an error code, in which case nothing was written.
int32_t hfq_linear(const hfq_weight* const* weights, int32_t count, const void* x, int64_t rows, int64_t x_stride,
                   int32_t dtype, void* const* y, const int64_t* y_strides, const void* const* biases, int32_t mode,
                   int32_t threads);

// Bytes of the tiled codes of a weight.
int64_t hfq_codes_bytes(int64_t out, int64_t in, int32_t bits);
// Canonical rows (4 bits: even column in the low nibble, rows padded to a byte) to tiles, and back.
int32_t hfq_pack(const uint8_t* canonical, uint8_t* tiled, int64_t out, int64_t in, int32_t bits, int32_t threads);
int32_t hfq_unpack(const uint8_t* tiled, uint8_t* canonical, int64_t out, int64_t in, int32_t bits, int32_t threads);

// Rows [first_row, first_row + rows) of the weight, computed in float32 and rounded once to dtype.
int32_t hfq_dequantize(const hfq_weight* weight, int64_t first_row, int64_t rows, void* out, int64_t stride,
                       int32_t dtype, int32_t threads);
// The rows of the weight named by `rows`, likewise (the lookup of an embedding).
int32_t hfq_gather_rows(const hfq_weight* weight, const int64_t* rows, int64_t count, void* out, int64_t stride,
                        int32_t dtype, int32_t threads);

// The variant that runs: "avx512", "avx2" or "portable"; NULL when HF_QUANT_NATIVE names one that cannot run here.
const char* hfq_variant(void);
// Chooses a variant by name ("auto" or NULL: the best one), for tests; not safe while a product runs.
int32_t hfq_set_variant(const char* name);
// HFQ_OK, or why no product can run here: HF_QUANT_NATIVE names an unknown or unsupported variant.
int32_t hfq_status(void);
const char* hfq_error(int32_t code);
int32_t hfq_abi(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
