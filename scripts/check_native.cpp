// Runs every variant of the native kernels over odd shapes, for scripts/check_native.sh: each buffer is a heap block of
// exactly the size that the C ABI promises to need, so that a sanitizer sees any access beyond it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "hf_quant.h"

namespace {

uint32_t state = 1;

uint32_t random_bits() {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

float random_number() { return static_cast<float>(random_bits() & 0xffff) / 32768.0f - 1.0f; }

// A heap block of its own: a std::vector may own more than it holds.
template <class T>
struct Block {
  std::unique_ptr<T[]> memory;
  size_t count;
  explicit Block(size_t n) : memory(new T[n]), count(n) {}
  T* get() const { return memory.get(); }
};

struct Shape {
  int64_t out, in, group;
};

struct Grid {
  int32_t bits;
  bool zero, table;
};

constexpr Shape kShapes[] = {{1, 8, 8},     {15, 16, 8},    {17, 96, 32},  {16, 20, 20},   {33, 36, 36}, {48, 192, 64},
                             {18, 264, 264}, {31, 512, 256}, {70, 320, 320}, {5, 1, 1},    {40, 128, 128}, {9, 13, 13}};
constexpr Grid kGrids[] = {{4, false, false}, {4, true, false}, {8, false, false}, {8, true, false}, {4, false, true}};
constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 25, 67};

int failures = 0;

void check(bool good, const char* what, const Shape& s, const Grid& g, int64_t rows) {
  if (good) return;
  ++failures;
  fprintf(stderr, "%s: %s, out %lld in %lld group %lld, %d bits%s%s, %lld rows\n", hfq_variant(), what,
          static_cast<long long>(s.out), static_cast<long long>(s.in), static_cast<long long>(s.group), g.bits,
          g.zero ? " with zero points" : "", g.table ? " table" : "", static_cast<long long>(rows));
}

struct Weight {
  Block<uint8_t> codes, zero;
  Block<float> scale, table, dense;
  hfq_weight view;

  Weight(const Shape& s, const Grid& g)
      : codes(static_cast<size_t>(hfq_codes_bytes(s.out, s.in, g.bits))),
        zero(numbers(s)), scale(numbers(s)), table(16), dense(static_cast<size_t>(s.out * s.in)) {
    const size_t row_bytes = static_cast<size_t>(g.bits == 8 ? s.in : (s.in + 1) / 2);
    Block<uint8_t> canonical(row_bytes * static_cast<size_t>(s.out)), restored(canonical.count);
    for (size_t i = 0; i < canonical.count; ++i) {
      const bool half = g.bits == 4 && s.in % 2 && i % row_bytes == row_bytes - 1;
      canonical.get()[i] = static_cast<uint8_t>(random_bits() & (half ? 15 : 255));
    }
    check(hfq_pack(canonical.get(), codes.get(), s.out, s.in, g.bits, 2) == HFQ_OK, "pack", s, g, 0);
    check(hfq_unpack(codes.get(), restored.get(), s.out, s.in, g.bits, 2) == HFQ_OK, "unpack", s, g, 0);
    check(!memcmp(canonical.get(), restored.get(), canonical.count), "unpack is not the inverse of pack", s, g, 0);
    for (size_t i = 0; i < scale.count; ++i) {
      scale.get()[i] = random_number() * 0.1f;
      zero.get()[i] = static_cast<uint8_t>(random_bits() & ((1u << g.bits) - 1));
    }
    for (size_t i = 0; i < 16; ++i) table.get()[i] = random_number();
    view = {g.table, g.bits, HFQ_F32, 0, s.out, s.in, s.group, codes.get(), scale.get(),
            g.zero ? zero.get() : nullptr, g.table ? table.get() : nullptr};
    check(hfq_dequantize(&view, 0, s.out, dense.get(), s.in, HFQ_F32, 2) == HFQ_OK, "dequantize", s, g, 0);
    Block<float> row(static_cast<size_t>(s.in));
    const int64_t last = s.out - 1;
    check(hfq_gather_rows(&view, &last, 1, row.get(), s.in, HFQ_F32, 1) == HFQ_OK, "gather", s, g, 1);
    check(!memcmp(row.get(), dense.get() + last * s.in, row.count * 4), "gather differs from dequantize", s, g, 1);
  }

  static size_t numbers(const Shape& s) { return static_cast<size_t>((s.out + 15) / 16 * 16 * (s.in / s.group)); }
};

uint16_t to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return static_cast<uint16_t>(u >> 16);
}

float from_bf16(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

void product(const Shape& s, const Grid& g, const Weight& w, int64_t rows, int32_t dtype, int32_t mode) {
  const int64_t gap = rows % 3;
  const size_t x_count = static_cast<size_t>((rows - 1) * (s.in + gap) + s.in);
  const size_t y_count = static_cast<size_t>((rows - 1) * (s.out + gap) + s.out);
  const size_t size = dtype == HFQ_F32 ? 4 : 2;
  Block<uint8_t> x(x_count * size), y(y_count * size), bias(static_cast<size_t>(s.out) * size);
  std::vector<float> values(x_count);
  for (size_t i = 0; i < x_count; ++i) {
    const uint16_t half = to_bf16(random_number());
    values[i] = from_bf16(half);
    // any bits below one are finite float16 numbers
    const uint16_t bits = dtype == HFQ_F16 ? static_cast<uint16_t>(random_bits() & 0xbbff) : half;
    memcpy(x.get() + i * size, size == 4 ? static_cast<const void*>(&values[i]) : &bits, size);
  }
  memset(bias.get(), 0, bias.count);
  const hfq_weight* weights[] = {&w.view};
  void* ys[] = {y.get()};
  const int64_t strides[] = {s.out + gap};
  const void* biases[] = {bias.get()};
  const int32_t threads = 1 + static_cast<int32_t>(rows % 2);
  const int32_t code =
      hfq_linear(weights, 1, x.get(), rows, s.in + gap, dtype, ys, strides, biases, mode, threads);
  check(code == HFQ_OK, hfq_error(code), s, g, rows);
  if (dtype == HFQ_F16) return;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t o = 0; o < s.out; ++o) {
      double sum = 0.0, size_of_terms = 0.0;
      for (int64_t i = 0; i < s.in; ++i) {
        const double term = static_cast<double>(w.dense.get()[o * s.in + i]) * values[m * (s.in + gap) + i];
        sum += term;
        size_of_terms += std::fabs(w.dense.get()[o * s.in + i]);
      }
      const uint8_t* at = y.get() + static_cast<size_t>(m * (s.out + gap) + o) * size;
      float got;
      uint16_t half;
      size == 4 ? memcpy(&got, at, 4) : memcpy(&half, at, 2);
      if (size == 2) got = from_bf16(half);
      const double allowed = (mode == HFQ_INT8 ? 0.01 : size == 2 ? 0.006 : 1e-4) * size_of_terms + 1e-3;
      if (std::fabs(got - sum) > allowed) return check(false, mode ? "int8 product" : "product", s, g, rows);
    }
  }
}

void all_shapes() {
  for (const Shape& s : kShapes) {
    for (const Grid& g : kGrids) {
      const Weight w(s, g);
      for (const int64_t rows : kRows) {
        for (const int32_t dtype : {HFQ_F32, HFQ_BF16, HFQ_F16}) {
          for (const int32_t mode : {HFQ_EXACT, HFQ_INT8}) product(s, g, w, rows, dtype, mode);
        }
      }
    }
  }
}

}  // namespace

int main() {
  int variants = 0;
  for (const char* name : {"avx512", "avx2", "portable"}) {
    if (hfq_set_variant(name) != HFQ_OK) {
      printf("%s: not on this CPU\n", name);
      continue;
    }
    // in a thread of its own, so that what the library keeps per thread is freed (or reported as a leak)
    std::thread(all_shapes).join();
    printf("%s: done\n", name);
    ++variants;
  }
  if (failures) fprintf(stderr, "%d failures\n", failures);
  return failures || !variants ? 1 : 0;
}
