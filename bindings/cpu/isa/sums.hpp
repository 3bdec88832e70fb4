// Sums over ranks, of elements that stay in registers while ranks are walked.
#pragma once

#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {

// Ranks that are added together: as many streams as the hardware follows, and lines that have one place in
// the nearest cache.
constexpr int64_t kRanksTogether = 8;
// Elements that these ranks are walked for before the next ones come: a part of the nearest cache.
constexpr int64_t kSumTile = 4096;

enum class From { zero, memory, nothing };  // nothing: the one rank is written, not added

// Vecs vectors of 16 at out: what they start from, and value(rank, vector) of each rank in turn.
template <int Vecs, typename Value>
inline void sum_block(float* out, From from, int64_t ranks, bool past_caches, Value value) {
  Vec sum[Vecs];
  int64_t rank = 0;
  if (from == From::nothing) {
    for (int v = 0; v < Vecs; ++v) sum[v] = value(0, v);
    rank = 1;
  } else if (from == From::memory) {
    for (int v = 0; v < Vecs; ++v) sum[v] = load(out + v * kLanes);
  } else {
    for (int v = 0; v < Vecs; ++v) sum[v] = set1(0.0f);
  }
  for (; rank < ranks; ++rank) {
    for (int v = 0; v < Vecs; ++v) sum[v] = add(sum[v], value(rank, v));
  }
  if (past_caches) {
    for (int v = 0; v < Vecs; ++v) store_past_caches(out + v * kLanes, sum[v]);
  } else {
    for (int v = 0; v < Vecs; ++v) store(out + v * kLanes, sum[v]);
  }
}

// Calls some(chunk_begin, chunk_end, first_rank, ranks, from, past_caches) for all of chunks [begin, end),
// which are whole, and all ranks, in the order that caches like.
template <typename Some>
inline void walk_ranks(const DecodeInto& into, int64_t ranks, int64_t chunk_size, int64_t begin, int64_t end,
                       Some some) {
  const int64_t tile = chunk_size < kSumTile ? kSumTile / chunk_size : 1;
  for (int64_t c = begin; c < end; c += tile) {
    const int64_t stop = c + tile < end ? c + tile : end;
    From from = !into.add ? From::nothing : into.clear ? From::zero : From::memory;
    for (int64_t rank = 0; rank < ranks; rank += kRanksTogether) {
      const int64_t left = ranks - rank;
      const bool last = left <= kRanksTogether;
      some(c, stop, rank, last ? left : kRanksTogether, from, into.past_caches && last);
      from = From::memory;
    }
  }
  if (into.past_caches) order_stores();
}

}  // namespace gck::GCK_ISA
