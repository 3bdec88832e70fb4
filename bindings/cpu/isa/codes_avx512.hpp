// What codes.hpp is made of, with AVX-512.
#pragma once

#include "cpu/isa/codes_x86.hpp"
#include "cpu/isa/halves.hpp"

namespace gck::GCK_ISA {

inline Vec with_sign(Vec magnitude, Vec sign) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN);
  constexpr int a_or_b_and_c = 0xf8;
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(magnitude.v),
                                                        _mm512_castps_si512(sign.v), bit, a_or_b_and_c))};
}
inline void store_bytes(int8_t* p, Vec whole) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(whole.v)));
}
inline Vec from_bytes(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }
inline Vec one_of_four(const float* values, uint32_t word) {
  const __m512i place = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i which = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(word)), place);
  // The higher bits of `which` choose among copies.
  return {_mm512_permutexvar_ps(which, _mm512_broadcast_f32x4(_mm_loadu_ps(values)))};
}
// |a|, but 0 in lanes whose key is below the threshold; and 0 in the others.
inline Halves split_at(Vec a, int32_t threshold, Mask& reaching) {
  reaching = key_ge(a, threshold);
  const __m512 magnitude = _mm512_abs_ps(a.v);
  const __m512 low = _mm512_mask_mov_ps(magnitude, static_cast<__mmask16>(reaching), _mm512_setzero_ps());
  return {{_mm512_xor_ps(magnitude, low)}, {low}};
}

// The magnitude with the sign that acc has, whose mask tells where it is >= 0, as -0 is, too.
inline Vec signed_like(Vec, Mask positive, Vec magnitude) {
  const __m512i bits = _mm512_castps_si512(magnitude.v);
  const auto negative = static_cast<__mmask16>(~positive);
  return {_mm512_castsi512_ps(_mm512_mask_xor_epi32(bits, negative, bits, _mm512_set1_epi32(INT32_MIN)))};
}

inline Vec round_even(Vec a) { return {_mm512_cvtepi32_ps(_mm512_cvtps_epi32(a.v))}; }

GCK_INLINE Vec round_by(Vec drawn, Vec acc, Vec inverse, Vec qmax) {
  constexpr int least_magnitude = 2 | 2 << 2;  // without a sign
  const __m512 size = _mm512_range_ps(_mm512_mul_ps(acc.v, inverse.v), qmax.v, least_magnitude);
  // The whole number above what is left of size: its own one, or the next where the fraction was more. To
  // round what is left up passes no whole number.
  constexpr int up = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
  const __m512 left = _mm512_fnmadd_round_ps(drawn.v, _mm512_set1_ps(0x1p-24f), size, up);
  return add(with_sign({_mm512_roundscale_ps(left, up)}, acc), set1(0.0f));
}

template <int Bits>
inline uint64_t without_gaps(uint64_t x) {
  // One instruction on all processors with AVX-512, and hundreds of cycles on some with AVX2.
  return _pext_u64(x, Bits == 4 ? 0x0f0f0f0f0f0f0f0fu : 0x0303030303030303u);
}
inline uint32_t interleave(uint32_t even, uint32_t odd) {
  return _pdep_u32(even, 0x55555555u) | _pdep_u32(odd, 0xaaaaaaaau);  // fast where _pext_u64 is
}

template <int Vecs>
constexpr bool packs_vectors = Vecs == 4;
template <int Bits>
inline void store_packed(char* out, const Vec (&whole)[4]) {
  const auto whole_words = [&](int v) {
    return _mm512_packs_epi32(_mm512_cvtps_epi32(whole[v].v), _mm512_cvtps_epi32(whole[v + 1].v));
  };
  // Packing works within quarters: of each vector, a quarter has four codes.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(whole_words(0), whole_words(2)));
  if constexpr (Bits == 8) {
    _mm512_storeu_si512(out, bytes);
  } else if constexpr (Bits == 4) {
    const __m512i codes = _mm512_and_si512(bytes, _mm512_set1_epi8(15));
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(16 << 8 | 1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(pairs));
  } else {
    const __m512i codes = _mm512_and_si512(bytes, _mm512_set1_epi8(3));
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(4 << 8 | 1));
    const __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(16 << 16 | 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(fours));
  }
}

// The same of 4 or 2 bits, sixteen bytes at a time: each becomes a lane, where its codes, one after the
// other, are shifted to be the index into the table. Those of neighbouring elements then lie in other
// vectors. An index has four bits: of 2 bits there are four copies, and the higher two bits choose one.
template <int Bits, bool Levels = false>
struct Table {
  static constexpr int kWays = 8 / Bits;
  alignas(64) float values[16];

  void set(const char* scales, float alpha) {
    float scale[2];
    std::memcpy(scale, scales, Levels ? sizeof scale : sizeof scale[0]);
    Vec decoded;
    if constexpr (Levels) {
      // Negated rather than multiplied, so that a NaN changes its sign as everywhere.
      const __m512i level = _mm512_castps_si512(select(0xaaaa, set1(scale[1]), set1(scale[0])).v);
      decoded = {
          _mm512_castsi512_ps(_mm512_mask_xor_epi32(level, 0x3333, level, _mm512_set1_epi32(INT32_MIN)))};
    } else if constexpr (Bits == 2) {
      decoded = mul({_mm512_broadcast_f32x4(_mm_setr_ps(0, 1, -2, -1))}, set1(scale[0]));
    } else {
      const Vec codes = {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)};
      decoded = mul(codes, set1(scale[0]));
    }
    store(values, mul(decoded, set1(alpha)));
  }
  Vec at(const char* packed, int v) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + 16 * (v / kWays)));
    __m512i index = _mm512_cvtepu8_epi32(bytes);
    // As a product, since shifts share the units of the permutation.
    const int shift = v % kWays * Bits;
    if (shift) index = _mm512_mulhi_epu16(index, _mm512_set1_epi32(1 << (16 - shift)));
    return {_mm512_permutexvar_ps(index, _mm512_load_ps(values))};
  }
};

}  // namespace gck::GCK_ISA
