#include "cpu/quantize.hpp"

#include <vector>

#include "cpu/dense.hpp"
#include "cpu/reduce.hpp"
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

void quantize_decompress(QuantizeDecode job, int threads) {
  const Leaves& isa = leaves();
  decode_dense(job.into, job.chunk_size, threads,
               [&](int64_t begin, int64_t end) { isa.quantize_decompress(job, begin, end); });
}

int64_t quantize_reduce(const QuantizeDecode& from, const QuantizeChunks& to, float divisor, int threads) {
  const Leaves& isa = leaves();
  const auto reduce = [&](int, float* err, int64_t begin, int64_t end) {
    isa.quantize_add_mean(from, {err, to.numel, divisor}, begin, end);
    QuantizeChunks job = to;
    job.grad = job.err = err;
    job.grad_dtype = Dtype::none;
    return isa.quantize_compress(job, begin, end);
  };
  return reduce_tiles({to.numel, to.chunk_size, to.err, threads}, reduce);
}

}  // namespace gck
