#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck::GCK_ISA {

int64_t quantize_compress(const QuantizeChunks& job, int64_t begin, int64_t end);
void quantize_decompress(const QuantizeDecode& job, int64_t begin, int64_t end);
int64_t quantize_reduce(const QuantizeDecode& from, const MeanInto& into, const QuantizeChunks& to,
                        int64_t begin, int64_t end);

}  // namespace gck::GCK_ISA
