#include "cpu/chunk_topk.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/packing.hpp"
#include "cpu/round.hpp"
#include "cpu/scratch.hpp"
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

}  // namespace

int64_t chunk_topk_compress(const ChunkTopk& job, const ResidualOptions& options, int threads) {
  const Leaves& isa = leaves();
  std::vector<ThreadMemory> scratch;
  for (int t = 0; t < parts_for(job.numel, threads); ++t) scratch.emplace_back(job.chunk_size);
  const int64_t rest = job.numel % job.chunk_size;
  const int64_t selected = job.numel / job.chunk_size * job.k + std::min(rest, job.k);
  return compress_chunks({job.grad, job.grad_dtype, job.err, job.numel, job.chunk_size}, options, selected,
                         threads, [&](int part, int64_t begin, int64_t end) {
                           return isa.chunk_topk_compress(job, scratch[static_cast<size_t>(part)].arrays,
                                                          begin, end);
                         });
}

int64_t chunk_topk_decompress(const ChunkTopkDecode& job, int threads) {
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
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    if (job.clear) populate_fresh(job.out, begin * job.chunk_size, std::min(end * job.chunk_size, job.numel));
    for (int64_t c = begin; c < end; ++c) {
      const Source source(job, c);
      float* out = job.out + c * job.chunk_size;
      if (job.clear) std::fill_n(out, source.valid, 0.0f);
      for (int64_t rank = 0; rank < job.ranks; ++rank) source.put(out, rank);
    }
  });
  return -1;
}

}  // namespace gck
