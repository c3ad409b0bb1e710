// The conversion of activations, compiled by each variant for its own instruction set (hence the unnamed namespace).
//
// A variant passes a class Rounder with
//   static float quantize(const float* x, int64_t n, int8_t* to, int32_t* sum)
// which rounds n <= 128 numbers (x is padded with zeros to a multiple of 16) to permuted int8 and returns their scale.
#pragma once
#include "convert.h"
#include "linear.h"

namespace hfq {
namespace {

// Blocks whose largest magnitude is below this would need an infinite factor: they count as zero.
constexpr float kSmallestBlock = 1e-36f;

struct PlainRounder {
  static float quantize(const float* x, int64_t n, int8_t* to, int32_t* sum) {
    constexpr int column_at[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    const bool finite = largest < 0x7f800000;
    const float inverse = finite && float_of(largest) > kSmallestBlock ? 127.0f / float_of(largest) : 0.0f;
    int32_t rounded[kInt8Block + kBlockColumns], total = 0;
    const int64_t padded = ceil_div(n, kBlockColumns) * kBlockColumns;
    for (int64_t i = 0; i < padded; ++i) {
      // adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits
      rounded[i] = static_cast<int32_t>(bits_of((finite ? x[i] : 0.0f) * inverse + 12582912.0f) - 0x4b400000u);
      total += rounded[i];
    }
    for (int64_t b = 0; b < padded; b += 8) {
      for (int k = 0; k < 8; ++k) to[b + k] = static_cast<int8_t>(rounded[b + column_at[k]]);
    }
    *sum = total;
    if (!finite) return float_of(0x7fc00000);
    return inverse > 0.0f ? float_of(largest) / 127.0f : 0.0f;
  }
};

template <class Rounder>
void fill_int8_row(const Activations& a, const Input& x, const void* from, int64_t row) {
  alignas(64) float block[kInt8Block];
  int8_t* to = static_cast<int8_t*>(const_cast<void*>(a.data)) + row * a.row_stride;
  int64_t part = row * a.groups * a.group_parts;
  for (int64_t g = 0; g < a.groups; ++g) {
    for (int64_t c = 0; c < a.group; c += kInt8Block, ++part) {
      const int64_t left = a.group - c, n = left < kInt8Block ? left : kInt8Block;
      load_numbers(advance(from, g * a.group + c, x.dtype), block, n, x.dtype);
      for (int64_t i = n; i % 16; ++i) block[i] = 0.0f;
      int32_t sum;
      a.scales[part] = Rounder::quantize(block, n, to + g * a.group + c, &sum);
      a.starts[part] = -a.implied * sum;
      if (a.with_sums) a.sums[part] = static_cast<float>(sum) * a.scales[part];
    }
  }
}

inline void fill_sums(const Activations& a, const Input& x, const void* from, int64_t row) {
  float block[64];
  for (int64_t g = 0; g < a.groups; ++g) {
    float lanes[16] = {};
    for (int64_t c = 0; c < a.group; c += 64) {
      const int64_t left = a.group - c, n = left < 64 ? left : 64;
      load_numbers(advance(from, g * a.group + c, x.dtype), block, n, x.dtype);
      for (int64_t i = n; i < 64; ++i) block[i] = 0.0f;
      for (int64_t i = 0; i < 64; i += 16) {
        for (int64_t l = 0; l < 16; ++l) lanes[l] += block[i + l];
      }
    }
    float sum = 0.0f;
    for (int l = 0; l < 16; ++l) sum += lanes[l];
    a.sums[row * a.groups + g] = sum;
  }
}

template <class Rounder>
void fill_rows(const Activations& a, const Input& x, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const void* from = advance(x.data, row * x.stride, x.dtype);
    if (a.form == Form::kInt8) {
      fill_int8_row<Rounder>(a, x, from, row);
      continue;
    }
    if (a.with_sums) fill_sums(a, x, from, row);
    if (a.in_place) continue;
    if (a.form == Form::kFloat) {
      float* to = static_cast<float*>(const_cast<void*>(a.data)) + row * a.row_stride;
      load_numbers(from, to, a.in, x.dtype);
      for (int64_t i = a.in; i < a.padded; ++i) to[i] = 0.0f;
      continue;
    }
    uint16_t* to = static_cast<uint16_t*>(const_cast<void*>(a.data)) + row * a.row_stride;
    memcpy(to, from, static_cast<size_t>(a.in) * 2);  // the bf16 forms are for bf16 activations
    for (int64_t i = a.in; i < a.padded; ++i) to[i] = 0;
  }
}

}  // namespace
}  // namespace hfq
