#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck::GCK_ISA {

void topk_stream(const void* grad, Dtype dtype, float* err, int64_t count, Guess guess, Dtype value_dtype,
                 Candidates* out);
void topk_look(const void* grad, Dtype dtype, const float* err, int64_t count, Guess guess, Candidates* out);
void topk_maxima(const void* grad, Dtype dtype, float* err, int64_t count, int64_t vectors, float* maxima);
int64_t topk_collect(const float* x, int64_t count, int32_t threshold, float* out);
int64_t topk_squares(const float* x, int64_t lines, int32_t threshold);
int64_t topk_split(const float* x, int64_t count, int32_t low, int32_t high, int32_t* keys, int64_t* inside);
int32_t topk_kth(const float* x, int64_t count, int64_t rank, int64_t slack);
int64_t topk_emit(const Candidates& list, float* err, int32_t base, Winners* out);
int64_t topk_clear(float* x, int64_t count);
void add_to(const void* grad, Dtype dtype, const float* err, int64_t count, float* out);

}  // namespace gck::GCK_ISA
