// Sixteen floats to whole numbers of a few bits and back, for the instruction set of this translation unit;
// and codes of one byte each packed closer, eight of them at a time.
#pragma once

#include "cpu/isa/philox.hpp"
#include "cpu/isa/vec.hpp"

#if defined(GCK_AVX512)
#include "cpu/isa/codes_avx512.hpp"
#elif defined(GCK_AVX2)
#include "cpu/isa/codes_avx2.hpp"
#elif defined(GCK_NEON)
#include "cpu/isa/codes_neon.hpp"
#else
#include "cpu/isa/codes_portable.hpp"
#endif

namespace gck::GCK_ISA {

#if !defined(GCK_AVX512)
// The magnitude with the sign that acc has, whose mask tells where it is >= 0, as -0 is, too.
inline Vec signed_like(Vec acc, Mask, Vec magnitude) {
  return with_sign(magnitude, add(acc, set1(0.0f)));  // -0 + 0 is 0
}

// Nearest, ties to even, of magnitudes far below 2^22; never -0.
inline Vec round_even(Vec a) {
  const Vec magic = set1(12582912.0f);  // 1.5 * 2^23: what is added to it keeps no fraction
  return sub(add(a, magic), magic);
}

// acc * inverse, at most qmax, up where drawn * 2^-24 is less than its fraction, else down; never -0.
GCK_INLINE Vec round_by(Vec drawn, Vec acc, Vec inverse, Vec qmax) {
  const Vec size = abs(mul(acc, inverse)), whole = floor_of(size);
  const Vec up = one_where_less(mul(drawn, set1(0x1p-24f)), sub(size, whole));
  return add(with_sign(least(add(whole, up), qmax), acc), set1(0.0f));
}

// Eight codes of one byte each, of which the lower Bits count, without gaps.
template <int Bits>
inline uint64_t without_gaps(uint64_t x) {
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
}

#endif

#if !defined(GCK_AVX512) && !defined(GCK_NEON)
// Bit i of `even` to bit 2 * i, and of `odd` to bit 2 * i + 1; 16 of each.
inline uint32_t interleave(uint32_t even, uint32_t odd) {
  uint64_t y = (even & 0xffffu) | static_cast<uint64_t>(odd) << 32;
  y = (y | y << 8) & 0x00ff00ff00ff00ffu;
  y = (y | y << 4) & 0x0f0f0f0f0f0f0f0fu;
  y = (y | y << 2) & 0x3333333333333333u;
  y = (y | y << 1) & 0x5555555555555555u;
  return static_cast<uint32_t>(y) | static_cast<uint32_t>(y >> 31);
}
#endif

// Sixteen codes, of which the first lies at the start of `packed`.
template <int Bits>
inline Vec load_codes(const char* packed) {
  return from_bytes(spread<Bits>(packed));
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

#if !defined(GCK_AVX512)
template <int Bits, bool Levels = false>
struct Table : Steps<Bits> {};
template <bool Levels>
struct Table<2, Levels> : FourValues<Levels> {};
#endif
#if defined(GCK_NEON)
template <bool Levels>
struct Table<4, Levels> : SixteenValues {};
#endif

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
  if constexpr (packs_vectors<Vecs>) {
    store_packed<Bits>(out, whole);
  } else {
    int8_t bytes[kLanes * Vecs];
    for (int v = 0; v < Vecs; ++v) store_bytes(bytes + v * kLanes, whole[v]);
    pack_bytes(bytes, kLanes * Vecs, Bits, out);
  }
}

}  // namespace gck::GCK_ISA
