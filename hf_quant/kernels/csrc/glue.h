// Internal interface of what lies between the products of a decoder layer; one table of functions per instruction set.
//
// All of it computes in float32 and rounds to the dtype of the model wherever transformers' modules do.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hfq {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kHeadDimStep = 16;

// One query head of one row, with the key and value head that it shares with others of its group.
struct Attend {
  int32_t dtype;
  int64_t head_dim;
  const void *q, *k, *v;            // of the new token, as projected
  const void *q_norm, *k_norm;      // or nullptr
  float q_eps, k_eps;
  const void *cos, *sin;            // of the new token's position, or nullptr: no rotation
  float scaling;
  void *keys, *values;              // of this row and head, the first token
  int64_t token_stride;
  int64_t first, past;              // tokens [first, past) and the new one are attended to
  const uint8_t* keep;              // nullptr, or one byte per token: 0 where it may not be attended to
  bool append;                      // write the new key and value behind the past ones
  void* out;                        // [head_dim]
  float* scores;                    // scratch: at least past + 1 - first + 16
};

// `heads` queries or keys of one token, which follow each other.
struct Turn {
  int32_t dtype;
  int64_t heads, head_dim;
  void* x;
  const void* norm;         // [head_dim], or nullptr
  float eps;
  const void *cos, *sin;    // of the token's position, or nullptr: no rotation
};

constexpr int64_t kBlockRows = 96;  // the most queries (tokens times heads) of one AttendBlock

// Some heads of neighbouring new tokens of one row, which share a key and value head; all tokens are in the cache.
struct AttendBlock {
  int32_t dtype;
  int64_t head_dim, tokens, heads;  // tokens * heads <= kBlockRows
  const void* q;                    // [tokens], q_stride apart, each with its heads side by side; normed and rotated
  int64_t q_stride;
  float scaling;
  const void *keys, *values;        // of this row and head, the first token
  int64_t token_stride;
  int64_t first, past;              // new token i attends to [first, past + i], which may be nothing: the result is 0
  const uint8_t* keep;              // nullptr, or one byte per token: 0 where it may not be attended to
  void* out;                        // [tokens], out_stride apart
  int64_t out_stride;
  void* scratch;                    // block_scratch(head_dim, past + tokens) bytes, 64-byte aligned
};

// Outputs of a product with a float weight.
struct FloatProduct {
  int32_t dtype;            // of weight, bias and y
  const void* weight;
  int64_t weight_stride, in;
  const float* x;           // [rows] rows, x_stride apart
  int64_t rows, x_stride;
  const void* bias;         // or nullptr
  void* y;
  int64_t y_stride;
};

struct Glue {
  // out = weight * round(x * rsqrt(mean(x^2) + eps)); scratch: 2 n floats.
  void (*norm)(const void* x, const void* weight, float eps, void* out, int64_t n, int32_t dtype, float* scratch);
  void (*attend)(const Attend& a);
  void (*turn)(const Turn& t);
  size_t (*block_scratch)(int64_t head_dim, int64_t length);
  void (*attend_block)(const AttendBlock& a);
  // gate = round(silu(gate)) * up, in place
  void (*gate)(void* gate, const void* up, int64_t n, int32_t dtype);
  // x += y
  void (*add)(void* x, const void* y, int64_t n, int32_t dtype);
  // outputs [first, last)
  void (*float_product)(const FloatProduct& p, int64_t first, int64_t last);
};

// The AVX-512 ones of block_scratch and attend_block.
size_t avx512_block_scratch(int64_t head_dim, int64_t length);
void avx512_attend_block(const AttendBlock& a);

const Glue* avx512_glue();  // nullptr where it was not compiled
const Glue* avx2_glue();    // likewise
const Glue* portable_glue();

}  // namespace hfq
