// The layers of the fused decoder, as one thread of a team computes them.
//
// Rounding follows transformers' eager modules. For few tokens, what is cheap (norms, the conversion of activations)
// every thread does for itself, so that a layer needs five meetings of the threads: after q/k/v, attention, o, gate/up
// and down.
#include <cstring>

#include "convert.h"
#include "decoder_run.h"

namespace hfq {
namespace {

// What one thread keeps between calls.
struct Own {
  Activations activations;
  Arena arena;
};

Own& own() {
  static thread_local Own kept;
  return kept;
}

class Worker {
 public:
  Worker(Run& run, int thread, int threads)
      : run_(run),
        d_(*run.d),
        s_(*run.s),
        dtype_(run.d->dtype),
        thread_(thread),
        threads_(threads),
        shared_(run.activations != nullptr),
        activations_(shared_ ? *run.activations : own().activations) {}

  // False when out of memory.
  bool prepare() {
    const int64_t length = s_.past + s_.news, longest = d_.hidden > length ? d_.hidden : length;
    const size_t floats = padded((2 * longest + 32) * 4);
    const size_t block = s_.news > 1 ? padded(static_cast<int64_t>(run_.glue->block_scratch(d_.head_dim, length))) : 0;
    const size_t normed = shared_ ? 0 : padded(run_.tokens * d_.hidden * size_of(dtype_));
    Arena& arena = own().arena;
    if (!arena.reserve(floats + block + normed)) return false;
    scratch_ = reinterpret_cast<float*>(arena.memory);
    block_ = arena.memory + floats;
    normed_ = shared_ ? run_.normed : arena.memory + floats + block;
    return true;
  }

  bool layer(int32_t index) {
    const hfq_decoder_layer& l = d_.layers[index];
    const int64_t q = d_.heads * d_.head_dim, kv = d_.kv_heads * d_.head_dim, wide = q + 2 * kv;
    norm(l.input_norm, l.input_eps);
    bool good = project(l.q, normed_, d_.hidden, run_.qkv, wide, true);
    good = good && project(l.k, normed_, d_.hidden, at(run_.qkv, q), wide, false);
    good = good && project(l.v, normed_, d_.hidden, at(run_.qkv, q + kv), wide, false);
    if (!meet(good)) return false;
    if (s_.news == 1) {
      attend(l, index);
    } else {
      append(l, index);
      run_.meeting.wait(threads_);
      attend_blocks(l, index);
    }
    run_.meeting.wait(threads_);
    good = project(l.o, run_.attended, q, run_.y, d_.hidden, true);
    add();
    if (!meet(good)) return false;
    norm(l.post_norm, l.post_eps);
    good = project(l.gate, normed_, d_.hidden, run_.gate, d_.intermediate, true);
    good = good && project(l.up, normed_, d_.hidden, run_.up, d_.intermediate, false);
    gate();
    if (!meet(good)) return false;
    good = project(l.down, run_.gate, d_.intermediate, run_.y, d_.hidden, true);
    add();
    if (thread_ == 0) run_.next.store(0, std::memory_order_relaxed);
    return meet(good);
  }

  void finish() {
    for (int64_t r = mine(); r < others(); ++r) {
      run_.glue->norm(at(run_.x, r * d_.hidden), d_.final_norm, d_.final_eps, advance(s_.y, r * d_.hidden, dtype_),
                      d_.hidden, dtype_, scratch_);
    }
  }

 private:
  char* at(char* base, int64_t elements) const { return base + elements * size_of(dtype_); }

  // This thread's tokens.
  int64_t mine() const { return share(run_.tokens, thread_, threads_); }
  int64_t others() const { return share(run_.tokens, thread_ + 1, threads_); }

  // All threads agree whether to go on: one that ran out of memory stops the others.
  bool meet(bool good) {
    if (!good) run_.failed.store(true, std::memory_order_relaxed);
    run_.meeting.wait(threads_);
    return !run_.failed.load(std::memory_order_relaxed);
  }

  void norm(const void* weight, float eps) {
    const int64_t end = shared_ ? others() : run_.tokens;
    for (int64_t r = shared_ ? mine() : 0; r < end; ++r) {
      const int64_t offset = r * d_.hidden;
      run_.glue->norm(at(run_.x, offset), weight, eps, at(normed_, offset), d_.hidden, dtype_, scratch_);
    }
  }

  // This thread's columns of y = x W^T + bias. `fresh`: x has changed since the last product, and where activations are
  // shared each thread has written its own tokens of it, or all have met since.
  bool project(const hfq_projection& p, const void* x, int64_t in, void* y, int64_t y_stride, bool fresh) {
    Activations& a = activations_;
    if (fresh || !serves(a, *run_.variant, *p.weight, dtype_, p.mode)) {
      const Input input{x, run_.tokens, in, in, dtype_};
      if (!shared_) {
        if (!plan(a, *run_.variant, *p.weight, input, p.mode)) return false;
        fill_share(a, *run_.variant, input, 0, 1);
      } else {
        if (!fresh) run_.meeting.wait(threads_);  // nobody multiplies by the old ones any more
        if (!meet(thread_ != 0 || plan(a, *run_.variant, *p.weight, input, p.mode))) return false;
        fill_share(a, *run_.variant, input, thread_, threads_);
        run_.meeting.wait(threads_);
      }
    }
    linear_share(a, *run_.variant, *p.weight, y, y_stride, p.bias, dtype_, thread_, threads_);
    return true;
  }

  // The columns that linear_share gave to this thread, of a product `out` wide.
  int64_t edge(int64_t out, int thread) const {
    const int64_t columns = share(ceil_div(out, kTileRows), thread, threads_) * kTileRows;
    return columns < out ? columns : out;
  }

  void add() {
    const int64_t begin = edge(d_.hidden, thread_), end = edge(d_.hidden, thread_ + 1);
    for (int64_t r = 0; r < run_.tokens; ++r) {
      const int64_t offset = r * d_.hidden + begin;
      run_.glue->add(at(run_.x, offset), at(run_.y, offset), end - begin, dtype_);
    }
  }

  void gate() {
    const int64_t begin = edge(d_.intermediate, thread_), end = edge(d_.intermediate, thread_ + 1);
    for (int64_t r = 0; r < run_.tokens; ++r) {
      const int64_t offset = r * d_.intermediate + begin;
      run_.glue->gate(at(run_.gate, offset), at(run_.up, offset), end - begin, dtype_);
    }
  }

  // cos or sin of a token's position; nullptr where this layer does not rotate.
  const void* turn_of(const hfq_decoder_layer& l, const void* table, int64_t row, int64_t token) const {
    const int64_t position = s_.positions[row * s_.position_stride + token];
    return l.rotary ? advance(table, position * d_.head_dim, dtype_) : nullptr;
  }

  int64_t cached(int64_t row, int64_t head) const { return row * s_.row_stride + head * s_.head_stride; }

  // One new token per row: a query head at a time, which also appends the key and value.
  void attend(const hfq_decoder_layer& l, int32_t index) {
    const int64_t n = d_.head_dim, q = d_.heads * n, kv = d_.kv_heads * n, wide = q + 2 * kv;
    const int64_t group = d_.heads / d_.kv_heads, items = s_.rows * d_.heads;
    const int64_t end = share(items, thread_ + 1, threads_);
    for (int64_t item = share(items, thread_, threads_); item < end; ++item) {
      const int64_t row = item / d_.heads, head = item % d_.heads, shared = head / group;
      char* projected = at(run_.qkv, row * wide);
      Attend a;
      a.dtype = dtype_;
      a.head_dim = n;
      a.q = at(projected, head * n);
      a.k = at(projected, q + shared * n);
      a.v = at(projected, q + kv + shared * n);
      a.q_norm = l.q_norm;
      a.k_norm = l.k_norm;
      a.q_eps = l.q_eps;
      a.k_eps = l.k_eps;
      a.cos = turn_of(l, s_.cos, row, 0);
      a.sin = turn_of(l, s_.sin, row, 0);
      a.scaling = l.scaling;
      a.keys = advance(s_.keys[index], cached(row, shared), dtype_);
      a.values = advance(s_.values[index], cached(row, shared), dtype_);
      a.token_stride = s_.token_stride;
      a.first = run_.first[row];
      a.past = s_.past;
      a.keep = run_.keep[row];
      a.append = head % group == 0;
      a.out = at(run_.attended, row * q + head * n);
      a.scores = scratch_;
      run_.glue->attend(a);
    }
  }

  // This thread's tokens: queries turned in place, keys and values into the cache.
  void append(const hfq_decoder_layer& l, int32_t index) {
    const int64_t n = d_.head_dim, q = d_.heads * n, kv = d_.kv_heads * n, wide = q + 2 * kv;
    const size_t bytes = static_cast<size_t>(n * size_of(dtype_));
    for (int64_t t = mine(); t < others(); ++t) {
      const int64_t row = t / s_.news, token = t % s_.news;
      char* projected = at(run_.qkv, t * wide);
      const void *cos = turn_of(l, s_.cos, row, token), *sin = turn_of(l, s_.sin, row, token);
      run_.glue->turn(Turn{dtype_, d_.heads, n, projected, l.q_norm, l.q_eps, cos, sin});
      run_.glue->turn(Turn{dtype_, d_.kv_heads, n, at(projected, q), l.k_norm, l.k_eps, cos, sin});
      for (int64_t h = 0; h < d_.kv_heads; ++h) {
        const int64_t place = cached(row, h) + (s_.past + token) * s_.token_stride;
        memcpy(advance(s_.keys[index], place, dtype_), at(projected, q + h * n), bytes);
        memcpy(advance(s_.values[index], place, dtype_), at(projected, q + kv + h * n), bytes);
      }
    }
  }

  // Blocks of queries, whoever is free takes the next; the last tokens, which attend to the most, come first.
  void attend_blocks(const hfq_decoder_layer& l, int32_t index) {
    const int64_t n = d_.head_dim, q = d_.heads * n, wide = q + 2 * d_.kv_heads * n;
    const int64_t group = d_.heads / d_.kv_heads, parts = ceil_div(group, kBlockRows), heads = ceil_div(group, parts);
    const int64_t tokens = kBlockRows / heads, blocks = ceil_div(s_.news, tokens);
    const int64_t columns = s_.rows * d_.kv_heads * parts, items = columns * blocks;
    for (int64_t item; (item = run_.next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      const int64_t from = (blocks - 1 - item / columns) * tokens, column = item % columns;
      const int64_t part = column % parts, shared = column / parts % d_.kv_heads, row = column / parts / d_.kv_heads;
      const int64_t head = part * heads, left = s_.news - from;
      AttendBlock a;
      a.dtype = dtype_;
      a.head_dim = n;
      a.tokens = left < tokens ? left : tokens;
      a.heads = group - head < heads ? group - head : heads;
      const int64_t token = row * s_.news + from, place = (shared * group + head) * n;
      a.q = at(run_.qkv, token * wide + place);
      a.q_stride = wide;
      a.scaling = l.scaling;
      a.keys = advance(s_.keys[index], cached(row, shared), dtype_);
      a.values = advance(s_.values[index], cached(row, shared), dtype_);
      a.token_stride = s_.token_stride;
      a.first = run_.first[row];
      a.past = s_.past + from;
      a.keep = run_.keep[row];
      a.out = at(run_.attended, token * q + place);
      a.out_stride = q;
      a.scratch = block_;
      run_.glue->attend_block(a);
    }
  }

  Run& run_;
  const hfq_decoder& d_;
  const hfq_step& s_;
  const int32_t dtype_;
  const int thread_, threads_;
  const bool shared_;
  Activations& activations_;
  float* scratch_ = nullptr;
  char *block_ = nullptr, *normed_ = nullptr;
};

}  // namespace

void decode_share(Run& run, int thread, int threads) {
  Worker worker(run, thread, threads);
  if (!worker.prepare()) run.failed.store(true, std::memory_order_relaxed);
  run.meeting.wait(threads);
  if (run.failed.load(std::memory_order_relaxed)) return;
  for (int32_t i = 0; i < run.d->count; ++i) {
    if (!worker.layer(i)) return;
  }
  worker.finish();
}

}  // namespace hfq
