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
  const auto reduce = [&](int, float* err, int64_t begin, int64_t end) {
    isa.sign_add_mean(from, {err, to.numel, divisor}, begin, end);
    SignChunks job = to;
    job.grad = job.err = err;
    job.grad_dtype = Dtype::none;
    return isa.sign_compress(job, begin, end);
  };
  return reduce_tiles({to.numel, to.chunk_size, to.err, threads}, reduce);
}

}  // namespace gck
