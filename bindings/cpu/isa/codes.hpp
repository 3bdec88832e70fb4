// Sixteen floats to whole numbers of a few bits and back, for the instruction set of this translation unit;
// and codes of one byte each packed closer, eight of them at a time.
#pragma once

#include "cpu/isa/philox.hpp"
#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {

struct Halves {
  Vec high, low;
};

inline Halves add(const Halves& a, const Halves& b) { return {add(a.high, b.high), add(a.low, b.low)}; }

#if defined(GCK_AVX512)

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

#elif defined(GCK_AVX2)

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

#else

inline Vec least(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
}
inline Vec floor_of(Vec a) {  // of what an int can hold, and is not negative
  return each([&](int i) { return static_cast<float>(static_cast<int32_t>(a.x[i])); });
}
inline Vec one_where_less(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] < b.x[i] ? 1.0f : 0.0f; });
}
inline Vec with_sign(Vec magnitude, Vec sign) {
  return each([&](int i) { return float_of(bits_of(magnitude.x[i]) | (bits_of(sign.x[i]) & 0x80000000u)); });
}
inline void store_bytes(int8_t* p, Vec whole) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(static_cast<int32_t>(whole.x[i]));
}
inline Vec one_of_four(const float* values, uint32_t word) {
  return each([&](int i) { return values[word >> 2 * i & 3]; });
}
// |a|, but 0 in lanes whose key is below the threshold; and 0 in the others.
inline Halves split_at(Vec a, int32_t threshold, Mask& reaching) {
  reaching = key_ge(a, threshold);
  const Vec magnitude = abs(a), zero = set1(0.0f);
  return {select(reaching, magnitude, zero), select(reaching, zero, magnitude)};
}

#endif

#if !defined(GCK_AVX512)
inline Vec signed_like(Vec acc, Mask, Vec magnitude) {
  return with_sign(magnitude, add(acc, set1(0.0f)));  // -0 + 0 is 0
}
#endif

// Sixteen codes in two's complement, of which the first lies at the start of `packed`.
template <int Bits>
inline Vec load_codes(const char* packed) {
#if defined(GCK_AVX512) || defined(GCK_AVX2)
  if constexpr (Bits == 8) return from_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
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
  return from_bytes(_mm_sub_epi8(_mm_xor_si128(x, sign), sign));
#else
  return each([&](int i) {
    const int byte = static_cast<unsigned char>(packed[i * Bits / 8]), sign = 1 << (Bits - 1);
    return static_cast<float>(((byte >> i * Bits % 8 & ((1 << Bits) - 1)) ^ sign) - sign);
  });
#endif
}

// What the codes of a chunk stand for: alpha * (code * scale), each product rounded. `set` by its scales;
// `at` is the v-th vector of the elements from `packed` on, in the order that sum_block has for kWays.
// Unit: alpha is 1, which no product needs.
template <int Bits, bool Unit = false>
struct Steps {
  static constexpr int kWays = 1;
  float step, factor;

  void set(const char* scales, float alpha) {
    std::memcpy(&step, scales, sizeof step);
    factor = alpha;
  }
  Vec at(const char* packed, int v) const {
    const Vec decoded = mul(load_codes<Bits>(packed + v * kLanes * Bits / 8), set1(step));
    return Unit ? decoded : mul(decoded, set1(factor));
  }
};

// The same of codes of 2 bits, from a table of their four values. Levels: a sign, and one of two levels.
template <bool Levels>
struct FourValues {
  static constexpr int kWays = 1;
  float values[4];

  void set(const char* scales, float alpha) {
    float scale[2];
    std::memcpy(scale, scales, Levels ? sizeof scale : sizeof scale[0]);
    if constexpr (Levels) {
      values[0] = -scale[0], values[1] = -scale[1], values[2] = scale[0], values[3] = scale[1];
    } else {
      for (int i = 0; i < 4; ++i) values[i] = static_cast<float>((i ^ 2) - 2) * scale[0];
    }
    for (float& value : values) value *= alpha;
  }
  Vec at(const char* packed, int v) const {
    uint32_t word;
    std::memcpy(&word, packed + 4 * v, sizeof word);
    return one_of_four(values, word);
  }
};

#if defined(GCK_AVX512)
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
#else
template <int Bits, bool Levels = false>
struct Table : Steps<Bits> {};
template <bool Levels>
struct Table<2, Levels> : FourValues<Levels> {};
#endif

// Nearest, ties to even, of magnitudes far below 2^22; never -0.
inline Vec round_even(Vec a) {
#if defined(GCK_AVX512)
  return {_mm512_cvtepi32_ps(_mm512_cvtps_epi32(a.v))};
#else
  const Vec magic = set1(12582912.0f);  // 1.5 * 2^23: what is added to it keeps no fraction
  return sub(add(a, magic), magic);
#endif
}

// acc * inverse, at most qmax, up where drawn * 2^-24 is less than its fraction, else down; never -0.
GCK_INLINE Vec round_by(Vec drawn, Vec acc, Vec inverse, Vec qmax) {
#if defined(GCK_AVX512)
  constexpr int least_magnitude = 2 | 2 << 2;  // without a sign
  const __m512 size = _mm512_range_ps(_mm512_mul_ps(acc.v, inverse.v), qmax.v, least_magnitude);
  // The whole number above what is left of size: its own one, or the next where the fraction was more. To
  // round what is left up passes no whole number.
  constexpr int up = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
  const __m512 left = _mm512_fnmadd_round_ps(drawn.v, _mm512_set1_ps(0x1p-24f), size, up);
  return add(with_sign({_mm512_roundscale_ps(left, up)}, acc), set1(0.0f));
#else
  const Vec size = abs(mul(acc, inverse)), whole = floor_of(size);
  const Vec up = one_where_less(mul(drawn, set1(0x1p-24f)), sub(size, whole));
  return add(with_sign(least(add(whole, up), qmax), acc), set1(0.0f));
#endif
}

// Eight codes of one byte each, of which the lower Bits count, without gaps.
template <int Bits>
inline uint64_t without_gaps(uint64_t x) {
#if defined(GCK_AVX512)
  // One instruction on all processors with AVX-512, and hundreds of cycles on some with AVX2.
  return _pext_u64(x, Bits == 4 ? 0x0f0f0f0f0f0f0f0fu : 0x0303030303030303u);
#else
  if constexpr (Bits == 4) {
    x &= 0x0f0f0f0f0f0f0f0fu;
    x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
    x = (x | x >> 8) & 0x0000ffff0000ffffu;
    return (x | x >> 16) & 0xffffffffu;
  } else {
    x &= 0x0303030303030303u;
    x = (x | x >> 6) & 0x000f000f000f000fu;
    x = (x | x >> 12) & 0x000000ff000000ffu;
    return (x | x >> 24) & 0xffffu;
  }
#endif
}

template <int Bits>
inline void pack_bytes(const int8_t* codes, int64_t count, char* out) {
  for (int64_t i = 0; i < count; i += 8, out += Bits) {
    uint64_t x;
    std::memcpy(&x, codes + i, sizeof x);
    x = without_gaps<Bits>(x);
    std::memcpy(out, &x, Bits);
  }
}

// Packs `count` codes, a multiple of 8, of which the lower `bits` count.
inline void pack_bytes(const int8_t* codes, int64_t count, int bits, char* out) {
  if (bits == 8)
    std::memcpy(out, codes, static_cast<size_t>(count));
  else if (bits == 4)
    pack_bytes<4>(codes, count, out);
  else
    pack_bytes<2>(codes, count, out);
}

// The lower Bits of 16 * Vecs whole numbers, packed.
template <int Bits, int Vecs>
inline void store_codes(char* out, const Vec (&whole)[Vecs]) {
#if defined(GCK_AVX512)
  if constexpr (Vecs == 4) {
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
    return;
  }
#endif
  int8_t bytes[kLanes * Vecs];
  for (int v = 0; v < Vecs; ++v) store_bytes(bytes + v * kLanes, whole[v]);
  pack_bytes(bytes, kLanes * Vecs, Bits, out);
}

// Bit i of `even` to bit 2 * i, and of `odd` to bit 2 * i + 1; 16 of each.
inline uint32_t interleave(uint32_t even, uint32_t odd) {
#if defined(GCK_AVX512)
  return _pdep_u32(even, 0x55555555u) | _pdep_u32(odd, 0xaaaaaaaau);  // fast where _pext_u64 is
#else
  uint64_t y = (even & 0xffffu) | static_cast<uint64_t>(odd) << 32;
  y = (y | y << 8) & 0x00ff00ff00ff00ffu;
  y = (y | y << 4) & 0x0f0f0f0f0f0f0f0fu;
  y = (y | y << 2) & 0x3333333333333333u;
  y = (y | y << 1) & 0x5555555555555555u;
  return static_cast<uint32_t>(y) | static_cast<uint32_t>(y >> 31);
#endif
}

}  // namespace gck::GCK_ISA
