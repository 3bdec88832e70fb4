// Sign packing with error feedback on the CPU.
#pragma once

#include "cpu/isa/leaves.hpp"
#include "cpu/residual.hpp"

namespace gck {

// Fills the rows of job.bodies and leaves acc - decoded in err; returns the number of residuals cleared
// because not finite.
int64_t sign_compress(const SignChunks& job, const ResidualOptions& options, int threads);

// out (+)= alpha * decoded.
void sign_decompress(const SignDecode& job, int threads);

}  // namespace gck
