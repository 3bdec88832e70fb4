#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck::GCK_ISA {

void topk_stream(const void* grad, Dtype dtype, float* err, int64_t count, int32_t threshold,
                 Candidates* out);
void topk_collect(const float* x, int64_t count, int32_t threshold, Candidates* out);
int64_t topk_emit(const Candidates& list, const Winners& out);
void add_to(const void* grad, Dtype dtype, const float* err, int64_t count, float* out);

}  // namespace gck::GCK_ISA
