// What Vec and its masks are on every instruction set, see vec.hpp.
#pragma once

#include "cpu/isa/leaves.hpp"
#include "cpu/round.hpp"

// For functions that compilers find too large, and whose vectors would then go through memory.
#define GCK_INLINE inline __attribute__((always_inline))

namespace gck::GCK_ISA {

constexpr int kLanes = 16;
constexpr int64_t kMaxChunk = 8192;  // of signs and of codes
using Mask = uint32_t;               // bit i is lane i

}  // namespace gck::GCK_ISA
