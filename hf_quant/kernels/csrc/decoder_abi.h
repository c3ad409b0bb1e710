// The C ABI of the fused decoder: all layers of a Llama-like model for new tokens of each row, in one call.
#pragma once
#include "hf_quant.h"

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

#define HFQ_DECODER_ABI 3

enum {
  HFQ_POSITION = 100,  // a position lies outside of the cos and sin tables
  HFQ_MASKED = 101,    // the only new token of a row may not attend to any
};

// y = x W^T + bias; the bias has the dtype of the model, or is NULL. mode: HFQ_EXACT or HFQ_INT8.
typedef struct {
  const hfq_weight* weight;
  const void* bias;
  int32_t mode;
  int32_t reserved;
} hfq_projection;

// x += o(attention(q, k, v of norm(x))); x += down(silu(gate) * up of norm(x)). Vectors have the dtype of the model.
typedef struct {
  hfq_projection q, k, v, o, gate, up, down;
  const void* input_norm;  // [hidden]
  const void* post_norm;   // [hidden]
  const void* q_norm;      // [head_dim] or NULL
  const void* k_norm;      // [head_dim] or NULL
  float input_eps, post_eps, q_eps, k_eps;
  float scaling;           // of the attention scores
  int32_t rotary;          // 0: this layer does not rotate queries and keys
} hfq_decoder_layer;

typedef struct {
  int32_t dtype;     // of activations, norms, biases and cache
  int32_t count;     // of layers
  int64_t hidden, intermediate, heads, kv_heads, head_dim;  // head_dim is a multiple of 16, at most 256
  const hfq_decoder_layer* layers;
  const void* final_norm;  // [hidden]
  float final_eps;
  int32_t reserved;
} hfq_decoder;

// `news` new tokens in each of `rows` sequences; each attends to itself and the tokens before it. Strides are in elements.
typedef struct {
  int64_t rows, news;
  const void* x;  // [rows][news][hidden], the embedded tokens
  void* y;        // [rows][news][hidden], after the final norm
  const int64_t* positions;   // [news] of each row, for the rotation
  int64_t position_stride;    // 0: all rows have the same position
  const void* cos;            // [table_rows][head_dim]
  const void* sin;
  int64_t table_rows;
  void* const* keys;          // per layer: [rows][kv_heads][>= past + news][head_dim]; new tokens are written from `past` on
  void* const* values;
  int64_t row_stride, head_stride, token_stride;
  int64_t past;
  const void* mask;           // NULL or [rows][>= past + news], nonzero where a token may be attended to
  int64_t mask_stride;
  int32_t mask_bytes;         // of one number of the mask: 1 or 8
  int32_t reserved;
  int64_t* const* lengths;    // NULL, or per layer a counter to be increased by `news`
} hfq_step;

// HFQ_OK or an error code, in which case neither y nor the cache was touched. `threads` is an upper bound.
int32_t hfq_decode(const hfq_decoder* decoder, const hfq_step* step, int32_t threads);
int32_t hfq_decoder_abi(void);

// y[rows, out] = x[rows, in] @ W^T + bias with a float weight [out, in] of the same dtype, for a few rows: what is left in
// float (mostly the output head) read once at the speed of memory. Sums are float32. `bias` may be NULL.
int32_t hfq_float_linear(const void* weight, int64_t weight_stride, int64_t out, int64_t in, const void* x, int64_t rows,
                         int64_t x_stride, const void* bias, void* y, int64_t y_stride, int32_t dtype, int32_t threads);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
