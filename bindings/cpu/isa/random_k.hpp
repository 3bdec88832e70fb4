#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck::GCK_ISA {

void random_k_draw(uint64_t seed, uint64_t first, int64_t count, uint64_t* out);
bool random_k_add(const void* grad, Dtype dtype, float* err, int64_t begin, int64_t end);

}  // namespace gck::GCK_ISA
