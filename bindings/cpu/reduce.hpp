// Packed payloads to the packed payload of their sum, tile by tile: no dense vector is written or read.
#pragma once

#include <functional>

#include "cpu/types.hpp"

namespace gck {

struct Reduce {
  int64_t numel, chunk_size;
  float* err;  // residual of the sum, or null: none
  int threads;
};

// Chunks [begin, end), on thread `part`: adds the mean of all ranks to err, and compresses that; err points
// to where element 0 of the vector would lie. Returns the number of residuals cleared.
using ReduceChunks = std::function<int64_t(int part, float* err, int64_t begin, int64_t end)>;

// Calls `reduce` for every tile. All memory is allocated before the first call, so that std::bad_alloc leaves
// err as it was. Returns the number of residuals cleared.
int64_t reduce_tiles(const Reduce& job, const ReduceChunks& reduce);

}  // namespace gck
