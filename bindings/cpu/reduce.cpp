#include "cpu/reduce.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/isa/leaves.hpp"
#include "cpu/threads.hpp"

namespace gck {
namespace {

// Elements that stay in the nearest cache, with their residuals, from their sum until they are compressed.
constexpr int64_t kTile = 2048;
constexpr size_t kAlignment = 64;

struct Tiles {
  std::unique_ptr<float[]> memory;
  float *sum, *err;

  explicit Tiles(int64_t tile) : memory(new float[static_cast<size_t>(2 * tile) + kAlignment / 4]) {
    const auto past = reinterpret_cast<uintptr_t>(memory.get()) % kAlignment;
    sum = memory.get() + (past ? (kAlignment - past) / sizeof(float) : 0);
    err = sum + tile;
  }
};

// Where element 0 of a vector would lie of which element `at` lies at `tile`. An address, not to be read.
float* origin(float* tile, int64_t at) {
  return reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(tile) -
                                  sizeof(float) * static_cast<uintptr_t>(at));
}

}  // namespace

int64_t reduce_tiles(const Reduce& job, const SumChunks& sum, const CompressChunks& compress) {
  const Leaves& isa = leaves();
  const int parts = parts_for(job.numel, job.threads);
  const int64_t chunks = (job.numel + job.chunk_size - 1) / job.chunk_size;
  const int64_t step = std::max<int64_t>(kTile / job.chunk_size, 1);
  std::vector<Tiles> tiles;
  for (int t = 0; t < parts; ++t) tiles.emplace_back(step * job.chunk_size);
  std::vector<int64_t> cleared(static_cast<size_t>(parts));
  for_each_part(parts, [&](int t) {
    const auto p = static_cast<size_t>(t);
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    for (int64_t c = begin; c < end; c += step) {
      const int64_t stop = std::min(c + step, end), at = c * job.chunk_size;
      const int64_t count = std::min(stop * job.chunk_size, job.numel) - at;
      float* err = job.err;
      if (!err) {  // x + (-0.0) is x for every x
        std::fill_n(tiles[p].err, count, -0.0f);
        err = origin(tiles[p].err, at);
      }
      float* total = origin(tiles[p].sum, at);
      sum(total, c, stop);
      if (job.divisor != 1.0f) isa.divide(tiles[p].sum, count, job.divisor);
      cleared[p] += compress(t, total, err, c, stop);
    }
  });
  int64_t total = 0;
  for (int64_t count : cleared) total += count;
  return total;
}

}  // namespace gck
