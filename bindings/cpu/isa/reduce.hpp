#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck::GCK_ISA {

void divide(float* x, int64_t count, float divisor);

}  // namespace gck::GCK_ISA
