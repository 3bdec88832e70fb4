// Codes of 2, 4, 8 or 12 bits in a row of bytes, little end first: code j lies at bits [j * bits, ...).
//
// Functions are `static`, for the reason given in types.hpp.
#pragma once

#include "cpu/types.hpp"

namespace gck {

static inline int64_t packed_bytes(int64_t count, int bits) { return (count * bits + 7) / 8; }

// Bits of a code above `bits` are ignored.
static inline void pack_codes(const uint32_t* codes, int64_t count, int bits, unsigned char* out) {
  if (bits == 12) {
    int64_t j = 0;
    for (; j + 2 <= count; j += 2, out += 3) {
      const uint32_t two = (codes[j] & 0xfffu) | (codes[j + 1] & 0xfffu) << 12;
      out[0] = static_cast<unsigned char>(two);
      out[1] = static_cast<unsigned char>(two >> 8);
      out[2] = static_cast<unsigned char>(two >> 16);
    }
    if (j < count) {
      out[0] = static_cast<unsigned char>(codes[j]);
      out[1] = static_cast<unsigned char>(codes[j] >> 8 & 0xfu);
    }
    return;
  }
  const int per_byte = 8 / bits;
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t j = 0; j < count; j += per_byte) {
    uint32_t byte = 0;
    for (int i = 0; i < per_byte && j + i < count; ++i) byte |= (codes[j + i] & mask) << (i * bits);
    *out++ = static_cast<unsigned char>(byte);
  }
}

}  // namespace gck
