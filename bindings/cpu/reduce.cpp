#include "cpu/reduce.hpp"

#include <algorithm>
#include <vector>

#include "cpu/threads.hpp"

namespace gck {
namespace {

// Elements of a residual that is made up: they stay in the nearest cache.
constexpr int64_t kTile = 2048;

}  // namespace

int64_t reduce_tiles(const Reduce& job, const ReduceChunks& reduce) {
  const int parts = parts_for(job.numel, job.threads);
  const int64_t chunks = (job.numel + job.chunk_size - 1) / job.chunk_size;
  const int64_t step = job.err ? chunks : std::max<int64_t>(kTile / job.chunk_size, 1);
  std::vector<std::vector<float>> nothing(static_cast<size_t>(parts));
  for (auto& tile : nothing) tile.resize(static_cast<size_t>(job.err ? 0 : step * job.chunk_size));
  std::vector<int64_t> cleared(static_cast<size_t>(parts));
  for_each_part(parts, [&](int t) {
    const auto p = static_cast<size_t>(t);
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    for (int64_t c = begin; c < end; c += step) {
      float* err = job.err;
      if (!err) {  // x + (-0.0) is x for every x
        std::fill(nothing[p].begin(), nothing[p].end(), -0.0f);
        err = reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(nothing[p].data()) -
                                       sizeof(float) * static_cast<uintptr_t>(c * job.chunk_size));
      }
      cleared[p] += reduce(t, err, c, std::min(c + step, end));
    }
  });
  int64_t total = 0;
  for (int64_t count : cleared) total += count;
  return total;
}

}  // namespace gck
