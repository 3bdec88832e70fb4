#include "cpu/sign.hpp"

#include "cpu/dense.hpp"
#include "cpu/reduce.hpp"
#include "cpu/threads.hpp"

namespace gck {

int64_t sign_compress(const SignChunks& job, const ResidualOptions& options, int threads) {
  const Leaves& isa = leaves();
  return compress_chunks({job.grad, job.grad_dtype, job.err, job.numel, job.chunk_size}, options, job.numel,
                         threads,
                         [&](int, int64_t begin, int64_t end) { return isa.sign_compress(job, begin, end); });
}

void sign_decompress(SignDecode job, int threads) {
  const Leaves& isa = leaves();
  decode_dense(job.into, job.chunk_size, threads,
               [&](int64_t begin, int64_t end) { isa.sign_decompress(job, begin, end); });
}

int64_t sign_reduce(const SignDecode& from, const SignChunks& to, float divisor,
                    const ResidualOptions& options, int threads) {
  const Leaves& isa = leaves();
  const ResidualReading reading = options.reading();
  const auto reduce = [&](int, float* err, int64_t begin, int64_t end) {
    return isa.sign_reduce(from, {err, to.numel, divisor, reading}, to, begin, end);
  };
  return reduce_tiles({to.numel, to.chunk_size, to.err, threads}, reduce);
}

}  // namespace gck
