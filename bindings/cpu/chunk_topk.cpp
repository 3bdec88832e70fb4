#include "cpu/chunk_topk.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/dense.hpp"
#include "cpu/packing.hpp"
#include "cpu/reduce.hpp"
#include "cpu/round.hpp"
#include "cpu/threads.hpp"

namespace gck {
namespace {

// Memory of one thread. Pages that a chunk does not need are never touched.
struct ThreadMemory {
  static constexpr size_t kArrays = 9;
  std::unique_ptr<float[]> memory;
  ChunkScratch arrays;

  explicit ThreadMemory(int64_t chunk_size) {
    const auto room = static_cast<size_t>(chunk_size + kChunkSlack);
    memory.reset(new float[kArrays * room]);
    float* at[kArrays];
    for (size_t i = 0; i < kArrays; ++i) at[i] = memory.get() + i * room;
    arrays = {reinterpret_cast<int32_t*>(at[0]),
              reinterpret_cast<uint32_t*>(at[1]),
              reinterpret_cast<int32_t*>(at[2]),
              at[3],
              at[4],
              reinterpret_cast<uint32_t*>(at[5]),
              at[6],
              at[7],
              at[8]};
  }
};

int64_t chunks_of(int64_t numel, int64_t chunk_size) { return (numel + chunk_size - 1) / chunk_size; }

// Rows of one rank's chunk.
struct Source {
  const ChunkTopkDecode& job;
  int64_t chunk, valid, entries;
  int64_t value_row = packed_bytes(job.k, job.value_bits), index_row = packed_bytes(job.k, job.index_bits);

  Source(const ChunkTopkDecode& j, int64_t c)
      : job(j),
        chunk(c),
        valid(std::min(j.chunk_size, j.numel - c * j.chunk_size)),
        entries(std::min(j.k, valid)) {}

  const unsigned char* row(const char* field, int64_t rank, int64_t nbytes) const {
    return reinterpret_cast<const unsigned char*>(field + rank * job.rank_stride + chunk * nbytes);
  }

  int64_t index(int64_t rank, int64_t j) const {
    const unsigned char* from = row(job.indices, rank, index_row);
    if (job.index_bits == 12) return packed_code(from, j, 12);
    uint16_t wide;
    std::memcpy(&wide, from + 2 * j, sizeof wide);
    return wide;
  }

  // The first entry whose index is out of range or not above the one before it, or -1.
  int64_t first_bad(int64_t rank) const {
    int64_t before = -1;
    for (int64_t j = 0; j < entries; ++j) {
      const int64_t at = index(rank, j);
      if (at <= before || at >= valid) return j;
      before = at;
    }
    return -1;
  }

  template <typename Value>
  void put_each(float* out, int64_t rank, Value value) const {
    for (int64_t j = 0; j < entries; ++j) {
      float& at = out[index(rank, j)];
      at = job.add ? at + job.alpha * value(j) : job.alpha * value(j);
    }
  }

  void put(float* out, int64_t rank) const {
    const unsigned char* from = row(job.values, rank, value_row);
    const int bits = job.value_bits;
    if (bits >= 16) {
      put_each(out, rank,
               [&](int64_t j) { return load_widened(from, bits == 32 ? Dtype::fp32 : Dtype::bf16, j); });
      return;
    }
    float scale[2];
    const int64_t scales = bits == 2 ? 2 : 1;
    std::memcpy(scale, row(job.scales, rank, 4 * scales), sizeof(float) * static_cast<size_t>(scales));
    if (bits == 2) {
      put_each(out, rank, [&](int64_t j) {
        const uint32_t code = packed_code(from, j, 2);
        return code & 2 ? scale[code & 1] : -scale[code & 1];
      });
    } else {
      const uint32_t sign = 1u << (bits - 1);
      put_each(out, rank, [&](int64_t j) {
        const auto code =
            static_cast<int32_t>(packed_code(from, j, bits) ^ sign) - static_cast<int32_t>(sign);
        return static_cast<float>(code) * scale[0];
      });
    }
  }
};

// The place (rank * chunks + chunk) * k + entry of an index that is out of range or not above the one before
// it, or -1.
int64_t first_bad_place(const ChunkTopkDecode& job, int threads) {
  const int parts = parts_for(job.numel, threads);
  const int64_t chunks = chunks_of(job.numel, job.chunk_size);
  std::vector<int64_t> bad(static_cast<size_t>(parts), -1);
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    for (int64_t c = begin; c < end; ++c) {
      const Source source(job, c);
      for (int64_t rank = 0; rank < job.ranks; ++rank) {
        const int64_t entry = source.first_bad(rank);
        if (entry >= 0) bad[static_cast<size_t>(t)] = (rank * chunks + c) * job.k + entry;
      }
    }
  });
  for (int64_t place : bad) {
    if (place >= 0) return place;
  }
  return -1;
}

}  // namespace

int64_t chunk_topk_compress(const ChunkTopk& job, int threads) {
  const Leaves& isa = leaves();
  const int parts = parts_for(job.numel, threads);
  const int64_t chunks = chunks_of(job.numel, job.chunk_size);
  std::vector<ThreadMemory> scratch;
  for (int t = 0; t < parts; ++t) scratch.emplace_back(job.chunk_size);
  std::vector<int64_t> cleared(static_cast<size_t>(parts));
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    const auto p = static_cast<size_t>(t);
    cleared[p] = isa.chunk_topk_compress(job, scratch[p].arrays, begin, end);
  });
  int64_t total = 0;
  for (int64_t c : cleared) total += c;
  return total;
}

int64_t chunk_topk_decompress(const ChunkTopkDecode& job, int threads) {
  const Leaves& isa = leaves();
  if (const int64_t bad = first_bad_place(job, threads); bad >= 0) return bad;
  const int parts = parts_for(job.numel, threads);
  const int64_t chunks = chunks_of(job.numel, job.chunk_size);
  const bool past_caches = job.clear && goes_past_caches(job.out, job.numel);
  // Where out is written past the caches, a chunk is made elsewhere: of zeros, which moving it out leaves.
  std::vector<std::vector<float>> made(static_cast<size_t>(parts));
  for (auto& chunk : made) chunk.resize(static_cast<size_t>(past_caches ? job.chunk_size : 0));
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    if (job.clear) populate_fresh(job.out, begin * job.chunk_size, std::min(end * job.chunk_size, job.numel));
    for (int64_t c = begin; c < end; ++c) {
      const Source source(job, c);
      float* out = job.out + c * job.chunk_size;
      float* put_to = past_caches ? made[static_cast<size_t>(t)].data() : out;
      if (job.clear && !past_caches) std::fill_n(out, source.valid, 0.0f);
      for (int64_t rank = 0; rank < job.ranks; ++rank) source.put(put_to, rank);
      if (past_caches) isa.sparse_move_out(put_to, out, source.valid, true);
    }
    if (past_caches) isa.sparse_settle();
  });
  return -1;
}

Reduced chunk_topk_reduce(const ChunkTopkDecode& from, const ChunkTopk& to, float divisor, int threads) {
  const Leaves& isa = leaves();
  if (const int64_t bad = first_bad_place(from, threads); bad >= 0) return {bad, 0};
  std::vector<ThreadMemory> scratch;
  for (int t = 0; t < parts_for(to.numel, threads); ++t) scratch.emplace_back(to.chunk_size);
  const auto sum = [&](float* out, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Source source(from, c);
      std::fill_n(out + c * to.chunk_size, source.valid, 0.0f);
      for (int64_t rank = 0; rank < from.ranks; ++rank) source.put(out + c * to.chunk_size, rank);
    }
  };
  const auto compress = [&](int t, const float* grad, float* err, int64_t begin, int64_t end) {
    ChunkTopk job = to;
    job.grad = grad;
    job.grad_dtype = Dtype::fp32;
    job.err = err;
    return isa.chunk_topk_compress(job, scratch[static_cast<size_t>(t)].arrays, begin, end);
  };
  return {-1, reduce_tiles({to.numel, to.chunk_size, divisor, to.err, threads}, sum, compress)};
}

}  // namespace gck
