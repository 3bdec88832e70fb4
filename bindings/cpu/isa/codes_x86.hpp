// Packed codes to bytes, for any set that has 128 bits of SSE.
#pragma once

#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {

// Sixteen codes in two's complement, of which the first lies at the start of `packed`.
template <int Bits>
inline __m128i spread(const char* packed) {
  if constexpr (Bits == 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  __m128i x;
  if constexpr (Bits == 4) {
    x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
    x = _mm_and_si128(_mm_or_si128(x, _mm_slli_epi32(x, 4)), _mm_set1_epi8(0x0f));
  } else {
    int word;
    std::memcpy(&word, packed, sizeof word);
    x = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(word));
    x = _mm_and_si128(_mm_or_si128(x, _mm_slli_epi32(x, 12)), _mm_set1_epi16(0x0f));
    x = _mm_and_si128(_mm_or_si128(x, _mm_slli_epi32(x, 6)), _mm_set1_epi8(0x03));
  }
  const __m128i sign = _mm_set1_epi8(1 << (Bits - 1));
  return _mm_sub_epi8(_mm_xor_si128(x, sign), sign);
}

}  // namespace gck::GCK_ISA
