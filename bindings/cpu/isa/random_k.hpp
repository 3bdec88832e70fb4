#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck::GCK_ISA {

void random_k_draw(uint64_t seed, uint64_t first, int64_t count, uint64_t* out);
void random_k_picks(uint64_t seed, int64_t first, int64_t count, int64_t size, int64_t longer, int64_t begin,
                    int64_t* picks);
bool random_k_add(const void* grad, Dtype dtype, float* err, int64_t begin, int64_t end);
int64_t random_k_send(float* x, int64_t count, float factor, void* values, Dtype dtype, int64_t at);

}  // namespace gck::GCK_ISA
