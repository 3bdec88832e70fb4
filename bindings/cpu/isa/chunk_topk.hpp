#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck::GCK_ISA {

int64_t chunk_topk_compress(const ChunkTopk& job, const ChunkScratch& scratch, int64_t begin, int64_t end);
int64_t chunk_topk_compress_mean(const ChunkTopk& job, const ChunkScratch& scratch, float* sums,
                                 float divisor, int64_t chunk, const float* later);

}  // namespace gck::GCK_ISA
