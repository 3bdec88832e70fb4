#include "cpu/quantize.hpp"

#include <vector>

#include "cpu/threads.hpp"

namespace gck {

int64_t quantize_compress(const QuantizeChunks& job, int threads) {
  const Leaves& isa = leaves();
  const int parts = parts_for(job.numel, threads);
  const int64_t chunks = (job.numel + job.chunk_size - 1) / job.chunk_size;
  std::vector<int64_t> cleared(static_cast<size_t>(parts));
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    cleared[static_cast<size_t>(t)] = isa.quantize_compress(job, begin, end);
  });
  int64_t total = 0;
  for (int64_t c : cleared) total += c;
  return total;
}

void quantize_decompress(const QuantizeDecode& job, int threads) {
  const Leaves& isa = leaves();
  const int parts = parts_for(job.numel, threads);
  const int64_t chunks = (job.numel + job.chunk_size - 1) / job.chunk_size;
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    isa.quantize_decompress(job, begin, end);
  });
}

}  // namespace gck
