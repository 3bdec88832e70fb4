#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck::GCK_ISA {

int64_t chunk_topk_first_bad(const ChunkTopkDecode& job, const ChunkEntries& scratch, int64_t begin,
                             int64_t end);
void chunk_topk_put(const ChunkTopkDecode& job, const ChunkEntries& scratch, int64_t chunk, float* out,
                    const float* later);

}  // namespace gck::GCK_ISA
