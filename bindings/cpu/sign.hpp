// Sign packing with error feedback on the CPU.
#pragma once

#include "cpu/isa/leaves.hpp"
#include "cpu/residual.hpp"

namespace gck {

// Fills the rows of job.bodies and leaves acc - decoded in err; returns the number of residuals cleared
// because not finite.
int64_t sign_compress(const SignChunks& job, const ResidualOptions& options, int threads);

// Adds or writes alpha * decoded, rank after rank.
void sign_decompress(SignDecode job, int threads);

// Compresses the ranks' sum, divided, with the residual to.err (null: none) to the one row of `to`. Where
// decoded values go, and the gradient of `to`, are of no account.
int64_t sign_reduce(const SignDecode& from, const SignChunks& to, float divisor,
                    const ResidualOptions& options, int threads);

}  // namespace gck
