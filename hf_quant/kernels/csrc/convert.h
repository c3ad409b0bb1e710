// Scalar conversions between float32, bfloat16 and float16. In an unnamed namespace on purpose: every file is compiled
// for another instruction set, and the linker must not replace one copy by another.
#pragma once
#include <cstdint>
#include <cstring>

#include "hf_quant.h"

namespace hfq {
namespace {

inline uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline float from_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

inline uint16_t to_bf16(float f) {
  const uint32_t u = bits_of(f);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (u >> 16) | 0x40;
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

inline float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  // shifted into place the exponent is too small by 112: a multiplication mends it, also for subnormal numbers
  const uint32_t finite = bits_of(float_of(rest << 13) * 0x1p112f);
  const uint32_t special = 0x7f800000 | (rest << 13);
  return float_of(sign | (rest >= 0x7c00 ? special : finite));
}

inline uint16_t to_f16(float f) {
  const uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
  const uint32_t normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  // below 2^-14: adding 0.5 leaves the subnormal mantissa, rounded, in the low bits
  const uint32_t tiny = bits_of(float_of(rest) + 0.5f) - 0x3f000000;
  uint32_t h = rest < 0x38800000 ? tiny : normal;
  h = rest >= 0x477ff000 ? 0x7c00 : h;
  h = rest > 0x7f800000 ? 0x7e00 : h;
  return static_cast<uint16_t>(sign | h);
}

inline float load_number(const void* p, int64_t i, int32_t dtype) {
  if (dtype == HFQ_F32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return dtype == HFQ_BF16 ? from_bf16(h) : from_f16(h);
}

inline void store_number(void* p, int64_t i, float value, int32_t dtype) {
  if (dtype == HFQ_F32) {
    static_cast<float*>(p)[i] = value;
  } else {
    static_cast<uint16_t*>(p)[i] = dtype == HFQ_BF16 ? to_bf16(value) : to_f16(value);
  }
}

inline int64_t size_of(int32_t dtype) { return dtype == HFQ_F32 ? 4 : 2; }

inline const void* advance(const void* p, int64_t elements, int32_t dtype) {
  return static_cast<const char*>(p) + elements * size_of(dtype);
}

inline void* advance(void* p, int64_t elements, int32_t dtype) {
  return static_cast<char*>(p) + elements * size_of(dtype);
}

// n numbers as float32; the branches are outside of the loops so that they are vectorised.
inline void load_numbers(const void* p, float* to, int64_t n, int32_t dtype) {
  const uint16_t* half = static_cast<const uint16_t*>(p);
  if (dtype == HFQ_F32) {
    memcpy(to, p, static_cast<size_t>(n) * 4);
  } else if (dtype == HFQ_BF16) {
    for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(half[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from_f16(half[i]);
  }
}

inline void store_numbers(const float* from, void* p, int64_t n, int32_t dtype) {
  uint16_t* half = static_cast<uint16_t*>(p);
  if (dtype == HFQ_F32) {
    memcpy(p, from, static_cast<size_t>(n) * 4);
  } else if (dtype == HFQ_BF16) {
    for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) half[i] = to_f16(from[i]);
  }
}

}  // namespace
}  // namespace hfq
