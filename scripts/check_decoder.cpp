// Runs fused decoders of random weights for scripts/check_native.sh: a prompt at once and token by token must agree, with
// keys and values in heap blocks of exactly the size that the C ABI promises to need.
#include "check_native.h"
#include "decoder_abi.h"

namespace {

struct Sizes {
  int64_t hidden, intermediate, heads, kv_heads, head_dim, group;
};

constexpr Sizes kSizes[] = {{32, 48, 2, 2, 16, 16}, {96, 64, 6, 2, 48, 32}, {64, 128, 3, 1, 64, 64}, {48, 32, 1, 1, 256, 16}};
constexpr int32_t kLayers = 2;
constexpr int64_t kPositions = 512;

size_t bytes_of(int32_t dtype) { return dtype == HFQ_F32 ? 4 : 2; }

void put(uint8_t* to, float value, int32_t dtype) {
  // 0x3c00 is 1 in float16: its numbers here are 1 or 0 with a sign, the other dtypes keep more of the value
  const uint16_t half = dtype == HFQ_BF16 ? to_bf16(value)
                                          : static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | (value > 0.3f || value < -0.3f ? 0x3000 : 0));
  memcpy(to, dtype == HFQ_F32 ? static_cast<const void*>(&value) : &half, bytes_of(dtype));
}

float get(const uint8_t* from, int32_t dtype) {
  float value;
  uint16_t half;
  if (dtype == HFQ_F32) return memcpy(&value, from, 4), value;
  memcpy(&half, from, 2);
  return from_bf16(half);
}

Block<uint8_t> numbers(int64_t count, int32_t dtype, float scale, float offset = 0.0f) {
  Block<uint8_t> found(static_cast<size_t>(count) * bytes_of(dtype));
  for (int64_t i = 0; i < count; ++i) {
    put(found.get() + static_cast<size_t>(i) * bytes_of(dtype), offset + scale * random_number(), dtype);
  }
  return found;
}

struct Layer {
  std::vector<std::unique_ptr<Weight>> weights;
  Block<uint8_t> input_norm, post_norm, q_norm;
  hfq_decoder_layer view;

  Layer(const Sizes& z, int32_t dtype, int32_t mode, bool head_norms)
      : input_norm(numbers(z.hidden, dtype, 0.2f, 1.0f)),
        post_norm(numbers(z.hidden, dtype, 0.2f, 1.0f)),
        q_norm(numbers(z.head_dim, dtype, 0.2f, 1.0f)) {
    const int64_t q = z.heads * z.head_dim, kv = z.kv_heads * z.head_dim;
    const int64_t out[7] = {q, kv, kv, z.hidden, z.intermediate, z.intermediate, z.hidden};
    const int64_t in[7] = {z.hidden, z.hidden, z.hidden, q, z.hidden, z.hidden, z.intermediate};
    hfq_projection* const all[7] = {&view.q, &view.k, &view.v, &view.o, &view.gate, &view.up, &view.down};
    for (int i = 0; i < 7; ++i) {
      // 8-bit keys beside 4-bit queries want their activations in another form
      const Grid grid{i == 1 ? 8 : 4, i == 2, false};
      weights.push_back(std::make_unique<Weight>(Shape{out[i], in[i], z.group}, grid));
      *all[i] = {&weights.back()->view, nullptr, mode, 0};
    }
    view.input_norm = input_norm.get();
    view.post_norm = post_norm.get();
    view.q_norm = view.k_norm = head_norms ? q_norm.get() : nullptr;
    view.input_eps = view.post_eps = view.q_eps = view.k_eps = 1e-5f;
    view.scaling = 1.0f / std::sqrt(static_cast<float>(z.head_dim));
    view.rotary = !head_norms;
  }
};

// Keys and values of all layers with room for `length` tokens, and the call.
struct Cache {
  std::vector<Block<uint8_t>> blocks;
  std::vector<void*> keys, values;
  Cache(const Sizes& z, int64_t rows, int64_t length, int32_t dtype) {
    for (int32_t i = 0; i < 2 * kLayers; ++i) {
      blocks.emplace_back(static_cast<size_t>(rows * z.kv_heads * length * z.head_dim) * bytes_of(dtype));
      memset(blocks.back().get(), 0, blocks.back().count);
      (i % 2 ? values : keys).push_back(blocks.back().get());
    }
  }
};

void decoder(const Sizes& z, int64_t rows, int64_t length, int32_t dtype, int32_t mode, bool masked, int32_t threads) {
  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<hfq_decoder_layer> views;
  for (int32_t i = 0; i < kLayers; ++i) {
    layers.push_back(std::make_unique<Layer>(z, dtype, mode, i == 1));
    views.push_back(layers.back()->view);
  }
  const Block<uint8_t> norm = numbers(z.hidden, dtype, 0.2f, 1.0f);
  const hfq_decoder d = {dtype,      kLayers,    z.hidden,     z.intermediate, z.heads, z.kv_heads,
                         z.head_dim, views.data(), norm.get(), 1e-5f,          0};
  const Block<uint8_t> x = numbers(rows * length * z.hidden, dtype, 1.0f);
  const Block<uint8_t> cos = numbers(kPositions * z.head_dim, dtype, 1.0f), sin = numbers(kPositions * z.head_dim, dtype, 1.0f);
  Block<int64_t> positions(static_cast<size_t>(length));
  for (int64_t t = 0; t < length; ++t) positions.get()[t] = (t * 7) % kPositions;
  Block<uint8_t> mask(static_cast<size_t>(rows * length));
  for (int64_t i = 0; i < rows * length; ++i) mask.get()[i] = i % length >= i / length % 3 && i % length % 11 != 5;
  const size_t size = bytes_of(dtype), row_bytes = static_cast<size_t>(z.hidden) * size;
  Block<uint8_t> found[2] = {Block<uint8_t>(x.count), Block<uint8_t>(x.count)};
  for (int one_by_one = 0; one_by_one < 2; ++one_by_one) {
    Cache cache(z, rows, length, dtype);
    for (int64_t past = 0; past < length; past += one_by_one ? 1 : length) {
      const int64_t news = one_by_one ? 1 : length;
      Block<uint8_t> in(static_cast<size_t>(rows * news) * row_bytes), out(in.count);
      for (int64_t r = 0; r < rows; ++r) {
        memcpy(in.get() + static_cast<size_t>(r * news) * row_bytes,
               x.get() + static_cast<size_t>(r * length + past) * row_bytes, static_cast<size_t>(news) * row_bytes);
      }
      const int64_t head = length * z.head_dim;
      const hfq_step step = {rows,         news,  in.get(),   out.get(),  positions.get() + past, 0,
                             cos.get(),    sin.get(), kPositions, cache.keys.data(), cache.values.data(), z.kv_heads * head,
                             head,         z.head_dim, past,  masked ? mask.get() : nullptr, length, masked ? 1 : 0,
                             0,            nullptr};
      const int32_t code = hfq_decode(&d, &step, threads);
      // the first tokens of a masked row have nothing to attend to: alone they are refused
      if (code == HFQ_MASKED && one_by_one) continue;
      if (code != HFQ_OK) {
        ++failures;
        fprintf(stderr, "%s: hfq_decode gives %d\n", hfq_variant(), code);
        return;
      }
      for (int64_t r = 0; r < rows; ++r) {
        memcpy(found[one_by_one].get() + static_cast<size_t>(r * length + past) * row_bytes,
               out.get() + static_cast<size_t>(r * news) * row_bytes, static_cast<size_t>(news) * row_bytes);
      }
    }
  }
  // a masked row's refused tokens leave no keys, so only calls without masks are compared; of float16 nothing is
  if (masked || dtype == HFQ_F16) return;
  // bf16 rounds at other places when it multiplies many rows, and these weights saturate the softmax
  double difference = 0.0, total = 0.0;
  for (size_t i = 0; i < x.count; i += size) {
    const double a = get(found[0].get() + i, dtype), b = get(found[1].get() + i, dtype);
    difference += (a - b) * (a - b);
    total += b * b;
  }
  if (difference <= (dtype == HFQ_F32 && mode == HFQ_EXACT ? 1e-8 : 1e-2) * total) return;
  ++failures;
  fprintf(stderr, "%s: a prompt of %lld tokens differs from the same token by token (%g of %g), dtype %d, mode %d\n",
          hfq_variant(), static_cast<long long>(length), difference, total, dtype, mode);
}

}  // namespace

void all_decoders() {
  for (const Sizes& z : kSizes) {
    for (const int32_t dtype : {HFQ_F32, HFQ_BF16, HFQ_F16}) {
      for (const int32_t mode : {HFQ_EXACT, HFQ_INT8}) {
        for (const bool masked : {false, true}) {
          decoder(z, 1, 3, dtype, mode, masked, 1);
          decoder(z, 2, 19, dtype, mode, masked, 2);
          decoder(z, 1, 141, dtype, mode, masked, 2);
        }
      }
    }
  }
}
