// Top-k of every chunk, with error feedback, on the CPU.
#pragma once

#include "cpu/isa/leaves.hpp"
#include "cpu/residual.hpp"

namespace gck {

// Fills the rows of job.bodies and leaves acc - decoded in err; returns the number of residuals cleared
// because not finite. All memory is allocated before the first write, so that std::bad_alloc leaves err
// as it was.
int64_t chunk_topk_compress(const ChunkTopk& job, const ResidualOptions& options, int threads);

// Adds or writes alpha * decoded, rank after rank. Returns -1, or the place (rank * chunks + chunk) * k +
// entry of an index that is out of range or not above the one before it; then nothing was written.
int64_t chunk_topk_decompress(const ChunkTopkDecode& job, int threads);

struct Reduced {
  int64_t bad, cleared;  // -1, or what chunk_topk_decompress returns; residuals cleared
};

// Compresses the ranks' sum, divided, with the residual to.err (null: none) to the one row of `to`, whose k
// and bits may be others. Alpha of `from` must be 1, and `add` set; where decoded values go, and the gradient
// of `to`, are of no account. After a bad index nothing was written.
Reduced chunk_topk_reduce(const ChunkTopkDecode& from, const ChunkTopk& to, float divisor,
                          const ResidualOptions& options, int threads);

}  // namespace gck
