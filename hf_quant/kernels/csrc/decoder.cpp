// The fused decoder: every layer for one new token per row, in one parallel region.
//
// Rounding follows transformers' eager modules. What is cheap (norms, the conversion of activations) every thread does
// for itself, so that a layer needs five meetings of the threads: after q/k/v, attention, o, gate/up and down.
#include "decoder_abi.h"

#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "convert.h"
#include "glue.h"
#include "linear.h"

namespace hfq {
namespace {

// Some ten microseconds: the others are nearly always there by then. Where they are not, the machine is busy with other
// processes, and a thread that kept spinning would only use up the time that the scheduler has for its own team.
constexpr int kSpins = 1000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads meet here 150 times for a token of a small model. OpenMP's barrier may put them to sleep (and does under
// OMP_WAIT_POLICY=PASSIVE), which takes longer than the work between two of them.
class Meeting {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) {
        relax();
      } else {
        sched_yield();
      }
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

// 64-byte aligned memory that only grows.
struct Arena {
  char* memory = nullptr;
  size_t size = 0;
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { free(memory); }
  bool reserve(size_t bytes) {
    if (bytes <= size) return true;
    free(memory);
    size = (bytes + 4095) & ~static_cast<size_t>(4095);
    memory = static_cast<char*>(aligned_alloc(64, size));
    if (!memory) size = 0;
    return memory != nullptr;
  }
};

size_t padded(int64_t bytes) { return (static_cast<size_t>(bytes) + 127) & ~static_cast<size_t>(127); }

// What one thread keeps between calls.
struct Own {
  Activations activations;
  Arena arena;
};

Own& own() {
  static thread_local Own kept;
  return kept;
}

struct Run {
  const hfq_decoder* d;
  const hfq_step* s;
  const Variant* variant;
  const Glue* glue;
  const int64_t* first;          // [rows]: the first token that may be attended to
  const uint8_t* const* keep;    // [rows]: nullptr, or a byte per token
  char *x, *qkv, *attended, *gate, *up, *y;  // [rows] rows each, in the dtype of the model
  std::atomic<bool> failed{false};
  Meeting meeting;
};

const Glue* glue_of(const Variant* v) {
  if (v == avx512_variant() && avx512_glue()) return avx512_glue();
  if (v == avx2_variant() && avx2_glue()) return avx2_glue();
  return portable_glue();
}

// One thread's view of the run.
class Worker {
 public:
  Worker(Run& run, int thread, int threads)
      : run_(run), d_(*run.d), s_(*run.s), dtype_(run.d->dtype), thread_(thread), threads_(threads), own_(own()) {}

  // False when out of memory.
  bool prepare() {
    const int64_t longest = d_.hidden > s_.past + 1 ? d_.hidden : s_.past + 1;
    const size_t floats = padded((2 * longest + 32) * 4);
    if (!own_.arena.reserve(floats + padded(s_.rows * d_.hidden * size_of(dtype_)))) return false;
    scratch_ = reinterpret_cast<float*>(own_.arena.memory);
    normed_ = own_.arena.memory + floats;
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
    attend(l, index);
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
    return meet(good);
  }

  void finish() {
    for (int64_t r = share(s_.rows, thread_, threads_); r < share(s_.rows, thread_ + 1, threads_); ++r) {
      run_.glue->norm(at(run_.x, r * d_.hidden), d_.final_norm, d_.final_eps, advance(s_.y, r * d_.hidden, dtype_),
                      d_.hidden, dtype_, scratch_);
    }
  }

 private:
  char* at(char* base, int64_t elements) const { return base + elements * size_of(dtype_); }

  // All threads agree whether to go on: one that ran out of memory stops the others.
  bool meet(bool good) {
    if (!good) run_.failed.store(true, std::memory_order_relaxed);
    run_.meeting.wait(threads_);
    return !run_.failed.load(std::memory_order_relaxed);
  }

  void norm(const void* weight, float eps) {
    for (int64_t r = 0; r < s_.rows; ++r) {
      const int64_t offset = r * d_.hidden;
      run_.glue->norm(at(run_.x, offset), weight, eps, at(normed_, offset), d_.hidden, dtype_, scratch_);
    }
  }

  // This thread's columns of y = x W^T + bias. `fresh`: x has changed since the last product.
  bool project(const hfq_projection& p, const void* x, int64_t in, void* y, int64_t y_stride, bool fresh) {
    Activations& a = own_.activations;
    if (fresh || !serves(a, *run_.variant, *p.weight, dtype_, p.mode)) {
      const Input input{x, s_.rows, in, in, dtype_};
      if (!plan(a, *run_.variant, *p.weight, input, p.mode)) return false;
      fill_share(a, *run_.variant, input, 0, 1);
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
    for (int64_t r = 0; r < s_.rows; ++r) {
      const int64_t offset = r * d_.hidden + begin;
      run_.glue->add(at(run_.x, offset), at(run_.y, offset), end - begin, dtype_);
    }
  }

  void gate() {
    const int64_t begin = edge(d_.intermediate, thread_), end = edge(d_.intermediate, thread_ + 1);
    for (int64_t r = 0; r < s_.rows; ++r) {
      const int64_t offset = r * d_.intermediate + begin;
      run_.glue->gate(at(run_.gate, offset), at(run_.up, offset), end - begin, dtype_);
    }
  }

  void attend(const hfq_decoder_layer& l, int32_t index) {
    const int64_t n = d_.head_dim, q = d_.heads * n, kv = d_.kv_heads * n, wide = q + 2 * kv;
    const int64_t group = d_.heads / d_.kv_heads, items = s_.rows * d_.heads;
    const int64_t end = share(items, thread_ + 1, threads_);
    for (int64_t item = share(items, thread_, threads_); item < end; ++item) {
      const int64_t row = item / d_.heads, head = item % d_.heads, shared = head / group;
      char* projected = at(run_.qkv, row * wide);
      const int64_t cached = row * s_.row_stride + shared * s_.head_stride;
      const int64_t turn = s_.positions[row * s_.position_stride] * n;
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
      a.cos = l.rotary ? advance(s_.cos, turn, dtype_) : nullptr;
      a.sin = l.rotary ? advance(s_.sin, turn, dtype_) : nullptr;
      a.scaling = l.scaling;
      a.keys = advance(s_.keys[index], cached, dtype_);
      a.values = advance(s_.values[index], cached, dtype_);
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

  Run& run_;
  const hfq_decoder& d_;
  const hfq_step& s_;
  const int32_t dtype_;
  const int thread_, threads_;
  Own& own_;
  float* scratch_ = nullptr;
  char* normed_ = nullptr;
};

void body(int thread, int threads, void* data) {
  Run& run = *static_cast<Run*>(data);
  Worker worker(run, thread, threads);
  if (!worker.prepare()) run.failed.store(true, std::memory_order_relaxed);
  run.meeting.wait(threads);
  if (run.failed.load(std::memory_order_relaxed)) return;
  for (int32_t i = 0; i < run.d->count; ++i) {
    if (!worker.layer(i)) return;
  }
  worker.finish();
}

bool kept(const hfq_step& s, int64_t row, int64_t token) {
  const int64_t i = row * s.mask_stride + token;
  return s.mask_bytes == 1 ? static_cast<const uint8_t*>(s.mask)[i] != 0 : static_cast<const int64_t*>(s.mask)[i] != 0;
}

// Turns the mask of a row into its first token and, when there are holes after it, a byte per token in `bytes`.
int32_t read_mask(const hfq_step& s, int64_t row, int64_t* first, uint8_t* bytes, const uint8_t** keep) {
  *first = 0;
  *keep = nullptr;
  if (!s.mask) return HFQ_OK;
  int64_t t = 0;
  while (t <= s.past && !kept(s, row, t)) ++t;
  if (t > s.past) return HFQ_MASKED;
  *first = t;
  bool holes = false;
  for (; t <= s.past; ++t) {
    bytes[t] = kept(s, row, t);
    holes = holes || !bytes[t];
  }
  if (holes) *keep = bytes;
  return HFQ_OK;
}

int32_t check(const hfq_decoder& d, const hfq_step& s) {
  if (d.dtype < HFQ_F32 || d.dtype > HFQ_F16) return HFQ_BAD_DTYPE;
  if (d.count < 1 || s.rows < 1 || s.past < 0 || d.kv_heads < 1 || d.heads % d.kv_heads) return HFQ_BAD_SHAPE;
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
    const int64_t position = s.positions[r * s.position_stride];
    if (position < 0 || position >= s.table_rows) return HFQ_POSITION;
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
  const int64_t size = size_of(d.dtype), q = d.heads * d.head_dim, kv = d.kv_heads * d.head_dim;
  const int64_t widths[6] = {d.hidden, q + 2 * kv, q, d.intermediate, d.intermediate, d.hidden};
  size_t bytes = 2 * padded(s.rows * 8);
  for (int64_t width : widths) bytes += padded(s.rows * width * size);
  const size_t mask_row = padded(s.past + 1);
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
  char** const buffers[6] = {&run.x, &run.qkv, &run.attended, &run.gate, &run.up, &run.y};
  for (int i = 0; i < 6; ++i) *buffers[i] = take(padded(s.rows * widths[i] * size));
  for (int64_t r = 0; r < s.rows; ++r) {
    uint8_t* row_bytes = s.mask ? reinterpret_cast<uint8_t*>(take(mask_row)) : nullptr;
    const int32_t masked = read_mask(s, r, first + r, row_bytes, keep + r);
    if (masked) return masked;
  }
  memcpy(run.x, s.x, static_cast<size_t>(s.rows * d.hidden * size));
  run.d = decoder;
  run.s = step;
  run.variant = v;
  run.glue = glue_of(v);
  run.first = first;
  run.keep = keep;
  parallel(threads, body, &run);
  if (run.failed.load()) return HFQ_NO_MEMORY;
  if (s.lengths) {
    for (int32_t i = 0; i < d.count; ++i) ++*s.lengths[i];
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
