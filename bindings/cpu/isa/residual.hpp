#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck::GCK_ISA {

void residual_read(float* err, int64_t count, const ResidualReading& reading);
void residual_sums(const void* grad, Dtype dtype, const float* err, int64_t count, const BlockSums& out);

}  // namespace gck::GCK_ISA
