#include "cpu/quantize.hpp"

#include <algorithm>

#include "cpu/dense.hpp"
#include "cpu/reduce.hpp"
#include "cpu/scratch.hpp"
#include "cpu/threads.hpp"

namespace gck {

int64_t quantize_compress(const QuantizeChunks& job, const ResidualOptions& options, int threads) {
  const Leaves& isa = leaves();
  const int parts = parts_for(job.numel, threads);
  // Of the first row: where there are more, they were there before.
  const int64_t bytes = std::min(job.numel, job.chunks_per_row * job.chunk_size) * job.bits / 8;
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(bytes, parts, t, 1);
    populate_fresh_codes(job.bodies + begin, static_cast<size_t>(end - begin));
  });
  return compress_chunks(
      {job.grad, job.grad_dtype, job.err, job.numel, job.chunk_size}, options, job.numel, threads,
      [&](int, int64_t begin, int64_t end) { return isa.quantize_compress(job, begin, end); });
}

void quantize_decompress(QuantizeDecode job, int threads) {
  const Leaves& isa = leaves();
  decode_dense(job.into, job.chunk_size, threads,
               [&](int64_t begin, int64_t end) { isa.quantize_decompress(job, begin, end); });
}

int64_t quantize_reduce(const QuantizeDecode& from, const QuantizeChunks& to, float divisor,
                        const ResidualOptions& options, int threads) {
  const Leaves& isa = leaves();
  const ResidualReading reading = options.reading();
  const auto reduce = [&](int, float* err, int64_t begin, int64_t end) {
    return isa.quantize_reduce(from, {err, to.numel, divisor, reading}, to, begin, end);
  };
  return reduce_tiles({to.numel, to.chunk_size, to.err, threads}, reduce);
}

}  // namespace gck
