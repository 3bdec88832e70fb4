// Decoding sparse payloads on the CPU.
#pragma once

#include <vector>

#include "cpu/types.hpp"

namespace gck {

// One rank's payload: `count` values with strictly ascending indices.
struct SparseRow {
  const void* values;
  const void* indices;
};

struct SparseJob {
  std::vector<SparseRow> rows;  // at least one
  int64_t count;
  Dtype value_dtype;
  bool wide_indices;  // int64, else int32
  float* out;
  int64_t numel;
  Alphas alpha;
  bool clear, add;
  int threads;
  float divisor = 1.0f;  // of the sums; only where clear
};

struct BadIndex {
  int64_t row, position;
};

// alpha * decoded of each row in turn: clear sets out to zeros first, add adds to what is there instead of
// writing over it. (To write a single row to zeros keeps a -0 that adding would lose.) Returns {-1, -1}, or
// the first index that is out of range or not above the one before it; then nothing was written.
BadIndex sparse_decompress(const SparseJob& job);

}  // namespace gck
