// Vec of NEON, which every 64-bit ARM has: four registers.
#pragma once

#include <arm_neon.h>

#include "cpu/isa/lanes.hpp"

namespace gck::GCK_ISA {

struct Vec {
  float32x4_t v[4];
};

// f of each of the four.
template <typename F>
GCK_INLINE Vec each(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
inline Vec load(const float* p) {
  return each([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline Vec load_bf16(const uint16_t* p) {
  const uint16x8_t a = vld1q_u16(p), b = vld1q_u16(p + 8);
  const auto widened = [](uint32x4_t upper) { return vreinterpretq_f32_u32(upper); };
  return {{widened(vshll_n_u16(vget_low_u16(a), 16)), widened(vshll_high_n_u16(a, 16)),
           widened(vshll_n_u16(vget_low_u16(b), 16)), widened(vshll_high_n_u16(b, 16))}};
}
inline Vec load_fp16(const uint16_t* p) {
  return each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline void store(float* p, Vec a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
// There is no intrinsic for that.
inline void store_past_caches(float* p, Vec a) { store(p, a); }
inline void order_stores() {}
inline Vec set1(float x) {
  return each([&](int) { return vdupq_n_f32(x); });
}
inline Vec in_register(Vec a) { return a; }
inline Vec add(Vec a, Vec b) {
  return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline Vec sub(Vec a, Vec b) {
  return each([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline Vec mul(Vec a, Vec b) {
  return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline Vec div(Vec a, Vec b) {
  return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline Vec abs(Vec a) {
  return each([&](int i) { return vabsq_f32(a.v[i]); });
}
inline int32x4_t keys_of(float32x4_t x) { return vreinterpretq_s32_f32(vabsq_f32(x)); }
inline Vec max_key(Vec best, Vec a) {
  return each([&](int i) {
    return vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(best.v[i]), keys_of(a.v[i])));
  });
}
// The largest of the lanes, which are keys.
inline int32_t largest_key(Vec keys) {
  const auto two = [&](int i) {
    return vmaxq_s32(vreinterpretq_s32_f32(keys.v[i]), vreinterpretq_s32_f32(keys.v[i + 2]));
  };
  return vmaxvq_s32(vmaxq_s32(two(0), two(1)));
}
// Lanes of which all bits are set, or none; a Mask where one is asked for, which takes a few instructions.
struct Lanes {
  uint32x4_t v[4];

  GCK_INLINE operator Mask() const {
    const auto halves = [](uint32x4_t low, uint32x4_t high) {
      return vuzp1q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high));
    };
    const uint8x16_t bytes =
        vuzp1q_u8(vreinterpretq_u8_u16(halves(v[0], v[1])), vreinterpretq_u8_u16(halves(v[2], v[3])));
    const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t sums = vandq_u8(bytes, bit);
    for (int i = 0; i < 3; ++i) sums = vpaddq_u8(sums, sums);
    return vgetq_lane_u16(vreinterpretq_u16_u8(sums), 0);
  }
};
template <typename F>
GCK_INLINE Lanes where(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
inline Lanes ge_zero(Vec a) {
  return where([&](int i) { return vcgezq_f32(a.v[i]); });
}
inline Lanes is_nan(Vec a) {
  return where([&](int i) { return vmvnq_u32(vceqq_f32(a.v[i], a.v[i])); });
}
inline Vec canonical(Vec a) {
  const float32x4_t nan = vreinterpretq_f32_s32(vdupq_n_s32(kNanKey));
  return each([&](int i) { return vbslq_f32(vceqq_f32(a.v[i], a.v[i]), a.v[i], nan); });
}
inline Lanes key_ge(Vec a, int32_t threshold) {
  return where([&](int i) { return vcgeq_s32(keys_of(a.v[i]), vdupq_n_s32(threshold)); });
}
inline bool any_key_ge(Vec a, Vec b, int32_t threshold) {
  return largest_key(max_key(abs(a), b)) >= threshold;
}
inline Vec select(Lanes lanes, Vec yes, Vec no) {
  return each([&](int i) { return vbslq_f32(lanes.v[i], yes.v[i], no.v[i]); });
}
inline Vec select(Mask m, Vec yes, Vec no) {
  const uint32x4_t lanes = vdupq_n_u32(m), bit = {1, 2, 4, 8};
  return {{vbslq_f32(vtstq_u32(lanes, bit), yes.v[0], no.v[0]),
           vbslq_f32(vtstq_u32(lanes, vshlq_n_u32(bit, 4)), yes.v[1], no.v[1]),
           vbslq_f32(vtstq_u32(lanes, vshlq_n_u32(bit, 8)), yes.v[2], no.v[2]),
           vbslq_f32(vtstq_u32(lanes, vshlq_n_u32(bit, 12)), yes.v[3], no.v[3])}};
}
// Canonical fp32 rounded to bf16 or fp16, nearest even: back in fp32, and as 16 narrow numbers.
inline uint32x4_t bf16_bits(float32x4_t x) {  // in the upper halves
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vandq_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), vdupq_n_u32(0xffff0000u));
}
inline Vec round_bf16(Vec a) {
  return each([&](int i) { return vreinterpretq_f32_u32(bf16_bits(a.v[i])); });
}
inline Vec round_fp16(Vec a) {
  return each([&](int i) { return vcvt_f32_f16(vcvt_f16_f32(a.v[i])); });
}
inline void store_bf16(uint16_t* p, Vec a) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vshrn_n_u32(bf16_bits(a.v[i]), 16));
}
inline void store_fp16(uint16_t* p, Vec a) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
// For each four bits, the bytes of the lanes whose bits are set, one after the other.
struct FrontBytes {
  uint8_t of[16][16];
};
constexpr FrontBytes front_bytes_table() {
  FrontBytes table{};
  for (int bits = 0; bits < 16; ++bits) {
    for (int lane = 0, slot = 0; lane < 4; ++lane) {
      if (!(bits >> lane & 1)) continue;
      for (int byte = 0; byte < 4; ++byte) table.of[bits][slot++] = static_cast<uint8_t>(4 * lane + byte);
    }
  }
  return table;
}
alignas(16) static constexpr FrontBytes kFrontBytes = front_bytes_table();
// Stores the lanes of four vectors, which word(i) makes, that are in m; p has room for all sixteen.
template <typename F>
GCK_INLINE void compress_each(uint32_t* p, Mask m, F word) {
  // How many bits each four have, and how many those before.
  const Mask twos = m - (m >> 1 & 0x5555u), fours = (twos & 0x3333u) + (twos >> 2 & 0x3333u);
  const Mask before = fours * 0x1110u;
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t front = vld1q_u8(kFrontBytes.of[m >> 4 * i & 15]);
    auto* const to = reinterpret_cast<uint8_t*>(p + (before >> 4 * i & 15));  // p may be of floats
    vst1q_u8(to, vqtbl1q_u8(vreinterpretq_u8_u32(word(i)), front));
  }
}
inline void compress(float* p, Mask m, Vec a) {
  compress_each(reinterpret_cast<uint32_t*>(p), m, [&](int i) { return vreinterpretq_u32_f32(a.v[i]); });
}
// Lane numbers from base on, of the lanes in m.
inline void compress_index(uint32_t* p, Mask m, uint32_t base) {
  const uint32x4_t lane = {0, 1, 2, 3};
  compress_each(p, m,
                [&](int i) { return vaddq_u32(lane, vdupq_n_u32(base + 4 * static_cast<uint32_t>(i))); });
}
inline void compress_words(uint32_t* p, Mask m, const uint32_t* words, uint32_t plus) {
  compress_each(p, m, [&](int i) { return vaddq_u32(vld1q_u32(words + 4 * i), vdupq_n_u32(plus)); });
}

// Position of the lowest set bit; anything where there is none.
inline uint32_t lowest_bit(uint64_t bits) { return bits ? static_cast<uint32_t>(__builtin_ctzll(bits)) : 0; }

}  // namespace gck::GCK_ISA
