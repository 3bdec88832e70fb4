#include "cpu/sign.hpp"

#include <algorithm>
#include <vector>

#include "cpu/scratch.hpp"
#include "cpu/threads.hpp"

namespace gck {

int64_t sign_compress(const SignChunks& job, int threads) {
  const Leaves& isa = leaves();
  const int parts = parts_for(job.numel, threads);
  const int64_t chunks = (job.numel + job.chunk_size - 1) / job.chunk_size;
  std::vector<int64_t> cleared(static_cast<size_t>(parts));
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    cleared[static_cast<size_t>(t)] = isa.sign_compress(job, begin, end);
  });
  int64_t total = 0;
  for (int64_t c : cleared) total += c;
  return total;
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
