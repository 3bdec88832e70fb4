// Vec of AVX2: two registers.
#pragma once

#include <immintrin.h>

#include "cpu/isa/lanes.hpp"

namespace gck::GCK_ISA {

struct Vec {
  __m256 lo, hi;
};

inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m128i load_half(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m256 widen_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16));
}
inline Vec load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline Vec load_fp16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_half(p)), _mm256_cvtph_ps(load_half(p + 8))};
}
inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_past_caches(float* p, Vec a) {  // p aligned to a Vec
  _mm256_stream_ps(p, a.lo);
  _mm256_stream_ps(p + 8, a.hi);
}
inline void order_stores() { _mm_sfence(); }
inline Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec in_register(Vec a) { return a; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec abs(Vec a) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, magnitude), _mm256_and_ps(a.hi, magnitude)};
}
inline Vec max_key(Vec best, Vec a) {
  const auto larger = [](__m256 x, __m256 y) {
    const __m256i key = _mm256_and_si256(_mm256_castps_si256(y), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(x), key));
  };
  return {larger(best.lo, a.lo), larger(best.hi, a.hi)};
}
inline Mask join(__m256 lo, __m256 hi) {
  return static_cast<Mask>(_mm256_movemask_ps(lo)) | static_cast<Mask>(_mm256_movemask_ps(hi)) << 8;
}
inline Mask ge_zero(Vec a) {
  const __m256 zero = _mm256_setzero_ps();
  return join(_mm256_cmp_ps(a.lo, zero, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, zero, _CMP_GE_OQ));
}
inline Mask is_nan(Vec a) {
  return join(_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q));
}
inline Vec canonical(Vec a) {
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(kNanKey));
  const auto one = [&](__m256 x) { return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)); };
  return {one(a.lo), one(a.hi)};
}
inline Mask key_ge(Vec a, int32_t threshold) {
  const __m256i below = _mm256_set1_epi32(threshold - 1);  // threshold >= 0: no overflow
  const auto ge = [&](__m256 x) {
    const __m256i key = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(key, below));
  };
  return join(ge(a.lo), ge(a.hi));
}
inline bool any_key_ge(Vec a, Vec b, int32_t threshold) {
  const __m256i below = _mm256_set1_epi32(threshold - 1);
  const auto ge = [&](__m256 x) {
    const __m256i key = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_cmpgt_epi32(key, below);
  };
  const __m256i any =
      _mm256_or_si256(_mm256_or_si256(ge(a.lo), ge(a.hi)), _mm256_or_si256(ge(b.lo), ge(b.hi)));
  return !_mm256_testz_si256(any, any);
}
inline __m256 widen_mask(Mask m) {  // bit i -> all bits of lane i
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i on = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(m)), bit);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(on, bit));
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, widen_mask(m)),
          _mm256_blendv_ps(no.hi, yes.hi, widen_mask(m >> 8))};
}
// Canonical fp32 rounded to bf16 or fp16, nearest even: back in fp32, and as 16 narrow numbers.
inline __m256i bf16_bits(__m256 x) {  // in the upper halves
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
}
inline __m128i fp16_bits(__m256 x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec round_bf16(Vec a) {
  return {_mm256_castsi256_ps(bf16_bits(a.lo)), _mm256_castsi256_ps(bf16_bits(a.hi))};
}
inline Vec round_fp16(Vec a) { return {_mm256_cvtph_ps(fp16_bits(a.lo)), _mm256_cvtph_ps(fp16_bits(a.hi))}; }
inline void store_bf16(uint16_t* p, Vec a) {
  const __m256i lo = _mm256_srli_epi32(bf16_bits(a.lo), 16), hi = _mm256_srli_epi32(bf16_bits(a.hi), 16);
  const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), both);
}
inline void store_fp16(uint16_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), fp16_bits(a.lo));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), fp16_bits(a.hi));
}
// For each byte, the positions of its set bits. A table, because the instruction that could compute it
// (pext) takes hundreds of cycles on some processors with AVX2.
struct FrontLanes {
  uint64_t of[256];
};
constexpr FrontLanes front_lanes_table() {
  FrontLanes table{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int bit = 0, slot = 0; bit < 8; ++bit) {
      if (byte >> bit & 1) table.of[byte] |= static_cast<uint64_t>(bit) << 8 * slot++;
    }
  }
  return table;
}
static constexpr FrontLanes kFrontLanes = front_lanes_table();
inline __m256i front_lanes(Mask m) {  // positions of the set bits of m, as a permutation
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kFrontLanes.of[m & 0xff])));
}
inline void compress(float* p, Mask m, Vec a) {
  _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(a.lo, front_lanes(m)));
  p += __builtin_popcount(m & 0xff);
  _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(a.hi, front_lanes(m >> 8)));
}
inline void compress_index(uint32_t* p, Mask m, uint32_t base) {
  const auto put = [&](Mask half, uint32_t first) {
    const __m256i index = _mm256_add_epi32(front_lanes(half), _mm256_set1_epi32(static_cast<int>(first)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), index);
    p += __builtin_popcount(half & 0xff);
  };
  put(m & 0xff, base);
  put(m >> 8, base + 8);
}

inline void compress_words(uint32_t* p, Mask m, const uint32_t* words, uint32_t plus) {
  const auto put = [&](Mask half, const uint32_t* from) {
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i sum = _mm256_add_epi32(word, _mm256_set1_epi32(static_cast<int>(plus)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(sum, front_lanes(half)));
    p += __builtin_popcount(half & 0xff);
  };
  put(m & 0xff, words);
  put(m >> 8, words + 8);
}

// Position of the lowest set bit; anything where there is none.
inline uint32_t lowest_bit(uint64_t bits) { return static_cast<uint32_t>(_tzcnt_u64(bits)); }

}  // namespace gck::GCK_ISA
