// fp32 to and from the dtypes that values travel in: nearest, ties to even, one canonical NaN.
#pragma once

#include "cpu/types.hpp"

namespace gck {

static inline uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t to_fp16(float x) {
  const uint32_t bits = bits_of(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7e00;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14, where halves are denormal: adding 0.5 lets the FPU round to a multiple of 2^-24.
    const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    return static_cast<uint16_t>(sign | rounded);
  }
  const uint32_t rebased = magnitude - 0x38000000u;
  return static_cast<uint16_t>(sign | (rebased + 0xfffu + (rebased >> 13 & 1)) >> 13);
}

static inline float from_fp16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));  // times 2^112
}

// Stores x at position i and returns what a receiver will read.
static inline float store_rounded(void* base, Dtype dtype, int64_t i, float x) {
  if (dtype == Dtype::fp32) {
    x = x == x ? x : float_of(static_cast<uint32_t>(kNanKey));
    static_cast<float*>(base)[i] = x;
    return x;
  }
  const uint16_t half = dtype == Dtype::bf16 ? to_bf16(x) : to_fp16(x);
  static_cast<uint16_t*>(base)[i] = half;
  return dtype == Dtype::bf16 ? float_of(static_cast<uint32_t>(half) << 16) : from_fp16(half);
}

static inline float load_widened(const void* base, Dtype dtype, int64_t i) {
  if (dtype == Dtype::fp32) return static_cast<const float*>(base)[i];
  const uint16_t half = static_cast<const uint16_t*>(base)[i];
  return dtype == Dtype::bf16 ? float_of(static_cast<uint32_t>(half) << 16) : from_fp16(half);
}

}  // namespace gck
