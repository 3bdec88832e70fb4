// Magnitudes in two: of entries whose key reaches a threshold, and of the others.
#pragma once

#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {

struct Halves {
  Vec high, low;
};

inline Halves add(const Halves& a, const Halves& b) { return {add(a.high, b.high), add(a.low, b.low)}; }

}  // namespace gck::GCK_ISA
