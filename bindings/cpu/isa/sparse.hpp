#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck::GCK_ISA {

bool sparse_ascends(const void* indices, bool wide, int64_t begin, int64_t end);
void sparse_move_out(float* x, float* out, int64_t count, float divisor, bool past_caches);
void sparse_settle();

}  // namespace gck::GCK_ISA
