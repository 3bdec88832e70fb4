// Vec of any machine: plain loops that any compiler turns into whatever the machine has.
#pragma once

#include "cpu/isa/lanes.hpp"

namespace gck::GCK_ISA {

struct Vec {
  float x[kLanes];
};

template <typename F>
inline Vec each(F f) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.x[i] = f(i);
  return r;
}
template <typename F>
inline Mask where(F f) {
  Mask m = 0;
  for (int i = 0; i < kLanes; ++i) m |= static_cast<Mask>(f(i)) << i;
  return m;
}
inline Vec load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline Vec load_bf16(const uint16_t* p) {
  return each([&](int i) { return float_of(static_cast<uint32_t>(p[i]) << 16); });
}
inline Vec load_fp16(const uint16_t* p) {
  return each([&](int i) { return from_fp16(p[i]); });
}
inline void store(float* p, Vec a) { std::memcpy(p, a.x, sizeof a.x); }
inline void store_past_caches(float* p, Vec a) { store(p, a); }
inline void order_stores() {}
inline Vec set1(float x) {
  return each([&](int) { return x; });
}
inline Vec in_register(Vec a) { return a; }
inline Vec add(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] + b.x[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] - b.x[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] * b.x[i]; });
}
inline Vec div(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] / b.x[i]; });
}
inline Vec abs(Vec a) {
  return each([&](int i) { return float_of(bits_of(a.x[i]) & 0x7fffffffu); });
}
inline Vec max_key(Vec best, Vec a) {
  return each([&](int i) {
    const uint32_t key = bits_of(a.x[i]) & 0x7fffffffu;
    return float_of(key > bits_of(best.x[i]) ? key : bits_of(best.x[i]));
  });
}
inline Mask ge_zero(Vec a) {
  return where([&](int i) { return a.x[i] >= 0; });
}
inline Mask is_nan(Vec a) {
  return where([&](int i) { return a.x[i] != a.x[i]; });
}
inline Vec canonical(Vec a) {
  return each([&](int i) { return a.x[i] == a.x[i] ? a.x[i] : float_of(kNanKey); });
}
inline Mask key_ge(Vec a, int32_t threshold) {
  return where([&](int i) { return static_cast<int32_t>(bits_of(a.x[i]) & 0x7fffffffu) >= threshold; });
}
inline bool any_key_ge(Vec a, Vec b, int32_t threshold) {
  return key_ge(a, threshold) | key_ge(b, threshold);
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return each([&](int i) { return (m >> i & 1) ? yes.x[i] : no.x[i]; });
}
// Canonical fp32 rounded to bf16 or fp16, nearest even: back in fp32, and as 16 narrow numbers.
inline Vec round_bf16(Vec a) {
  return each([&](int i) { return float_of(static_cast<uint32_t>(to_bf16(a.x[i])) << 16); });
}
inline Vec round_fp16(Vec a) {
  return each([&](int i) { return from_fp16(to_fp16(a.x[i])); });
}
inline void store_bf16(uint16_t* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(a.x[i]);
}
inline void store_fp16(uint16_t* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_fp16(a.x[i]);
}
inline void compress(float* p, Mask m, Vec a) {
  for (; m; m &= m - 1) *p++ = a.x[__builtin_ctz(m)];
}
inline void compress_index(uint32_t* p, Mask m, uint32_t base) {
  for (; m; m &= m - 1) *p++ = base + static_cast<uint32_t>(__builtin_ctz(m));
}

inline void compress_words(uint32_t* p, Mask m, const uint32_t* words, uint32_t plus) {
  for (; m; m &= m - 1) *p++ = words[__builtin_ctz(m)] + plus;
}

// Position of the lowest set bit; anything where there is none.
inline uint32_t lowest_bit(uint64_t bits) { return bits ? static_cast<uint32_t>(__builtin_ctzll(bits)) : 0; }

}  // namespace gck::GCK_ISA
