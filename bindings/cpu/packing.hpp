// Codes of 2 to 32 bits in a row of bytes, little end first: code j lies at bits [j * bits, ...).
//
// Functions are `static`, for the reason given in types.hpp.
#pragma once

#include "cpu/types.hpp"

namespace gck {

static inline int64_t packed_bytes(int64_t count, int bits) { return (count * bits + 7) / 8; }

}  // namespace gck
