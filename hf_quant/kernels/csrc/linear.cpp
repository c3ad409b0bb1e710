// Entry point of the product: checks, activations, and the division of work between threads.
#include "linear.h"

#include <cstdlib>
#include <cstring>

#include "convert.h"

namespace hfq {
namespace {

// Below this many bytes of codes times rows, waking another thread costs more than it saves.
constexpr int64_t kWorkPerThread = 48 << 10;

struct Product {
  const Variant* variant;
  const hfq_weight* const* weights;
  int32_t count;  // neighbours that take the same activations
  const Activations* activations;
  Input input;
  void* const* y;
  const int64_t* y_strides;
  const void* const* biases;
  int32_t dtype;
  int64_t tiles;
  bool filled;
};

void product_share(int thread, int threads, void* data) {
  const Product& p = *static_cast<const Product*>(data);
  if (!p.filled) {
    fill_share(*p.activations, *p.variant, p.input, thread, threads);
    barrier(threads);
  }
  // the tiles of all weights as one list, so that small weights do not leave a thread idle
  const int64_t begin = share(p.tiles, thread, threads), end = share(p.tiles, thread + 1, threads);
  int64_t offset = 0;
  for (int32_t i = 0; i < p.count; ++i) {
    const int64_t tiles = tiles_of(*p.weights[i]);
    const int64_t first = begin > offset ? begin - offset : 0, last = end - offset < tiles ? end - offset : tiles;
    if (first < last) {
      const void* bias = p.biases ? p.biases[i] : nullptr;
      p.variant->run(Job{p.weights[i], p.activations, p.y[i], p.y_strides[i], bias, p.dtype}, first, last);
    }
    offset += tiles;
  }
}

void* reserve(Activations& a, size_t bytes) {
  if (bytes > a.capacity) {
    free(a.storage);
    a.capacity = (bytes + 4095) & ~static_cast<size_t>(4095);
    a.storage = aligned_alloc(64, a.capacity);
    if (!a.storage) a.capacity = 0;
  }
  return a.storage;
}

size_t padded64(int64_t bytes) { return (static_cast<size_t>(bytes) + 63) & ~static_cast<size_t>(63); }

// The memory of one thread's activations is kept between products (and freed when the thread ends) unless it is large.
constexpr size_t kKeepBytes = 16 << 20;

}  // namespace

Activations::~Activations() { free(storage); }

int32_t check_weight(const hfq_weight* w) {
  if (!w || !w->codes || !w->scale || (w->bits != 4 && w->bits != 8)) return HFQ_BAD_WEIGHT;
  if (w->scale_type < HFQ_F32 || w->scale_type > HFQ_F16) return HFQ_BAD_WEIGHT;
  if (w->table_grid && (w->bits != 4 || !w->table || w->zero)) return HFQ_BAD_WEIGHT;
  if (w->out < 1 || w->in < 1 || w->group < 1 || w->in % w->group) return HFQ_BAD_WEIGHT;
  if (w->group != w->in && w->group % kBlockColumns) return HFQ_BAD_WEIGHT;
  return HFQ_OK;
}

bool plan(Activations& a, const Variant& v, const hfq_weight& w, const Input& x, int32_t mode) {
  a.form = v.form(w, x.dtype, x.rows, mode);
  a.with_sums = v.wants_sums(w, a.form);
  a.rows = x.rows;
  a.in = x.in;
  a.padded = ceil_div(x.in, kBlockColumns) * kBlockColumns;
  a.group = w.group;
  a.groups = groups_of(w);
  a.group_parts = a.form == Form::kInt8 ? ceil_div(w.group, kInt8Block) : 1;
  a.implied = implied_zero(w);
  const int64_t element = a.form == Form::kFloat ? 4 : a.form == Form::kInt8 ? 1 : 2;
  a.in_place = x.in == a.padded && x.dtype == (a.form == Form::kFloat ? HFQ_F32 : HFQ_BF16) && a.form != Form::kInt8;
  // a power-of-two distance between rows would put all of them into the same few sets of the cache
  a.row_stride = static_cast<int64_t>(padded64(a.padded * element) + 64) / element;
  const size_t numbers = a.in_place ? 0 : padded64(a.row_stride * a.rows * element);
  const size_t parts = padded64(a.rows * a.groups * a.group_parts * 4);
  const size_t extra = (a.form == Form::kInt8 ? 2 * parts : 0) + (a.with_sums ? parts : 0);
  char* base = nullptr;
  if (numbers + extra) {
    base = static_cast<char*>(reserve(a, numbers + extra));
    if (!base) return false;
  }
  a.data = a.in_place ? x.data : base;
  if (a.in_place) a.row_stride = x.stride;
  char* after = base + numbers;
  a.scales = a.form == Form::kInt8 ? reinterpret_cast<float*>(after) : nullptr;
  a.starts = a.form == Form::kInt8 ? reinterpret_cast<int32_t*>(after + parts) : nullptr;
  a.sums = a.with_sums ? reinterpret_cast<float*>(after + extra - parts) : nullptr;
  return true;
}

bool serves(const Activations& a, const Variant& v, const hfq_weight& w, int32_t dtype, int32_t mode) {
  const Form form = v.form(w, dtype, a.rows, mode);
  if (a.in != w.in || a.form != form) return false;
  if (form == Form::kInt8 && (a.group != w.group || a.implied != implied_zero(w))) return false;
  return !v.wants_sums(w, form) || (a.with_sums && a.group == w.group);
}

void fill_share(const Activations& a, const Variant& v, const Input& x, int thread, int threads) {
  if (a.in_place && !a.with_sums) return;
  const int64_t first = share(a.rows, thread, threads), last = share(a.rows, thread + 1, threads);
  if (first < last) v.fill(a, x, first, last);
}

void linear_share(const Activations& a, const Variant& v, const hfq_weight& w, void* y, int64_t y_stride,
                  const void* bias, int32_t dtype, int thread, int threads) {
  const int64_t tiles = tiles_of(w), first = share(tiles, thread, threads), last = share(tiles, thread + 1, threads);
  if (first < last) v.run(Job{&w, &a, y, y_stride, bias, dtype}, first, last);
}

}  // namespace hfq

using namespace hfq;

int32_t hfq_linear(const hfq_weight* const* weights, int32_t count, const void* x, int64_t rows, int64_t x_stride,
                   int32_t dtype, void* const* y, const int64_t* y_strides, const void* const* biases, int32_t mode,
                   int32_t threads) {
  if (count < 1 || rows < 0 || threads < 1) return HFQ_BAD_SHAPE;
  if (dtype < HFQ_F32 || dtype > HFQ_F16) return HFQ_BAD_DTYPE;
  if (mode != HFQ_EXACT && mode != HFQ_INT8) return HFQ_BAD_MODE;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t bad = check_weight(weights[i]);
    if (bad) return bad;
    if (weights[i]->in != weights[0]->in || (rows > 1 && y_strides[i] < weights[i]->out)) return HFQ_BAD_SHAPE;
  }
  if (rows > 1 && x_stride < 0) return HFQ_BAD_SHAPE;
  const Variant* v = active_variant();
  if (!v) return hfq_status();
  if (rows == 0) return HFQ_OK;

  static thread_local Activations kept;
  const Input input{x, rows, weights[0]->in, x_stride, dtype};
  for (int32_t i = 0; i < count;) {
    if (!plan(kept, *v, *weights[i], input, mode)) return HFQ_NO_MEMORY;
    int32_t n = 0;
    int64_t tiles = 0, work = 0;
    for (; i + n < count && (n == 0 || serves(kept, *v, *weights[i + n], dtype, mode)); ++n) {
      tiles += tiles_of(*weights[i + n]);
      work += tile_bytes_of(*weights[i + n]) * tiles_of(*weights[i + n]) * rows;
    }
    const int64_t useful = work / kWorkPerThread + 1;
    const int team = static_cast<int>(useful < threads ? useful : threads);
    // one row is converted sooner than the threads could agree to share it
    const bool filled = rows == 1 || team == 1;
    if (filled) fill_share(kept, *v, input, 0, 1);
    const void* const* bias = biases ? biases + i : nullptr;
    Product p{v, weights + i, n, &kept, input, y + i, y_strides + i, bias, dtype, tiles, filled};
    parallel(team, product_share, &p);
    i += n;
  }
  if (kept.capacity > kKeepBytes) {
    free(kept.storage);
    kept.storage = nullptr;
    kept.capacity = 0;
  }
  return HFQ_OK;
}
