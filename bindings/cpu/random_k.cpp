#include "cpu/random_k.hpp"

#include <algorithm>
#include <vector>

#include "cpu/copy.hpp"
#include "cpu/isa/leaves.hpp"
#include "cpu/round.hpp"
#include "cpu/scratch.hpp"
#include "cpu/threads.hpp"

namespace gck {
namespace {

constexpr int64_t kTile = 2048;   // elements that stay in the nearest cache until their picks are done
constexpr int64_t kBatch = 1024;  // strata whose numbers are drawn together

uint64_t number(uint64_t seed, uint64_t i) {
  uint64_t drawn[kDrawn];
  leaves().random_k_draw(seed, i / kDrawn * kDrawn, 1, drawn);
  return drawn[i % kDrawn];
}

int64_t chosen(const Strata& s, int64_t i) {
  return s.begin(i) + scaled(number(s.seed, static_cast<uint64_t>(i)), s.length(i));
}

// The picks among neighbouring elements of the vector, whose strata are neighbours too.
struct Batch {
  Range elements;
  int64_t ring;             // position of element 0, were it on the ring: element x is at x + ring
  int64_t stratum, strata;  // that have elements here
  const int64_t* picks;     // elements, ascending
  int64_t count;
  int64_t rank;     // of the first pick
  int64_t skipped;  // strata before that of the first pick: 0 or 1
};

// Tiles end at multiples of their length, so that vectors lie within lines of memory.
int64_t tile_end(int64_t at, const Batch& b) { return std::min((at / kTile + 1) * kTile, b.elements.end); }

// Calls f(batch) for the elements of `part`, in order.
template <typename F>
void for_each_batch(const Strata& s, Range part, F f) {
  int64_t drawn[kBatch + kDrawn];
  // Where the ring is cut open, at element `rotation`, neighbours in the vector are none on the ring.
  const Range sides[2] = {{part.begin, std::min(part.end, s.rotation)},
                          {std::max(part.begin, s.rotation), part.end}};
  for (const Range& side : sides) {
    if (side.begin >= side.end) continue;
    const int64_t ring = side.begin < s.rotation ? s.numel - s.rotation : -s.rotation;
    const int64_t last = s.of(side.end - 1 + ring);
    int64_t at = side.begin;
    for (int64_t i = s.of(side.begin + ring); i <= last;) {
      const int64_t aligned = i / kDrawn * kDrawn, stop = std::min(aligned + kBatch, last + 1);
      leaves().random_k_picks(s.seed, aligned, stop - aligned, s.size, s.longer, s.begin(aligned) - ring,
                              drawn);
      const int64_t *picks = drawn + (i - aligned), count = stop - i;
      const Range elements{at, std::min(s.begin(stop) - ring, side.end)};
      // Only of a stratum that another part, or the other side, has the rest of.
      const int64_t before = picks[0] < elements.begin, after = picks[count - 1] >= elements.end;
      const int64_t here = std::max<int64_t>(count - before - after, 0);
      f(Batch{elements, ring, i, count, picks + before, here, s.rank((i + before) % s.k), before});
      at = elements.end;
      i = stop;
    }
  }
}

// A part's work on its elements, and what it must leave to others.
struct Part {
  explicit Part(Range mine) : elements(mine), read(mine.begin), left(mine.begin) {}

  Range elements;
  // With options: up to where err has been read, and up to where what stays has been added up.
  int64_t read, left;
  int64_t cleared = 0;
  // Strata with something that is not finite here, and the pick elsewhere: at most the first and the last of
  // each side.
  int64_t spoilt[4];
  int spoilt_count = 0;
};

template <Dtype D>
struct Compress {
  const RandomKJob& job;
  const Strata& strata;
  ResidualPass& residual;

  void run(Part& part) const {
    for_each_batch(strata, part.elements, [&](const Batch& b) { batch(b, part); });
  }

  // Before elements up to `stop` are added, in whole blocks: they stay in the cache until they are.
  void read(Part& part, int64_t stop) const {
    const int64_t width = job.grad_dtype == Dtype::fp32 ? 4 : 2;
    while (!residual.idle() && part.read < stop) {
      const int64_t at = part.read, count = std::min(kResidualTile, part.elements.end - at);
      residual.before(static_cast<const char*>(job.grad) + at * width, job.grad_dtype, job.err + at, at,
                      count);
      part.read += count;
    }
  }

  // When those up to `stop` are done, but for entries that are spoilt later.
  void leave(Part& part, int64_t stop) const {
    const int64_t upto = stop == part.elements.end ? stop : stop / kBlock * kBlock;
    if (!residual.measures() || upto <= part.left) return;
    residual.after(job.err + part.left, part.left, upto - part.left);
    part.left = upto;
  }

  void batch(const Batch& b, Part& part) const {
    const Leaves& isa = leaves();
    float acc[kBatch + 16] = {};  // of the picks, then what is left of them
    bool bad[kBatch], any_bad = false;
    int64_t c = 0;
    for (int64_t at = b.elements.begin, stop; at < b.elements.end; at = stop) {
      stop = tile_end(at, b);
      read(part, stop);
      const bool finite = isa.random_k_add(job.grad, job.grad_dtype, job.err, at, stop);
      const int64_t first = c;
      for (; c < b.count && b.picks[c] < stop; ++c) acc[c - first] = job.err[b.picks[c]];
      part.cleared += isa.random_k_send(acc, c - first, job.factor, job.values, D, b.rank + first);
      for (int64_t j = first; j < c; ++j) job.err[b.picks[j]] = acc[j - first];
      if (!finite) {
        if (!any_bad) std::fill_n(bad, b.strata, false);
        any_bad = true;
        for (int64_t x = at; x < stop; ++x) {
          if (key_of(job.err[x]) < kInfKey) continue;
          job.err[x] = 0.0f;
          ++part.cleared;
          bad[strata.of(x + b.ring) - b.stratum] = true;
        }
      }
      leave(part, stop);
    }
    for (int64_t i = 0; any_bad && i < b.strata; ++i) {
      if (!bad[i]) continue;
      const int64_t j = i - b.skipped;
      if (j >= 0 && j < b.count) {
        part.cleared += spoil(b.picks[j], b.rank + j, part.left);
      } else {
        part.spoilt[part.spoilt_count++] = b.stratum + i;
      }
    }
  }

  // Sends element x as NaN, unless what it was sent as is not finite; returns whether its residual was
  // cleared. What stays has been added up as far as `left`.
  bool spoil(int64_t x, int64_t rank, int64_t left) const {
    if (key_of(load_widened(job.values, D, rank)) >= kInfKey) return false;
    store_rounded(job.values, D, rank, float_of(kNanKey));
    job.err[x] = 0.0f;
    const int64_t block = x / kBlock * kBlock;
    if (block < left) residual.after(job.err + block, block, std::min(kBlock, strata.numel - block));
    return true;
  }
};

template <Dtype D>
int64_t compress(const RandomKJob& job, const Strata& strata, const ResidualOptions& options, int threads) {
  ResidualPass residual(strata.numel, options);
  const Compress<D> work{job, strata, residual};
  const int count = parts_for(strata.numel, threads);
  const int64_t unit = residual.idle() ? 16 : kBlock;
  std::vector<Part> parts;
  for (int t = 0; t < count; ++t) parts.emplace_back(part_of(strata.numel, count, t, unit));
  for_each_part(count, [&](int t) { work.run(parts[static_cast<size_t>(t)]); });
  int64_t cleared = 0;
  for (const Part& part : parts) {
    cleared += part.cleared;
    for (int i = 0; i < part.spoilt_count; ++i) {
      const int64_t stratum = part.spoilt[i], x = strata.element(chosen(strata, stratum));
      cleared += work.spoil(x, strata.rank(stratum), strata.numel);
    }
  }
  residual.finish(strata.k);
  return cleared;
}

template <Dtype D>
void decompress(const RandomKDecode& job, const Strata& strata, Range part, bool past_caches) {
  const Leaves& isa = leaves();
  if (job.clear) populate_fresh(job.out, part.begin, part.end);
  alignas(64) float tile[kTile] = {};
  for_each_batch(strata, part, [&](const Batch& b) {
    int64_t c = 0;
    for (int64_t at = b.elements.begin, stop; at < b.elements.end; at = stop) {
      stop = tile_end(at, b);
      const int64_t first = c;
      while (c < b.count && b.picks[c] < stop) ++c;
      float* place = job.clear ? tile : job.out + at;
      for (int64_t row = 0; row < job.ranks; ++row) {
        const char* values = job.values[row];
        const float alpha = job.alpha.of(row);
        for (int64_t j = first; j < c; ++j) {
          const float value = alpha * load_widened(values, D, b.rank + j);
          float& x = place[b.picks[j] - at];
          x = job.add ? x + value : value;
        }
      }
      if (job.clear) isa.sparse_move_out(tile, job.out + at, stop - at, 1.0f, past_caches);
    }
  });
  if (job.clear) isa.sparse_settle();
}

}  // namespace

Strata::Strata(int64_t numel_, int64_t k_, uint64_t seed_)
    : numel(numel_), k(k_), seed(seed_), size(numel_ / k_), longer(numel_ % k_) {
  rotation = scaled(number(seed, ~uint64_t{1}), numel);
  first = 0;
  if (rotation == 0) return;
  // Where the vector starts, in the midst of the ring: the stratum there has its entry before or behind.
  const int64_t start = numel - rotation, cut = of(start);
  first = chosen(*this, cut) >= start ? cut : cut + 1;
}

int64_t random_k_compress(const RandomKJob& job, const Strata& strata, const ResidualOptions& options,
                          int threads) {
  switch (job.value_dtype) {
    case Dtype::bf16:
      return compress<Dtype::bf16>(job, strata, options, threads);
    case Dtype::fp16:
      return compress<Dtype::fp16>(job, strata, options, threads);
    default:
      return compress<Dtype::fp32>(job, strata, options, threads);
  }
}

void random_k_decompress(const RandomKDecode& job, const Strata& strata, int threads) {
  const int parts = parts_for(strata.numel, threads);
  const bool past_caches = is_past_caches(strata.numel, threads);
  for_each_part(parts, [&](int t) {
    const Range part = part_of(strata.numel, parts, t, 16);
    switch (job.value_dtype) {
      case Dtype::bf16:
        return decompress<Dtype::bf16>(job, strata, part, past_caches);
      case Dtype::fp16:
        return decompress<Dtype::fp16>(job, strata, part, past_caches);
      default:
        return decompress<Dtype::fp32>(job, strata, part, past_caches);
    }
  });
}

void random_k_indices(const Strata& strata, int64_t begin, int64_t end, int64_t* out) {
  for (int64_t rank = begin; rank < end; ++rank) {
    const int64_t i = strata.first + rank;
    *out++ = strata.element(chosen(strata, i < strata.k ? i : i - strata.k));
  }
}

}  // namespace gck
