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
  static constexpr size_t kArrays = 8;
  std::unique_ptr<float[]> memory;
  std::unique_ptr<ChunkGuess> guess = std::make_unique<ChunkGuess>();
  ChunkScratch arrays;

  explicit ThreadMemory(int64_t chunk_size) {
    const auto room = static_cast<size_t>(chunk_size + kChunkSlack);
    memory.reset(new float[kArrays * room]);
    float* at[kArrays];
    for (size_t i = 0; i < kArrays; ++i) at[i] = memory.get() + i * room;
    arrays = {reinterpret_cast<int32_t*>(at[0]),
              reinterpret_cast<uint32_t*>(at[1]),
              at[2],
              at[3],
              reinterpret_cast<uint32_t*>(at[4]),
              at[5],
              at[6],
              at[7],
              guess.get()};
  }
};

int64_t chunks_of(int64_t numel, int64_t chunk_size) { return (numel + chunk_size - 1) / chunk_size; }

// The entries of one rank's chunk, unpacked; one thread's.
class Entries {
 public:
  explicit Entries(int64_t k) : positions_(static_cast<size_t>(k) + 1), values_(static_cast<size_t>(k) + 8) {}

  void read_positions(const ChunkTopkDecode& job, int64_t rank, int64_t chunk) {
    const int64_t nbytes = packed_bytes(job.k, job.index_bits);
    const unsigned char* row = row_of(job, job.indices, rank, chunk, nbytes);
    if (job.index_bits == 16) {
      std::memcpy(positions_.data(), row, static_cast<size_t>(nbytes));
      return;
    }
    for (int64_t j = 0; j < job.k; j += 2, row += 3) {
      const bool both = j + 1 < job.k;  // a lone code has two bytes
      const uint32_t two = row[0] | row[1] << 8 | (both ? row[2] << 16 : 0);
      positions_[static_cast<size_t>(j)] = two & 0xfff;
      positions_[static_cast<size_t>(j) + 1] = static_cast<uint16_t>(two >> 12);
    }
  }

  // alpha * decoded.
  void read_values(const ChunkTopkDecode& job, int64_t rank, int64_t chunk) {
    const int bits = job.value_bits;
    const unsigned char* row = row_of(job, job.values, rank, chunk, packed_bytes(job.k, bits));
    float* out = values_.data();
    if (bits >= 16) {
      const Dtype dtype = bits == 32 ? Dtype::fp32 : Dtype::bf16;
      for (int64_t j = 0; j < job.k; ++j) out[j] = job.alpha * load_widened(row, dtype, j);
      return;
    }
    const int64_t scales = bits == 2 ? 2 : 1;
    float scale[2];
    std::memcpy(scale, row_of(job, job.scales, rank, chunk, 4 * scales),
                sizeof(float) * static_cast<size_t>(scales));
    if (bits == 8) {
      for (int64_t j = 0; j < job.k; ++j)
        out[j] = job.alpha * (static_cast<float>(static_cast<int8_t>(row[j])) * scale[0]);
    } else if (bits == 4) {
      float table[16];
      for (int i = 0; i < 16; ++i) table[i] = job.alpha * (static_cast<float>((i ^ 8) - 8) * scale[0]);
      for (int64_t j = 0; j < job.k; j += 2, ++row) {
        out[j] = table[*row & 15];
        out[j + 1] = table[*row >> 4];
      }
    } else {
      const float table[4] = {job.alpha * -scale[0], job.alpha * -scale[1], job.alpha * scale[0],
                              job.alpha * scale[1]};
      for (int64_t j = 0; j < job.k; j += 4, ++row) {
        for (int i = 0; i < 4; ++i) out[j + i] = table[*row >> 2 * i & 3];
      }
    }
  }

  // The first of `count` whose position is out of range or not above the one before it, or -1.
  int64_t first_bad(int64_t count, int64_t valid) const {
    const uint16_t* at = positions_.data();
    bool good = at[count - 1] < valid;
    for (int64_t j = 1; j < count; ++j) good &= at[j - 1] < at[j];
    if (good) return -1;
    for (int64_t j = 0; j < count; ++j) {
      if (at[j] >= valid || (j > 0 && at[j] <= at[j - 1])) return j;
    }
    return -1;
  }

  void put(float* out, int64_t count, bool add) const {
    const uint16_t* at = positions_.data();
    const float* values = values_.data();
    if (add) {
      for (int64_t j = 0; j < count; ++j) out[at[j]] += values[j];
    } else {
      for (int64_t j = 0; j < count; ++j) out[at[j]] = values[j];
    }
  }

 private:
  static const unsigned char* row_of(const ChunkTopkDecode& job, const char* field, int64_t rank,
                                     int64_t chunk, int64_t nbytes) {
    return reinterpret_cast<const unsigned char*>(field + rank * job.rank_stride + chunk * nbytes);
  }

  std::vector<uint16_t> positions_;
  std::vector<float> values_;  // codes are read by the byte: up to three more than k
};

std::vector<Entries> entries_for(int64_t k, int parts) {
  std::vector<Entries> made;
  for (int t = 0; t < parts; ++t) made.emplace_back(k);
  return made;
}

int64_t valid_of(const ChunkTopkDecode& job, int64_t chunk) {
  return std::min(job.chunk_size, job.numel - chunk * job.chunk_size);
}

// All ranks' entries of a chunk to or onto `out`, rank after rank.
void put_all(const ChunkTopkDecode& job, int64_t chunk, Entries& entries, float* out) {
  const int64_t count = std::min(job.k, valid_of(job, chunk));
  for (int64_t rank = 0; rank < job.ranks; ++rank) {
    entries.read_positions(job, rank, chunk);
    entries.read_values(job, rank, chunk);
    entries.put(out, count, job.add);
  }
}

// The place (rank * chunks + chunk) * k + entry of an index that is out of range or not above the one before
// it, or -1.
int64_t first_bad_place(const ChunkTopkDecode& job, std::vector<Entries>& entries, int threads) {
  const int parts = parts_for(job.numel, threads);
  const int64_t chunks = chunks_of(job.numel, job.chunk_size);
  std::vector<int64_t> bad(static_cast<size_t>(parts), -1);
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t valid = valid_of(job, c);
      for (int64_t rank = 0; rank < job.ranks; ++rank) {
        Entries& own = entries[static_cast<size_t>(t)];
        own.read_positions(job, rank, c);
        const int64_t entry = own.first_bad(std::min(job.k, valid), valid);
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
  const Leaves& isa = leaves();
  const int parts = parts_for(job.numel, threads);
  std::vector<Entries> entries = entries_for(job.k, parts);
  if (const int64_t bad = first_bad_place(job, entries, threads); bad >= 0) return bad;
  const int64_t chunks = chunks_of(job.numel, job.chunk_size);
  const bool past_caches = job.clear && goes_past_caches(job.out, job.numel);
  // Where out is written past the caches, a chunk is made elsewhere: of zeros, which moving it out leaves.
  std::vector<std::vector<float>> made(static_cast<size_t>(parts));
  for (auto& chunk : made) chunk.resize(static_cast<size_t>(past_caches ? job.chunk_size : 0));
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    if (job.clear) populate_fresh(job.out, begin * job.chunk_size, std::min(end * job.chunk_size, job.numel));
    for (int64_t c = begin; c < end; ++c) {
      const int64_t valid = valid_of(job, c);
      float* out = job.out + c * job.chunk_size;
      float* put_to = past_caches ? made[static_cast<size_t>(t)].data() : out;
      if (job.clear && !past_caches) std::fill_n(out, valid, 0.0f);
      put_all(job, c, entries[static_cast<size_t>(t)], put_to);
      if (past_caches) isa.sparse_move_out(put_to, out, valid, true);
    }
    if (past_caches) isa.sparse_settle();
  });
  return -1;
}

Reduced chunk_topk_reduce(const ChunkTopkDecode& from, const ChunkTopk& to, float divisor, int threads) {
  const Leaves& isa = leaves();
  const int parts = parts_for(to.numel, threads);
  std::vector<Entries> entries = entries_for(from.k, parts);
  if (const int64_t bad = first_bad_place(from, entries, threads); bad >= 0) return {bad, 0};
  std::vector<ThreadMemory> scratch;
  std::vector<std::vector<float>> sums;
  for (int t = 0; t < parts; ++t) {
    scratch.emplace_back(to.chunk_size);
    sums.emplace_back(static_cast<size_t>(to.chunk_size));
  }
  const auto reduce = [&](int t, float* err, int64_t begin, int64_t end) {
    float* sum = sums[static_cast<size_t>(t)].data();
    int64_t cleared = 0;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t valid = valid_of(from, c);
      std::fill_n(sum, valid, 0.0f);
      put_all(from, c, entries[static_cast<size_t>(t)], sum);
      if (divisor != 1.0f) isa.divide(sum, valid, divisor);
      ChunkTopk job = to;
      // Where element 0 of the vector would lie; an address, not to be read.
      job.grad = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(sum) -
                                               sizeof(float) * static_cast<uintptr_t>(c * to.chunk_size));
      job.grad_dtype = Dtype::fp32;
      job.err = err;
      cleared += isa.chunk_topk_compress(job, scratch[static_cast<size_t>(t)].arrays, c, c + 1);
    }
    return cleared;
  };
  return {-1, reduce_tiles({to.numel, to.chunk_size, to.err, threads}, reduce)};
}

}  // namespace gck
