// Internal interface of the linear kernels: what the entry points, the variants and the decoder share.
//
// Inside a running parallel region a product is: plan() once, then on every thread fill(), a barrier, linear_share().
#pragma once
#include <cstddef>
#include <cstdint>

#include "hf_quant.h"

namespace hfq {

constexpr int64_t kTileRows = 16;
constexpr int64_t kBlockColumns = 8;
constexpr int64_t kInt8Block = 128;  // the most columns that share one activation scale

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t tiles_of(const hfq_weight& w) { return ceil_div(w.out, kTileRows); }
inline int64_t blocks_of(const hfq_weight& w) { return ceil_div(w.in, kBlockColumns); }
inline int64_t groups_of(const hfq_weight& w) { return w.in / w.group; }
// Blocks of 8 columns in one group.
inline int64_t group_blocks_of(const hfq_weight& w) { return ceil_div(w.group, kBlockColumns); }
inline int64_t tile_bytes_of(const hfq_weight& w) { return blocks_of(w) * 16 * w.bits; }
inline int implied_zero(const hfq_weight& w) { return w.zero ? 0 : (w.bits == 4 ? 8 : 128); }

// x as the caller has it: `rows` rows of `in` numbers, `stride` elements apart.
struct Input {
  const void* data;
  int64_t rows, in, stride;
  int32_t dtype;
};

// The forms in which a micro-kernel takes x. All have the columns padded to a multiple of 8 with zeros.
enum class Form : int32_t {
  kBf16,   // bf16; the kernel takes codes as they are and applies the scales to sums over a group
  kDense,  // bf16; the kernel takes weights rounded to bf16, as the reference path does
  kFloat,  // float32
  kInt8,   // int8, columns of every 8 permuted as the low and high nibbles are: 0 4 1 5 2 6 3 7
};

// x converted once for every thread and for every weight that takes the same form. Memory stays with the object.
struct Activations {
  Form form = Form::kBf16;
  int64_t rows = 0, in = 0, padded = 0;
  int64_t group = 0;          // of the weight planned for; sums and int8 scales follow it
  int64_t groups = 0;
  int64_t group_parts = 0;    // activation blocks in one group (1 unless kInt8)
  bool with_sums = false;
  const void* data = nullptr; // rows, row_stride elements apart
  int64_t row_stride = 0;
  float* sums = nullptr;      // [rows][groups * group_parts]: sums of x (kInt8: as rounded) when with_sums
  float* scales = nullptr;    // kInt8: likewise, what an int8 code stands for
  int32_t implied = 0;        // kInt8: the implied zero point planned for
  int32_t* starts = nullptr;  // kInt8: likewise, -implied * sum of the int8 codes: where an int32 sum starts
  bool in_place = false;      // data is the caller's x: nothing to fill

  Activations() = default;
  Activations(const Activations&) = delete;
  Activations& operator=(const Activations&) = delete;
  ~Activations();
  void* storage = nullptr;
  size_t capacity = 0;
};

// One weight's share of a product.
struct Job {
  const hfq_weight* weight;
  const Activations* x;
  void* y;
  int64_t y_stride;
  const void* bias;  // or nullptr
  int32_t dtype;     // of y and bias
};

// One instruction set. Every function is called with tiles or rows that belong to the calling thread alone.
struct Variant {
  const char* name;
  // The form wanted for x, and whether sums over the groups are needed.
  Form (*form)(const hfq_weight& w, int32_t dtype, int64_t rows, int32_t mode);
  bool (*wants_sums)(const hfq_weight& w, Form form);
  void (*fill)(const Activations& a, const Input& x, int64_t first_row, int64_t last_row);
  void (*run)(const Job& job, int64_t first_tile, int64_t last_tile);
};

const Variant* avx512_variant();    // nullptr where it was not compiled
const Variant* avx2_variant();      // likewise
const Variant* portable_variant();
const Variant* active_variant();    // nullptr when HF_QUANT_NATIVE cannot be followed

// Decides the form of x for this weight and makes room; false when out of memory. Not thread-safe: one thread calls it.
bool plan(Activations& a, const Variant& v, const hfq_weight& w, const Input& x, int32_t mode);
// Whether activations planned for one weight serve another one as they are.
bool serves(const Activations& a, const Variant& v, const hfq_weight& w, int32_t dtype, int32_t mode);
// This thread's rows of the conversion.
void fill_share(const Activations& a, const Variant& v, const Input& x, int thread, int threads);
// This thread's output rows of y = x W^T + bias. x must be filled (barrier!) before.
void linear_share(const Activations& a, const Variant& v, const hfq_weight& w, void* y, int64_t y_stride,
                  const void* bias, int32_t dtype, int thread, int threads);

// The first of `count` things that belong to `thread`; contiguous ranges, so that each thread streams its own memory.
inline int64_t share(int64_t count, int thread, int threads) { return count * thread / threads; }

// Checks a weight and the dtype; an error code of the ABI.
int32_t check_weight(const hfq_weight* w);

// Runs body(thread, threads, data) on that many threads; in the calling thread when one is enough or after a fork
// (the child of a fork has no pool, and libgomp would wait for it forever).
void parallel(int threads, void (*body)(int thread, int threads, void* data), void* data);
void barrier(int threads);  // of the team that runs parallel()

// 64-byte aligned scratch memory of the calling thread, valid until its next call; terminates when out of memory.
void* scratch(size_t bytes);

}  // namespace hfq
