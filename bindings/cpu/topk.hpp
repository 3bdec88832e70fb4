// Exact top-k with error feedback on the CPU.
#pragma once

#include <vector>

#include "cpu/residual.hpp"
#include "cpu/types.hpp"

namespace gck {

// One tensor of those that are selected from together.
struct TopkRun {
  const void* grad;
  Dtype grad_dtype;
  float* err;
  int64_t numel;
};

struct TopkJob {
  std::vector<TopkRun> runs;  // end to end: indices are those of their concatenation
  int64_t numel, k;           // of all runs; 1 <= k <= numel
  void* values;
  Dtype value_dtype;
  void* indices;
  bool wide_indices;  // int64, else int32
  int32_t* hint;      // null, or the key of the last call's threshold (0: none), replaced by this one's
  int threads;
  ResidualPass* residual = nullptr;  // null: nothing is asked for; measures a single run only
};

// Writes the k largest entries of grad + err, ascending by index, and leaves acc - decoded in err.
// Returns the number of residuals cleared because not finite. The lists are allocated before the
// first write, so that std::bad_alloc from them leaves err as it was; smaller allocations follow.
int64_t topk_compress(const TopkJob& job);
// Writes the same entries and leaves err as it is, for two thirds of the memory traffic. False, with the
// payload in no state: that cannot be done without writing to err, or is not worth it.
bool topk_preview(const TopkJob& job);
// topk_compress of a single run, with what is asked for beside it.
int64_t topk_compress(TopkJob job, const ResidualOptions& options);

// The same for jobs of their own, with `threads` threads for all: large ones in turn, with all threads, small
// ones side by side. Where memory runs out, some jobs may be done already.
int64_t topk_compress_each(std::vector<TopkJob> jobs, const ResidualOptions& options, int threads);

}  // namespace gck
