#include "cpu/sign.hpp"

#include <vector>

#include "cpu/dense.hpp"
#include "cpu/reduce.hpp"
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

void sign_decompress(SignDecode job, int threads) {
  const Leaves& isa = leaves();
  decode_dense(job.into, job.chunk_size, threads,
               [&](int64_t begin, int64_t end) { isa.sign_decompress(job, begin, end); });
}

int64_t sign_reduce(const SignDecode& from, const SignChunks& to, float divisor, int threads) {
  const Leaves& isa = leaves();
  const auto sum = [&](float* out, int64_t begin, int64_t end) {
    SignDecode job = from;
    job.into = {out, to.numel, 1.0f, true, true, false};
    isa.sign_decompress(job, begin, end);
  };
  const auto compress = [&](int, const float* grad, float* err, int64_t begin, int64_t end) {
    SignChunks job = to;
    job.grad = grad;
    job.grad_dtype = Dtype::fp32;
    job.err = err;
    return isa.sign_compress(job, begin, end);
  };
  return reduce_tiles({to.numel, to.chunk_size, divisor, to.err, threads}, sum, compress);
}

}  // namespace gck
