#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck::GCK_ISA {

int64_t sign_compress(const SignChunks& job, int64_t begin, int64_t end);
void sign_decompress(const SignDecode& job, int64_t begin, int64_t end);
int64_t sign_reduce(const SignDecode& from, const MeanInto& into, const SignChunks& to, int64_t begin,
                    int64_t end);

}  // namespace gck::GCK_ISA
