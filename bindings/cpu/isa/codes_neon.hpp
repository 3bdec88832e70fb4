// What codes.hpp is made of, with NEON.
#pragma once

#include "cpu/isa/halves.hpp"

namespace gck::GCK_ISA {

inline Vec least(Vec a, Vec b) {
  return each([&](int i) { return vminq_f32(a.v[i], b.v[i]); });
}
inline Vec floor_of(Vec a) {
  return each([&](int i) { return vrndmq_f32(a.v[i]); });
}
inline Vec one_where_less(Vec a, Vec b) {
  const uint32x4_t one = vreinterpretq_u32_f32(vdupq_n_f32(1.0f));
  return each([&](int i) { return vreinterpretq_f32_u32(vandq_u32(vcltq_f32(a.v[i], b.v[i]), one)); });
}
inline Vec with_sign(Vec magnitude, Vec sign) {
  return each([&](int i) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign.v[i], magnitude.v[i]); });
}
inline uint8x16_t to_bytes(Vec whole) {
  const auto halves = [&](int i) {
    const int32x4_t low = vcvtnq_s32_f32(whole.v[i]), high = vcvtnq_s32_f32(whole.v[i + 1]);
    return vreinterpretq_u8_u16(vuzp1q_u16(vreinterpretq_u16_s32(low), vreinterpretq_u16_s32(high)));
  };
  return vuzp1q_u8(halves(0), halves(2));
}
inline Vec from_bytes(int8x16_t bytes) {
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
}
// Sixteen codes of 2 bits, each in the upper bits of a byte.
inline uint8x16_t spread_2(uint32_t word) {
  const uint8x16_t byte = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  const int8x16_t up = {6, 4, 2, 0, 6, 4, 2, 0, 6, 4, 2, 0, 6, 4, 2, 0};
  return vshlq_u8(vqtbl1q_u8(vreinterpretq_u8_u32(vdupq_n_u32(word)), byte), up);
}
inline Vec one_of_four(const float* values, uint32_t word) {
  // Of each code the place of its value's first byte; then, four times each, of all its bytes.
  const uint8x16_t table = vreinterpretq_u8_f32(vld1q_f32(values));
  const uint8x16_t first = vshlq_n_u8(vshrq_n_u8(spread_2(word), 6), 2);
  const uint8x16_t four = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  const uint8x16_t bytes = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
  return each([&](int i) {
    const uint8x16_t lanes = vqtbl1q_u8(first, vaddq_u8(four, vdupq_n_u8(static_cast<uint8_t>(4 * i))));
    return vreinterpretq_f32_u8(vqtbl1q_u8(table, vorrq_u8(lanes, bytes)));
  });
}
// |a|, but 0 in lanes whose key is below the threshold; and 0 in the others.
inline Halves split_at(Vec a, int32_t threshold, Mask& reaching) {
  const Lanes in = key_ge(a, threshold);
  reaching = in;
  const auto bits = [&](int i) { return vreinterpretq_u32_s32(keys_of(a.v[i])); };
  return {each([&](int i) { return vreinterpretq_f32_u32(vandq_u32(bits(i), in.v[i])); }),
          each([&](int i) { return vreinterpretq_f32_u32(vbicq_u32(bits(i), in.v[i])); })};
}

// As a product without carries: that of a number with itself has its bits at every other place.
inline uint32_t interleave(uint32_t even, uint32_t odd) {
  const poly8x8_t bytes = vcreate_p8(even | static_cast<uint64_t>(odd) << 16);
  const uint64_t both = vgetq_lane_u64(vreinterpretq_u64_p16(vmull_p8(bytes, bytes)), 0);
  return static_cast<uint32_t>(both) | static_cast<uint32_t>(both >> 31);
}

// And eight more that nobody looks at.
inline uint8x16_t eight_bytes(const char* p) {
  return vcombine_u8(vld1_u8(reinterpret_cast<const uint8_t*>(p)), vdup_n_u8(0));
}

// Sixteen codes in two's complement, of which the first lies at the start of `packed`.
template <int Bits>
inline int8x16_t spread(const char* packed) {
  if constexpr (Bits == 8) return vld1q_s8(reinterpret_cast<const int8_t*>(packed));
  if constexpr (Bits == 4) {  // each to the upper bits of a byte, and back with its sign
    const uint8x16_t two = eight_bytes(packed);
    return vshrq_n_s8(vreinterpretq_s8_u8(vzip1q_u8(vshlq_n_u8(two, 4), two)), 4);
  }
  uint32_t word;
  std::memcpy(&word, packed, sizeof word);
  return vshrq_n_s8(vreinterpretq_s8_u8(spread_2(word)), 6);
}

// Of codes of 4 bits, alpha * (code * scale) from a table of all sixteen: of each byte of a value a register.
struct SixteenValues {
  static constexpr int kWays = 1;
  uint8x16x4_t bytes;

  void set(const char* scales, float alpha) {
    float scale, values[16];
    std::memcpy(&scale, scales, sizeof scale);
    for (int i = 0; i < 16; ++i) values[i] = static_cast<float>((i ^ 8) - 8) * scale * alpha;
    bytes = vld4q_u8(reinterpret_cast<const uint8_t*>(values));
  }
  Vec at(const char* packed, int v) const {
    const uint8x16_t two = eight_bytes(packed + 8 * v);
    const uint8x16_t codes = vzip1q_u8(vandq_u8(two, vdupq_n_u8(15)), vshrq_n_u8(two, 4));
    const auto of = [&](int i) { return vqtbl1q_u8(bytes.val[i], codes); };
    const auto halves = [](uint8x16_t a, uint8x16_t b) {
      return uint16x8x2_t{{vreinterpretq_u16_u8(vzip1q_u8(a, b)), vreinterpretq_u16_u8(vzip2q_u8(a, b))}};
    };
    const uint16x8x2_t lower = halves(of(0), of(1)), upper = halves(of(2), of(3));
    Vec r;
    for (int i = 0; i < 2; ++i) {
      r.v[2 * i] = vreinterpretq_f32_u16(vzip1q_u16(lower.val[i], upper.val[i]));
      r.v[2 * i + 1] = vreinterpretq_f32_u16(vzip2q_u16(lower.val[i], upper.val[i]));
    }
    return r;
  }
};

template <int Vecs>
constexpr bool packs_vectors = true;
template <int Bits, int Vecs>
inline void store_packed(char* out, const Vec (&whole)[Vecs]) {
  // The codes of even bytes, and behind each, `by` bits higher, that of the next one.
  const auto packed = []<int By>(uint8x16_t a, uint8x16_t b) {
    return vsliq_n_u8(vuzp1q_u8(a, b), vuzp2q_u8(a, b), By);
  };
  auto* const bytes = reinterpret_cast<uint8_t*>(out);
  for (int v = 0; v < Vecs; v += 2) {
    const uint8x16_t low = to_bytes(whole[v]), high = to_bytes(whole[v + 1]);
    if constexpr (Bits == 8) {
      vst1q_u8(bytes + v * kLanes, low);
      vst1q_u8(bytes + (v + 1) * kLanes, high);
    } else if constexpr (Bits == 4) {
      vst1q_u8(bytes + v * kLanes / 2, packed.template operator()<4>(low, high));
    } else {
      const uint8x16_t twos = packed.template operator()<2>(low, high);
      vst1_u8(bytes + v * kLanes / 4, vget_low_u8(packed.template operator()<4>(twos, twos)));
    }
  }
}

}  // namespace gck::GCK_ISA
