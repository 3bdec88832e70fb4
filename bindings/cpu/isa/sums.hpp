// Sums over ranks, of elements that stay in registers while ranks are walked.
#pragma once

#include "cpu/isa/known.hpp"
#include "cpu/isa/residual.hpp"
#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {

// Ranks that are added together: as many streams as the hardware follows, and lines that have one place in
// the nearest cache.
constexpr int64_t kRanksTogether = 8;
// Elements that these ranks are walked for before the next ones come: a part of the nearest cache.
constexpr int64_t kSumTile = 4096;
constexpr int64_t kMostOfTile = kMaxChunk;  // which is a tile as well

// Elements that ranks' payloads are asked for ahead of where sums are made: processors by themselves stop
// where a tile is left for something else. More would only push what is used soon out of the nearest cache.
constexpr int64_t kAskAhead = 512;

// Asks for what lies `ahead` bytes behind a place.
inline void ask_ahead(const char* at, int64_t ahead) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + static_cast<uintptr_t>(ahead)));
}

// The same of all ranks' codes of Bits bits from element i on, at each new line.
template <int Bits>
inline void ask_ahead(const char* const* codes, int64_t ranks, int64_t i) {
  if (i * Bits / 8 % 64) return;
  for (int64_t r = 0; r < ranks; ++r) ask_ahead(codes[r] + i * Bits / 8, kAskAhead * Bits / 8);
}

// Of Ways vectors, of which the first has elements 0, Ways, ..., and so on, vectors of consecutive elements;
// and back.
#if defined(GCK_AVX512)
template <int Ways>
inline void put_together(Vec* x) {
  const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i upper = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const auto two = [&](Vec even, Vec odd, Vec& front, Vec& back) {
    front = {_mm512_permutex2var_ps(even.v, lower, odd.v)};
    back = {_mm512_permutex2var_ps(even.v, upper, odd.v)};
  };
  if constexpr (Ways == 2) two(x[0], x[1], x[0], x[1]);
  if constexpr (Ways == 4) {
    Vec a, b, c, d;
    two(x[0], x[2], a, b);
    two(x[1], x[3], c, d);
    two(a, c, x[0], x[1]);
    two(b, d, x[2], x[3]);
  }
}
template <int Ways>
inline void take_apart(Vec* x) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  const auto two = [&](Vec front, Vec back, Vec& even, Vec& odd) {
    even = {_mm512_permutex2var_ps(front.v, evens, back.v)};
    odd = {_mm512_permutex2var_ps(front.v, odds, back.v)};
  };
  if constexpr (Ways == 2) two(x[0], x[1], x[0], x[1]);
  if constexpr (Ways == 4) {
    Vec a, b, c, d;
    two(x[0], x[1], a, c);
    two(x[2], x[3], b, d);
    two(a, b, x[0], x[2]);
    two(c, d, x[1], x[3]);
  }
}
#else
template <int Ways>
inline void put_together(Vec*) {
  static_assert(Ways == 1);
}
template <int Ways>
inline void take_apart(Vec*) {
  static_assert(Ways == 1);
}
#endif

// Of a run of ranks: what their sum starts from, and what becomes of it. All are indexed as the vector is.
struct Run {
  int64_t first, ranks;
  const float* from;  // null: zero, or where `written`, nothing: the one rank is not added to anything
  float* to;
  bool written, past_caches;
  const float* err;  // not null, of the last ranks of a mean: it is added to what has been divided
  bool exact;        // multiplying by the inverse divides
  float divisor, inverse;

  // Whether one rank's values are written as they are.
  bool is_copy() const { return written && ranks == 1 && from == nullptr && err == nullptr; }
};

// add_rank(rank) for all ranks of [First, Last), which are known.
template <int64_t First, int64_t Last, typename AddRank>
GCK_INLINE void add_known_ranks(AddRank add_rank) {
  if constexpr (First < Last) {
    add_rank(First);
    add_known_ranks<First + 1, Last>(add_rank);
  }
}

// The bodies of these ranks, where no store that follows can change them, as compilers see it.
struct BodiesOfRun {
  const char* of[kRanksTogether];

  template <typename Count>
  GCK_INLINE BodiesOfRun(const char* const* bodies, Count ranks) {
    if constexpr (is_known<Count>) {
      add_known_ranks<0, Count::number>([&](int64_t r) { of[r] = bodies[r]; });
    } else {
      for (int64_t r = 0; r < ranks; ++r) of[r] = bodies[r];
    }
  }
};

// And what their decoded values are multiplied with.
struct AlphasOfRun {
  float of[kRanksTogether];

  AlphasOfRun(const Alphas& alpha, const Run& run) {
    for (int64_t r = 0; r < run.ranks; ++r) of[r] = alpha.of(run.first + r);
  }
};

// Vecs vectors of 16 at element i. `First` of the ranks have been summed already, from zero, else `sum` is
// made here; values(rank, take) hands those of each other rank in turn to take(vector, x). Of every Ways
// vectors of values, the first has elements 0, Ways, 2 * Ways, ..., the next one 1, Ways + 1, ..., and so on:
// sums stay in this order while ranks are walked. Count: int64_t, or Known.
template <int Vecs, int Ways = 1, int First = 0, typename Count, typename Values>
GCK_INLINE void sum_block(const Run& run, int64_t i, Count ranks, Values values, Vec* sum) {
  const auto add_rank = [&](int64_t rank) { values(rank, [&](int v, Vec x) { sum[v] = add(sum[v], x); }); };
  const bool begun = First == 0 && !is_known<Count> && run.written;
  if (begun) {
    values(0, [&](int v, Vec x) { sum[v] = x; });
  } else if (First == 0) {
    for (int v = 0; v < Vecs; ++v) sum[v] = run.from ? load(run.from + i + v * kLanes) : set1(0.0f);
    if (run.from) {
      for (int v = 0; v < Vecs; v += Ways) take_apart<Ways>(sum + v);
    }
  }
  if constexpr (is_known<Count>) {  // not `written`
    add_known_ranks<First, Count::number>(add_rank);
  } else {
    for (int64_t rank = begun ? 1 : First; rank < ranks; ++rank) add_rank(rank);
  }
  for (int v = 0; v < Vecs; v += Ways) put_together<Ways>(sum + v);
  if (run.err) {
    for (int v = 0; v < Vecs; ++v) {
      __builtin_prefetch(run.err + i + kAskAhead + v * kLanes, 1);
      const Vec mean = run.exact ? mul(sum[v], set1(run.inverse)) : div(sum[v], set1(run.divisor));
      sum[v] = add(mean, load(run.err + i + v * kLanes));
    }
  }
  for (int v = 0; v < Vecs; ++v) {
    float* to = run.to + i + v * kLanes;
    run.past_caches ? store_past_caches(to, sum[v]) : store(to, sum[v]);
  }
}

// The same of elements [begin, end) of a run that is_copy, without asking at each block what is to be done.
template <int Vecs, int Ways = 1, typename Values>
inline void copy_blocks(const Run& run, int64_t begin, int64_t end, Values values) {
  const auto copy = [&]<bool PastCaches>() {
    for (int64_t i = begin; i < end; i += Vecs * kLanes) {
      Vec x[Vecs];
      values(i, [&](int v, Vec value) { x[v] = value; });
      for (int v = 0; v < Vecs; v += Ways) put_together<Ways>(x + v);
      for (int v = 0; v < Vecs; ++v) {
        float* to = run.to + i + v * kLanes;
        PastCaches ? store_past_caches(to, x[v]) : store(to, x[v]);
      }
    }
  };
  run.past_caches ? copy.template operator()<true>() : copy.template operator()<false>();
}

// Calls some(chunk_begin, chunk_end, run) for all of chunks [begin, end), which are whole, and all ranks, in
// the order that caches like.
template <typename Some>
inline void walk_ranks(const DecodeInto& into, int64_t ranks, int64_t chunk_size, int64_t begin, int64_t end,
                       Some some) {
  const int64_t tile = chunk_size < kSumTile ? kSumTile / chunk_size : 1;
  for (int64_t c = begin; c < end; c += tile) {
    const int64_t stop = c + tile < end ? c + tile : end;
    Run run{};
    run.from = into.add && !into.clear ? into.out : nullptr;
    run.to = into.out;
    run.written = !into.add;
    for (; run.first < ranks; run.first += kRanksTogether) {
      const bool last = ranks - run.first <= kRanksTogether;
      run.ranks = last ? ranks - run.first : kRanksTogether;
      run.past_caches = into.past_caches && last;
      some(c, stop, run);
      run.from = into.out;
    }
  }
  if (into.past_caches) order_stores();
}

// The same of a mean that is added to a residual.
template <typename Some>
inline void walk_mean(const MeanInto& into, int64_t ranks, int64_t chunk_size, int64_t begin, int64_t end,
                      Some some) {
  alignas(64) float sums[kMostOfTile];  // of all ranks but the last few
  const int64_t tile = chunk_size < kSumTile ? kSumTile / chunk_size : 1;
  for (int64_t c = begin; c < end; c += tile) {
    const int64_t stop = c + tile < end ? c + tile : end;
    // Where element 0 would lie; an address, not to be read.
    auto* const origin = reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(sums) -
                                                  sizeof(float) * static_cast<uintptr_t>(c * chunk_size));
    Run run{};
    run.to = origin;
    run.divisor = into.divisor;
    run.inverse = 1.0f / into.divisor;
    run.exact = (bits_of(into.divisor) & 0x7fffffu) == 0;  // a power of two
    for (; run.first < ranks; run.first += kRanksTogether) {
      const bool last = ranks - run.first <= kRanksTogether;
      run.ranks = last ? ranks - run.first : kRanksTogether;
      if (last) run.err = run.to = into.err;
      some(c, stop, run);
      run.from = origin;
    }
  }
}

// Up to so many ranks a reduction goes by kReduceTile. More ranks take so long that memory is kept busy by
// them alone, and a tile so small would have little of each rank, in too many places.
constexpr int64_t kFewRanks = 2 * kRanksTogether;

// Of chunks [begin, end): what calls make(first, last) for tiles of some, when it is called for each in turn.
template <typename Make>
inline auto tile_by_tile(int64_t chunk_size, int64_t ranks, int64_t begin, int64_t end, Make make) {
  const int64_t tile = ranks <= kFewRanks ? kReduceTile : kSumTile;
  const int64_t step = chunk_size < tile ? tile / chunk_size : 1;
  return [=](int64_t c) {
    if ((c - begin) % step == 0) make(c, c + step < end ? c + step : end);
  };
}

// A compressor's whole decode: `some` as for walk_ranks, and part(job, rank, chunk, valid, to) of one rank's
// last chunk that is cut short.
template <typename Job, typename Some, typename Part>
inline void decode_all(const Job& job, int64_t begin, int64_t end, Some some, Part part) {
  const DecodeInto& into = job.into;
  const int64_t whole = into.numel / job.chunk_size, at = whole * job.chunk_size;
  walk_ranks(into, job.ranks, job.chunk_size, begin, end < whole ? end : whole, some);
  if (end <= whole) return;
  alignas(64) float sum[kMostOfTile] = {};
  const auto nbytes = sizeof(float) * static_cast<size_t>(into.numel - at);
  if (!into.clear) std::memcpy(sum, into.out + at, nbytes);
  for (int64_t rank = 0; rank < job.ranks; ++rank) part(job, rank, whole, into.numel - at, sum);
  std::memcpy(into.out + at, sum, nbytes);
}

// The same of a mean that is added to a residual; job.into is of no account.
template <typename Job, typename Some, typename Part>
inline void add_mean_of_all(Job job, const MeanInto& into, int64_t begin, int64_t end, Some some, Part part) {
  const int64_t whole = into.numel / job.chunk_size, at = whole * job.chunk_size;
  if (!into.reading.is_plain()) {
    const int64_t first = begin * job.chunk_size, stop = end <= whole ? end * job.chunk_size : into.numel;
    residual_read(into.err + first, stop - first, into.reading);
  }
  walk_mean(into, job.ranks, job.chunk_size, begin, end < whole ? end : whole, some);
  if (end <= whole) return;
  alignas(64) float sum[kMostOfTile] = {};
  job.into = {sum, into.numel - at, 1.0f, false, true, false};
  for (int64_t rank = 0; rank < job.ranks; ++rank) part(job, rank, whole, into.numel - at, sum);
  for (int64_t i = at; i < into.numel; ++i) into.err[i] = sum[i - at] / into.divisor + into.err[i];
}

}  // namespace gck::GCK_ISA
