// What the files of scripts/check_native.sh share: buffers of exactly the promised size, random weights, failures.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "hf_quant.h"

extern int failures;

// Every layer of the fused decoder; in check_decoder.cpp.
void all_decoders();

namespace {

[[maybe_unused]] uint32_t state = 1;

uint32_t random_bits() {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

[[maybe_unused]] float random_number() { return static_cast<float>(random_bits() & 0xffff) / 32768.0f - 1.0f; }

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

[[maybe_unused]] void check(bool good, const char* what, const Shape& s, const Grid& g, int64_t rows) {
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

[[maybe_unused]] uint16_t to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return static_cast<uint16_t>(u >> 16);
}

[[maybe_unused]] float from_bf16(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

}  // namespace
