#include "cpu/sparse.hpp"

#include <algorithm>
#include <atomic>

#include "cpu/dense.hpp"
#include "cpu/isa/leaves.hpp"
#include "cpu/round.hpp"
#include "cpu/threads.hpp"

namespace gck {
namespace {

// Entries of out that are worked on while all rows pass by. Of those made elsewhere, and of those asked for
// ahead, two fit a second and a nearest cache; where few lines of out are needed, long tiles cost least.
constexpr int64_t kTileMade = 8192, kTileAskedFor = 2048, kTileOfFew = 1 << 15;
constexpr int64_t kCheckGrain = 1 << 16;
constexpr int64_t kLine = 64;          // bytes
constexpr int64_t kAhead = 4 * kLine;  // bytes of a row's indices that are asked for before they are needed

// The first position of one row at which something is wrong, or -1.
template <typename Index>
int64_t first_bad(const Index* indices, int64_t count, int64_t numel) {
  for (int64_t j = 0; j < count; ++j) {
    if (indices[j] < 0 || indices[j] >= numel || (j > 0 && indices[j] <= indices[j - 1])) return j;
  }
  return -1;
}

template <typename Index>
BadIndex check(const SparseJob& job) {
  const auto useful = static_cast<int>(
      std::min<int64_t>(job.threads, job.count * static_cast<int64_t>(job.rows.size()) / kCheckGrain));
  const int parts = std::max(1, useful);
  std::atomic<bool> good{true};
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(job.count, parts, t, 1);
    for (size_t row = 0; row < job.rows.size(); ++row) {
      const int64_t second = std::max<int64_t>(begin, 1);
      if (!leaves().sparse_ascends(job.rows[row].indices, job.wide_indices, second, end)) good = false;
    }
  });
  for (size_t row = 0; row < job.rows.size() && job.count > 0; ++row) {
    const auto* all = static_cast<const Index*>(job.rows[row].indices);
    if (good && all[0] >= 0 && all[job.count - 1] < job.numel) continue;
    if (const int64_t bad = first_bad(all, job.count, job.numel); bad >= 0) {
      return {static_cast<int64_t>(row), bad};
    }
  }
  return {-1, -1};
}

// Asks for the line of memory `bytes` behind p, if there is one: nothing is read.
inline void prefetch(const void* p, int64_t bytes) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)));
}

// Takes a row's entries from position j on, as far as they are below stop, to a tile that starts at entry
// `begin`. Returns the position of the first one left.
template <typename Index, Dtype D, bool Add>
int64_t put(const SparseJob& job, const SparseRow& row, int64_t j, float* tile, int64_t begin, int64_t stop) {
  const auto* indices = static_cast<const Index*>(row.indices);
  const void* values = row.values;
  const int64_t count = job.count;
  const float alpha = job.alpha.of(&row - job.rows.data());
  const auto one = [=](int64_t at) {
    const float value = alpha * load_widened(values, D, at);
    float& place = tile[indices[at] - begin];
    place = Add ? place + value : value;
  };
  constexpr int64_t kBlock = kLine / static_cast<int64_t>(sizeof(Index));
  constexpr int64_t kValue = D == Dtype::fp32 ? 4 : 2;
  // Processors follow fewer streams by themselves than there are rows.
  const auto ask = [&] {
    prefetch(indices + j, kAhead);
    prefetch(static_cast<const char*>(values) + j * kValue,
             kAhead / static_cast<int64_t>(sizeof(Index)) * kValue);
  };
  for (; j + kBlock <= count && indices[j + kBlock - 1] < stop; j += kBlock) {
    ask();
    for (int64_t i = 0; i < kBlock; ++i) one(j + i);
  }
  for (; j < count && indices[j] < stop; ++j) one(j);
  ask();
  return j;
}

// Makes tiles out of zeros, and moves each to out while the next one is made: stores that wait for memory
// and entries that wait for a cache then wait together.
template <typename Index, Dtype D, bool Add>
void write(const SparseJob& job, Range part, int64_t* next) {
  const Leaves& isa = leaves();
  const auto rows = static_cast<int64_t>(job.rows.size());
  const bool past_caches = is_past_caches(job.numel, job.threads);
  populate_fresh(job.out, part.begin, part.end);
  const int64_t share = (kTileMade / rows + 15) / 16 * 16;
  alignas(kLine) float tiles[2 * kTileMade];
  std::fill_n(tiles, std::min(2 * kTileMade, part.end - part.begin), 0.0f);
  float *tile = tiles, *made = tiles + kTileMade;
  Range waiting{part.begin, part.begin};  // entries that are in `made`, and not yet in out
  const auto move_out = [&](int64_t most) {
    const int64_t count = std::min(most, waiting.end - waiting.begin);
    isa.sparse_move_out(made, job.out + waiting.begin, count, job.divisor, past_caches);
    made += count;
    waiting.begin += count;
  };
  for (int64_t at = part.begin; at < part.end; at += kTileMade) {
    const int64_t stop = std::min(at + kTileMade, part.end);
    for (int64_t row = 0; row < rows; ++row) {
      move_out(share);
      next[row] = put<Index, D, Add>(job, job.rows[static_cast<size_t>(row)], next[row], tile, at, stop);
    }
    made = tile;
    waiting = {at, stop};
    tile = tile == tiles ? tiles + kTileMade : tiles;
  }
  move_out(kTileMade);
  isa.sparse_settle();
}

// Adds to tiles of out where they are.
template <typename Index, Dtype D>
void add(const SparseJob& job, Range part, int64_t* next) {
  const auto rows = static_cast<int64_t>(job.rows.size());
  // Where an entry goes to every third line of out, lines are asked for a tile ahead.
  const bool dense = rows * job.count >= job.numel / 48;
  const int64_t tile = dense ? kTileAskedFor : kTileOfFew;
  const int64_t share = (tile / rows + 15) / 16 * 16;
  for (int64_t at = part.begin; at < part.end; at += tile) {
    const int64_t stop = std::min(at + tile, part.end);
    int64_t ahead = stop;
    for (int64_t row = 0; row < rows; ++row) {
      if (dense) {
        const int64_t end = std::min(ahead + share, part.end);
        for (; ahead < end; ahead += 16) prefetch(job.out + ahead, 0);
      }
      next[row] =
          put<Index, D, true>(job, job.rows[static_cast<size_t>(row)], next[row], job.out + at, at, stop);
    }
  }
}

template <typename Index, Dtype D>
void decompress_part(const SparseJob& job, Range part, int64_t* next) {
  // next: the first entry of each row that is not yet added
  for (size_t row = 0; row < job.rows.size(); ++row) {
    const auto* indices = static_cast<const Index*>(job.rows[row].indices);
    next[row] = std::lower_bound(indices, indices + job.count, part.begin,
                                 [](Index index, int64_t at) { return index < at; }) -
                indices;
  }
  if (!job.clear) return add<Index, D>(job, part, next);
  job.add ? write<Index, D, true>(job, part, next) : write<Index, D, false>(job, part, next);
}

template <typename Index>
void decompress(const SparseJob& job) {
  const int parts = parts_for(job.numel, job.threads);
  const size_t rows = job.rows.size();
  std::vector<int64_t> positions(rows * static_cast<size_t>(parts));
  for_each_part(parts, [&](int t) {
    const Range part = part_of(job.numel, parts, t, 64);
    int64_t* next = positions.data() + rows * static_cast<size_t>(t);
    switch (job.value_dtype) {
      case Dtype::fp32:
        return decompress_part<Index, Dtype::fp32>(job, part, next);
      case Dtype::bf16:
        return decompress_part<Index, Dtype::bf16>(job, part, next);
      case Dtype::fp16:
        return decompress_part<Index, Dtype::fp16>(job, part, next);
      case Dtype::none:  // of gradients alone
        return;
    }
  });
}

}  // namespace

BadIndex sparse_decompress(const SparseJob& job) {
  const BadIndex bad = job.wide_indices ? check<int64_t>(job) : check<int32_t>(job);
  if (bad.row >= 0) return bad;
  job.wide_indices ? decompress<int64_t>(job) : decompress<int32_t>(job);
  return bad;
}

}  // namespace gck
