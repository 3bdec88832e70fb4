// Exact top-k with error feedback on the CPU.
#pragma once

#include "cpu/types.hpp"

namespace gck {

struct TopkJob {
  const void* grad;
  Dtype grad_dtype;
  float* err;
  int64_t numel, k;  // 1 <= k <= numel
  void* values;
  Dtype value_dtype;
  void* indices;
  bool wide_indices;  // int64, else int32
  int threads;
};

// Writes the k largest entries of grad + err, ascending by index, and leaves acc - decoded in err.
// Returns the number of residuals cleared because not finite. Its large buffers are allocated before the
// first write, so that std::bad_alloc from them leaves err as it was.
int64_t topk_compress(const TopkJob& job);

struct SparseDecode {
  const void* values;
  Dtype value_dtype;
  const void* indices;
  bool wide_indices;
  int64_t k;
  float* out;
  int64_t numel;
  float alpha;
  bool accumulate;
  int threads;
};

// out (+)= alpha * decoded. Returns -1, or the position of the first index that is out of range or not
// above the one before it; then nothing was written.
int64_t topk_decompress(const SparseDecode& job);

}  // namespace gck
