// Working memory of chunk top-k.
#pragma once

#include <memory>

#include "cpu/isa/leaves.hpp"

namespace gck {

// Memory of one thread. Pages that a chunk does not need are never touched.
struct ThreadMemory {
  static constexpr size_t kArrays = 8;
  std::unique_ptr<float[]> memory;
  std::unique_ptr<ChunkGuess> guess = std::make_unique<ChunkGuess>();
  ChunkScratch arrays;

  explicit ThreadMemory(int64_t chunk_size) {
    const auto room = static_cast<size_t>(chunk_size + kChunkSlack);
    memory.reset(new float[kArrays * room]);
    float* at[kArrays];
    for (size_t i = 0; i < kArrays; ++i) at[i] = memory.get() + i * room;
    arrays = {reinterpret_cast<int32_t*>(at[0]),
              reinterpret_cast<uint32_t*>(at[1]),
              at[2],
              at[3],
              reinterpret_cast<int8_t*>(at[4]),
              at[5],
              at[6],
              at[7],
              guess.get()};
  }
};

}  // namespace gck
