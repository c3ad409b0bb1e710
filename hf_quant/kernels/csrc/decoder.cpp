// The fused decoder's entries: checks, masks, buffers, and the product with a float weight.
#include <cstring>

#include "convert.h"
#include "decoder_run.h"

namespace hfq {
namespace {

const Glue* glue_of(const Variant* v) {
  if (v == avx512_variant() && avx512_glue()) return avx512_glue();
  if (v == avx2_variant() && avx2_glue()) return avx2_glue();
  return portable_glue();
}

void body(int thread, int threads, void* data) { decode_share(*static_cast<Run*>(data), thread, threads); }

bool kept(const hfq_step& s, int64_t row, int64_t token) {
  const int64_t i = row * s.mask_stride + token;
  return s.mask_bytes == 1 ? static_cast<const uint8_t*>(s.mask)[i] != 0 : static_cast<const int64_t*>(s.mask)[i] != 0;
}

// Turns the mask of a row into its first token and, when there are holes after it, a byte per token in `bytes`.
int32_t read_mask(const hfq_step& s, int64_t row, int64_t* first, uint8_t* bytes, const uint8_t** keep) {
  *first = 0;
  *keep = nullptr;
  if (!s.mask) return HFQ_OK;
  const int64_t length = s.past + s.news;
  int64_t t = 0;
  while (t < length && !kept(s, row, t)) ++t;
  if (t == length && s.news == 1) return HFQ_MASKED;
  *first = t;
  bool holes = false;
  for (; t < length; ++t) {
    bytes[t] = kept(s, row, t);
    holes = holes || !bytes[t];
  }
  if (holes) *keep = bytes;
  return HFQ_OK;
}

int32_t check(const hfq_decoder& d, const hfq_step& s) {
  if (d.dtype < HFQ_F32 || d.dtype > HFQ_F16) return HFQ_BAD_DTYPE;
  if (d.count < 1 || s.rows < 1 || s.news < 1 || s.past < 0 || d.kv_heads < 1 || d.heads % d.kv_heads) return HFQ_BAD_SHAPE;
  if (d.head_dim < kHeadDimStep || d.head_dim > kMaxHeadDim || d.head_dim % kHeadDimStep) return HFQ_BAD_SHAPE;
  if (s.mask && s.mask_bytes != 1 && s.mask_bytes != 8) return HFQ_BAD_SHAPE;
  const int64_t q = d.heads * d.head_dim, kv = d.kv_heads * d.head_dim;
  for (int32_t i = 0; i < d.count; ++i) {
    const hfq_decoder_layer& l = d.layers[i];
    const hfq_projection* all[7] = {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down};
    const int64_t out[7] = {q, kv, kv, d.hidden, d.intermediate, d.intermediate, d.hidden};
    const int64_t in[7] = {d.hidden, d.hidden, d.hidden, q, d.hidden, d.hidden, d.intermediate};
    for (int j = 0; j < 7; ++j) {
      const int32_t bad = check_weight(all[j]->weight);
      if (bad) return bad;
      if (all[j]->weight->out != out[j] || all[j]->weight->in != in[j]) return HFQ_BAD_SHAPE;
      if (all[j]->mode != HFQ_EXACT && all[j]->mode != HFQ_INT8) return HFQ_BAD_MODE;
    }
  }
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t t = 0; t < s.news; ++t) {
      const int64_t position = s.positions[r * s.position_stride + t];
      if (position < 0 || position >= s.table_rows) return HFQ_POSITION;
    }
  }
  return HFQ_OK;
}

struct FloatRun {
  FloatProduct product;
  const Glue* glue;
  int64_t out;
};

void float_body(int thread, int threads, void* data) {
  const FloatRun& run = *static_cast<FloatRun*>(data);
  run.glue->float_product(run.product, share(run.out, thread, threads), share(run.out, thread + 1, threads));
}

}  // namespace
}  // namespace hfq

using namespace hfq;

int32_t hfq_decoder_abi(void) { return HFQ_DECODER_ABI; }

int32_t hfq_decode(const hfq_decoder* decoder, const hfq_step* step, int32_t threads) {
  const hfq_decoder& d = *decoder;
  const hfq_step& s = *step;
  const int32_t bad = check(d, s);
  if (bad) return bad;
  const Variant* v = active_variant();
  if (!v) return hfq_status();

  static thread_local Arena kept_memory;
  static thread_local Activations kept_activations;
  const int64_t size = size_of(d.dtype), q = d.heads * d.head_dim, kv = d.kv_heads * d.head_dim;
  const int64_t tokens = s.rows * s.news, shared = tokens >= kSharedTokens ? d.hidden : 0;
  const int64_t widths[7] = {d.hidden, q + 2 * kv, q, d.intermediate, d.intermediate, d.hidden, shared};
  size_t bytes = 2 * padded(s.rows * 8);
  for (int64_t width : widths) bytes += padded(tokens * width * size);
  const size_t mask_row = padded(s.past + s.news);
  if (!kept_memory.reserve(bytes + (s.mask ? mask_row * static_cast<size_t>(s.rows) : 0))) return HFQ_NO_MEMORY;

  char* next = kept_memory.memory;
  const auto take = [&next](size_t n) {
    char* found = next;
    next += n;
    return found;
  };
  int64_t* first = reinterpret_cast<int64_t*>(take(padded(s.rows * 8)));
  const uint8_t** keep = reinterpret_cast<const uint8_t**>(take(padded(s.rows * 8)));
  Run run;
  char** const buffers[7] = {&run.x, &run.qkv, &run.attended, &run.gate, &run.up, &run.y, &run.normed};
  for (int i = 0; i < 7; ++i) *buffers[i] = take(padded(tokens * widths[i] * size));
  for (int64_t r = 0; r < s.rows; ++r) {
    uint8_t* row_bytes = s.mask ? reinterpret_cast<uint8_t*>(take(mask_row)) : nullptr;
    const int32_t masked = read_mask(s, r, first + r, row_bytes, keep + r);
    if (masked) return masked;
  }
  memcpy(run.x, s.x, static_cast<size_t>(tokens * d.hidden * size));
  run.d = decoder;
  run.s = step;
  run.variant = v;
  run.glue = glue_of(v);
  run.tokens = tokens;
  run.first = first;
  run.keep = keep;
  run.activations = shared ? &kept_activations : nullptr;
  parallel(threads, body, &run);
  if (run.failed.load()) return HFQ_NO_MEMORY;
  if (s.lengths) {
    for (int32_t i = 0; i < d.count; ++i) *s.lengths[i] += s.news;
  }
  return HFQ_OK;
}

int32_t hfq_float_linear(const void* weight, int64_t weight_stride, int64_t out, int64_t in, const void* x, int64_t rows,
                         int64_t x_stride, const void* bias, void* y, int64_t y_stride, int32_t dtype,
                         int32_t threads) {
  if (dtype < HFQ_F32 || dtype > HFQ_F16) return HFQ_BAD_DTYPE;
  if (out < 1 || in < 1 || rows < 0 || threads < 1 || weight_stride < in) return HFQ_BAD_SHAPE;
  const Variant* v = active_variant();
  if (!v) return hfq_status();
  static thread_local Arena kept_memory;
  const int64_t stride = static_cast<int64_t>(padded(in * 4)) / 4;
  if (!kept_memory.reserve(static_cast<size_t>(rows * stride) * 4)) return HFQ_NO_MEMORY;
  float* wide = reinterpret_cast<float*>(kept_memory.memory);
  for (int64_t r = 0; r < rows; ++r) load_numbers(advance(x, r * x_stride, dtype), wide + r * stride, in, dtype);
  FloatRun run{{dtype, weight, weight_stride, in, wide, rows, stride, bias, y, y_stride}, glue_of(v), out};
  parallel(threads, float_body, &run);
  return HFQ_OK;
}
