#include "cpu/sign.hpp"

#include <algorithm>

#include "cpu/scratch.hpp"
#include "cpu/threads.hpp"

namespace gck {

int64_t sign_compress(const SignChunks& job, const ResidualOptions& options, int threads) {
  const Leaves& isa = leaves();
  return compress_chunks({job.grad, job.grad_dtype, job.err, job.numel, job.chunk_size}, options, job.numel,
                         threads,
                         [&](int, int64_t begin, int64_t end) { return isa.sign_compress(job, begin, end); });
}

void sign_decompress(const SignDecode& job, int threads) {
  const Leaves& isa = leaves();
  const int parts = parts_for(job.numel, threads);
  const int64_t chunks = (job.numel + job.chunk_size - 1) / job.chunk_size;
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    if (!job.accumulate)
      populate_fresh(job.out, begin * job.chunk_size, std::min(end * job.chunk_size, job.numel));
    isa.sign_decompress(job, begin, end);
  });
}

}  // namespace gck
