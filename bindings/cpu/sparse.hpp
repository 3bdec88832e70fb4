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
  std::vector<SparseRow> rows;
  int64_t count;
  Dtype value_dtype;
  bool wide_indices;  // int64, else int32
  float* out;
  int64_t numel;
  float alpha;
  bool accumulate;
  int threads;
};

struct BadIndex {
  int64_t row, position;
};

// out = the sum of alpha * decoded over the rows, in their order, one addition a row; added to out as it is,
// or to zeros, where a single row is written without an addition, which would turn -0 into 0. Returns
// {-1, -1}, or the first index that is out of range or not above the one before it; then nothing was written.
BadIndex sparse_decompress(const SparseJob& job);

}  // namespace gck
