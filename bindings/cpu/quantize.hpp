// Codes of a few bits with one scale a chunk, with error feedback, on the CPU.
#pragma once

#include "cpu/isa/leaves.hpp"
#include "cpu/residual.hpp"

namespace gck {

// Fills the rows of job.bodies and leaves acc - decoded in err; returns the number of residuals cleared
// because not finite.
int64_t quantize_compress(const QuantizeChunks& job, const ResidualOptions& options, int threads);

// Adds or writes alpha * decoded, rank after rank.
void quantize_decompress(QuantizeDecode job, int threads);

// Compresses the ranks' sum, divided, with the residual to.err (null: none) to the one row of `to`. Where
// decoded values go, and the gradient of `to`, are of no account.
int64_t quantize_reduce(const QuantizeDecode& from, const QuantizeChunks& to, float divisor,
                        const ResidualOptions& options, int threads);

}  // namespace gck
