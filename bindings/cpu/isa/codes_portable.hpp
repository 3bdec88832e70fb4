// What codes.hpp is made of, on any machine.
#pragma once

#include "cpu/isa/halves.hpp"

namespace gck::GCK_ISA {

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

struct Bytes {
  int8_t x[kLanes];
};
inline Vec from_bytes(const Bytes& bytes) {
  return each([&](int i) { return static_cast<float>(bytes.x[i]); });
}
// Sixteen codes in two's complement, of which the first lies at the start of `packed`.
template <int Bits>
inline Bytes spread(const char* packed) {
  Bytes bytes;
  for (int i = 0; i < kLanes; ++i) {
    const int byte = static_cast<unsigned char>(packed[i * Bits / 8]), sign = 1 << (Bits - 1);
    bytes.x[i] = static_cast<int8_t>(((byte >> i * Bits % 8 & ((1 << Bits) - 1)) ^ sign) - sign);
  }
  return bytes;
}

template <int Vecs>
constexpr bool packs_vectors = false;

}  // namespace gck::GCK_ISA
