#include "cpu/chunk_topk.hpp"

#include <algorithm>
#include <vector>

#include "cpu/chunk_memory.hpp"
#include "cpu/threads.hpp"

namespace gck {

int64_t chunk_topk_compress(const ChunkTopk& job, const ResidualOptions& options, int threads) {
  const Leaves& isa = leaves();
  std::vector<ThreadMemory> scratch;
  for (int t = 0; t < parts_for(job.numel, threads); ++t) scratch.emplace_back(job.chunk_size);
  const int64_t rest = job.numel % job.chunk_size;
  const int64_t selected = job.numel / job.chunk_size * job.k + std::min(rest, job.k);
  return compress_chunks({job.grad, job.grad_dtype, job.err, job.numel, job.chunk_size}, options, selected,
                         threads, [&](int part, int64_t begin, int64_t end) {
                           return isa.chunk_topk_compress(job, scratch[static_cast<size_t>(part)].arrays,
                                                          begin, end);
                         });
}

}  // namespace gck
