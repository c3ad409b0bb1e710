// Runs every variant of the native kernels over odd shapes, for scripts/check_native.sh: each buffer is a heap block of
// exactly the size that the C ABI promises to need, so that a sanitizer sees any access beyond it.
#include "check_native.h"

int failures = 0;

namespace {

constexpr Shape kShapes[] = {{1, 8, 8},     {15, 16, 8},    {17, 96, 32},  {16, 20, 20},   {33, 36, 36}, {48, 192, 64},
                             {18, 264, 264}, {31, 512, 256}, {70, 320, 320}, {5, 1, 1},    {40, 128, 128}, {9, 13, 13}};
constexpr Grid kGrids[] = {{4, false, false}, {4, true, false}, {8, false, false}, {8, true, false}, {4, false, true}};
constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 25, 67};

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
    std::thread(all_decoders).join();
    printf("%s: done\n", name);
    ++variants;
  }
  if (failures) fprintf(stderr, "%d failures\n", failures);
  return failures || !variants ? 1 : 0;
}
