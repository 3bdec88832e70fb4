#include <algorithm>
#include <vector>

#include "cpu/chunk_memory.hpp"
#include "cpu/chunk_topk.hpp"
#include "cpu/dense.hpp"
#include "cpu/reduce.hpp"
#include "cpu/threads.hpp"

namespace gck {
namespace {

// The entries of one rank's chunk, unpacked; one thread's.
class Entries {
 public:
  explicit Entries(int64_t k)
      : positions_(static_cast<size_t>(k) + 32), values_(static_cast<size_t>(k) + 32) {}

  ChunkEntries arrays() { return {positions_.data(), values_.data()}; }

 private:
  std::vector<uint16_t> positions_;
  std::vector<float> values_;
};

std::vector<Entries> entries_for(int64_t k, int parts) {
  std::vector<Entries> made;
  for (int t = 0; t < parts; ++t) made.emplace_back(k);
  return made;
}

int64_t chunks_of(int64_t numel, int64_t chunk_size) { return (numel + chunk_size - 1) / chunk_size; }

int64_t valid_of(const ChunkTopkDecode& job, int64_t chunk) {
  return std::min(job.chunk_size, job.numel - chunk * job.chunk_size);
}

// The place of an index that is out of range or not above the one before it, or -1. On a thread for each of
// the entries.
int64_t first_bad_place(const ChunkTopkDecode& job, std::vector<Entries>& entries) {
  const Leaves& isa = leaves();
  const auto parts = static_cast<int>(entries.size());
  const int64_t chunks = chunks_of(job.numel, job.chunk_size);
  std::vector<int64_t> bad(entries.size(), -1);
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    const auto p = static_cast<size_t>(t);
    bad[p] = isa.chunk_topk_first_bad(job, entries[p].arrays(), begin, end);
  });
  const auto found = std::find_if(bad.begin(), bad.end(), [](int64_t place) { return place >= 0; });
  return found == bad.end() ? -1 : *found;
}

}  // namespace

int64_t chunk_topk_decompress(const ChunkTopkDecode& job, int threads) {
  const Leaves& isa = leaves();
  const int parts = parts_for(job.numel, threads);
  std::vector<Entries> entries = entries_for(job.k, parts);
  if (const int64_t bad = first_bad_place(job, entries); bad >= 0) return bad;
  const int64_t chunks = chunks_of(job.numel, job.chunk_size);
  const bool past_caches = job.clear && goes_past_caches(job.out, job.numel, threads);
  // Where out is written past the caches, or sums are divided on the way, a chunk is made elsewhere: of
  // zeros, which moving it out leaves.
  const bool moved = job.clear && (past_caches || job.divisor != 1.0f);
  std::vector<std::vector<float>> made(static_cast<size_t>(parts));
  for (auto& chunk : made) chunk.resize(static_cast<size_t>(moved ? job.chunk_size : 0));
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    if (job.clear) populate_fresh(job.out, begin * job.chunk_size, std::min(end * job.chunk_size, job.numel));
    for (int64_t c = begin; c < end; ++c) {
      const int64_t valid = valid_of(job, c);
      float* out = job.out + c * job.chunk_size;
      float* put_to = moved ? made[static_cast<size_t>(t)].data() : out;
      if (job.clear && !moved) std::fill_n(out, valid, 0.0f);
      isa.chunk_topk_put(job, entries[static_cast<size_t>(t)].arrays(), c, put_to, nullptr);
      if (moved) isa.sparse_move_out(put_to, out, valid, job.divisor, past_caches);
    }
    if (past_caches) isa.sparse_settle();
  });
  return -1;
}

Reduced chunk_topk_reduce(const ChunkTopkDecode& from, const ChunkTopk& to, float divisor,
                          const ResidualOptions& options, int threads) {
  const Leaves& isa = leaves();
  const int parts = parts_for(to.numel, threads);
  std::vector<Entries> entries = entries_for(from.k, parts);
  if (const int64_t bad = first_bad_place(from, entries); bad >= 0) return {bad, 0};
  std::vector<ThreadMemory> scratch;
  std::vector<std::vector<float>> sums;
  for (int t = 0; t < parts; ++t) {
    scratch.emplace_back(to.chunk_size);
    sums.emplace_back(static_cast<size_t>(to.chunk_size));
  }
  const ResidualPass residual(to.numel, options);
  const auto reduce = [&](int t, float* err, int64_t begin, int64_t end) {
    const auto p = static_cast<size_t>(t);
    ChunkTopk job = to;
    job.err = err;
    int64_t cleared = 0;
    for (int64_t c = begin; c < end; ++c) {
      const float* later = c + 1 < end ? err + (c + 1) * to.chunk_size : nullptr;
      residual.read(err + c * to.chunk_size, valid_of(from, c));
      isa.chunk_topk_put(from, entries[p].arrays(), c, sums[p].data(), later);
      cleared += isa.chunk_topk_compress_mean(job, scratch[p].arrays, sums[p].data(), divisor, c, later);
    }
    return cleared;
  };
  return {-1, reduce_tiles({to.numel, to.chunk_size, to.err, threads}, reduce)};
}

}  // namespace gck
