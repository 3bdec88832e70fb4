// What codes.hpp is made of, with AVX2.
#pragma once

#include "cpu/isa/codes_x86.hpp"
#include "cpu/isa/halves.hpp"

namespace gck::GCK_ISA {

inline Vec least(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec floor_of(Vec a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
inline Vec one_where_less(Vec a, Vec b) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), one),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ), one)};
}
inline Vec with_sign(Vec magnitude, Vec sign) {
  const __m256 bit = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MIN));
  return {_mm256_or_ps(magnitude.lo, _mm256_and_ps(sign.lo, bit)),
          _mm256_or_ps(magnitude.hi, _mm256_and_ps(sign.hi, bit))};
}
inline void store_bytes(int8_t* p, Vec whole) {
  // Packing works within halves of 128 bits: words 0-3, 8-11, 4-7, 12-15 come out.
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(whole.lo), _mm256_cvtps_epi32(whole.hi));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline Vec from_bytes(__m128i bytes) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Vec one_of_four(const float* values, uint32_t word) {
  const __m256 table = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(values));
  const __m256i place = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  // The higher bits of the shifted words choose among copies.
  const auto eight = [&](uint32_t half) {
    return _mm256_permutevar8x32_ps(table,
                                    _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(half)), place));
  };
  return {eight(word), eight(word >> 16)};
}
// |a|, but 0 in lanes whose key is below the threshold; and 0 in the others.
inline Halves split_at(Vec a, int32_t threshold, Mask& reaching) {
  const Vec magnitude = abs(a);
  const __m256i below = _mm256_set1_epi32(threshold - 1);
  const auto in = [&](__m256 x) {
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_castps_si256(x), below));
  };
  const __m256 lo = in(magnitude.lo), hi = in(magnitude.hi);
  reaching = join(lo, hi);
  return {{_mm256_and_ps(lo, magnitude.lo), _mm256_and_ps(hi, magnitude.hi)},
          {_mm256_andnot_ps(lo, magnitude.lo), _mm256_andnot_ps(hi, magnitude.hi)}};
}

template <int Vecs>
constexpr bool packs_vectors = false;

}  // namespace gck::GCK_ISA
