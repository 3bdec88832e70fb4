// A chunk stays in the nearest caches from the moment that acc is made until its residual is done:
// acc to err, with the positions of what reaches a key that the chunks before suggest; the exact k-th key
// among these; the selected entries to the row. Where too few or too many reach it, a threshold comes from
// the largest key of each group of elements: k groups reach it, so at least k elements do. No result depends
// on the guess.
#include "cpu/isa/chunk_topk.hpp"

#include "cpu/isa/chunk_values.hpp"
#include "cpu/isa/keys.hpp"
#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {
namespace {

// From this magnitude on (2^96), NaN, infinities and sums or roundings that overflow are possible.
constexpr int32_t kWildKey = (96 + 127) << 23;
constexpr int64_t kMaxDepth = 16;
constexpr int64_t kQuad = 4 * kLanes;  // elements that are looked at together

// Vectors whose lanes share a group: sixteen groups of `depth` elements each. About four groups an entry
// make the threshold tight; at least one is needed.
inline int64_t group_depth(int64_t chunk, int64_t k) {
  int64_t depth = 1;
  while (depth < kMaxDepth && 8 * depth * k <= chunk && 2 * depth * kLanes <= chunk) depth *= 2;
  return depth;
}

// How far below what is expected candidates begin. Differences of keys are ratios of magnitudes, more or
// less.
constexpr int32_t kLeastBelow = 1 << 14, kFirstBelow = 3 << 18, kMostBelow = 1 << 23;  // up to half of it

inline int32_t threshold_of(const ChunkGuess& guess) {
  if (guess.kth == 0) return INT32_MAX;
  return guess.kth - guess.below > 1 ? guess.kth - guess.below : 1;
}

// From a chunk with this k-th key, of which so many reached the threshold; useful are k to `most`.
inline void learn(ChunkGuess& guess, int32_t kth, int64_t candidates, int64_t k, int64_t most) {
  if (guess.kth == 0) {
    guess = {kth, kFirstBelow};
    return;
  }
  const bool useful = candidates >= k && candidates <= most;
  guess.kth = useful ? guess.kth + (kth - guess.kth) / 4 : kth;
  int32_t below = guess.below;
  below += candidates < k           ? below / 2
           : candidates < k + k / 4 ? below / 4
           : candidates > 2 * k     ? -below / 8
                                    : 0;
  guess.below = below < kLeastBelow ? kLeastBelow : below > kMostBelow ? kMostBelow : below;
}

// What is added to err: a gradient from element `at` on,
template <Dtype D>
struct Gradient {
  const void* grad;
  int64_t at;

  Vec take(int64_t i) const { return load_as<D>(grad, at + i); }
  void ask(int64_t i, const float* err) const {
    if ((at + i) % kPageEntries == 0) ask_for_pages<D>(grad, at + i, err + i);
  }
};

// or the mean of ranks, from a chunk's sums, which become zeros. Asks for half a chunk from `later` on,
// unless that is null.
template <bool Exact>
struct Means {
  float* sums;
  const float* later;
  Vec divisor, inverse;

  Vec take(int64_t i) const {
    const Vec sum = load(sums + i);
    store(sums + i, set1(0.0f));
    return Exact ? mul(sum, inverse) : div(sum, divisor);
  }
  void ask(int64_t i, const float*) const {
    if (later == nullptr || i % kQuad) return;
    __builtin_prefetch(later + i / 2, 1, 2);
    __builtin_prefetch(later + i / 2 + kLanes, 1, 2);
  }
};

// acc to err, with the largest key of each group. Returns the largest of all.
template <typename Source>
inline int32_t accumulate(const Source& source, float* err, int64_t chunk, int64_t depth, int32_t* maxima) {
  Vec all = set1(0.0f);
  for (int64_t i = 0; i < chunk; maxima += kLanes) {
    Vec best = set1(0.0f);
    for (int64_t stop = i + depth * kLanes; i < stop; i += kLanes) {
      const Vec acc = add(source.take(i), load(err + i));
      best = max_key(best, acc);
      store(err + i, acc);
      source.ask(i, err);
    }
    store(reinterpret_cast<float*>(maxima), best);
    all = max_key(all, best);
  }
  return largest_key(all);
}

// The same where groups are whole quadruples of vectors, with the positions of what reaches the threshold.
// `count` becomes how many there are; where they are more than `most`, some number above it.
template <typename Source>
inline int32_t accumulate_and_collect(const Source& source, float* err, int64_t chunk, int64_t depth,
                                      int32_t* maxima, int32_t threshold, uint32_t* positions, int64_t most,
                                      int64_t& count) {
  uint32_t *out = positions, *const last = positions + most;
  Vec all = set1(0.0f);
  for (int64_t i = 0; i < chunk; maxima += kLanes) {
    Vec best = set1(0.0f);
    for (int64_t stop = i + depth * kLanes; i < stop; i += kQuad) {
      source.ask(i, err);
      uint64_t bits = 0;
      for (int64_t lane = 0; lane < kQuad; lane += kLanes) {
        const Vec acc = add(source.take(i + lane), load(err + i + lane));
        store(err + i + lane, acc);
        best = max_key(best, acc);
        bits |= static_cast<uint64_t>(key_ge(acc, threshold)) << lane;
      }
      if (out <= last) out = put_positions(bits, i, out);
    }
    store(reinterpret_cast<float*>(maxima), best);
    all = max_key(all, best);
  }
  count = out - positions;
  return largest_key(all);
}

// `at_low` keys are >= low, which are at least k; `above` are >= high, which are fewer.
struct Bounds {
  int32_t low, high;
  int64_t at_low, above;
};

inline void split(Bounds& b, int32_t key, const float* x, int64_t count, int64_t k) {
  const int64_t reaching = count_reaching(x, count, key);
  const bool enough = reaching >= k;
  b.low = enough ? key : b.low;
  b.at_low = enough ? reaching : b.at_low;
  b.high = enough ? b.high : key;
  b.above = enough ? b.above : reaching;
}

// Halves the interval until at most k + slack keys of x reach its low end, or it has no inside.
inline void bisect(Bounds& b, const float* x, int64_t count, int64_t k, int64_t slack) {
  while (b.at_low > k + slack && b.high - b.low > 1) split(b, b.low + (b.high - b.low) / 2, x, count, k);
}

// Positions of the elements with key >= threshold, ascending; `out` has room for a vector more.
inline int64_t collect(const float* x, int64_t chunk, int32_t threshold, uint32_t* out) {
  uint32_t* const begin = out;
  for (int64_t i = 0; i < chunk; i += 4 * kLanes) {
    uint64_t bits = key_ge(load(x + i), threshold) | key_ge(load(x + i + kLanes), threshold) << kLanes;
    if (chunk - i > 2 * kLanes) {
      const uint64_t upper =
          key_ge(load(x + i + 2 * kLanes), threshold) | key_ge(load(x + i + 3 * kLanes), threshold) << kLanes;
      bits |= upper << 32;
    }
    if (__builtin_popcountll(bits) <= kLanes) {
      out = put_positions(bits, i, out);
      continue;
    }
    for (int64_t lane = 0; lane < kQuad; lane += kLanes) {
      const Mask some = static_cast<Mask>(bits >> lane) & 0xffffu;
      compress_index(out, some, static_cast<uint32_t>(i + lane));
      out += __builtin_popcount(some);
    }
  }
  return out - begin;
}

// Keeps the k largest of `count` candidates, in order; ties go to the lower index.
inline void keep_largest(uint32_t* positions, float* acc, int64_t count, const Bounds& exact, int64_t k) {
  int64_t kept = 0, quota = k - exact.above;
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec x = load(acc + j);
    const Mask live = count - j >= kLanes ? 0xffffu : (1u << (count - j)) - 1;
    const Mask reach = key_ge(x, exact.low) & live;
    Mask wins = reach;
    if (exact.at_low != k) {
      wins = key_ge(x, exact.low + 1) & live;
      for (Mask ties = reach & ~wins; ties && quota; ties &= ties - 1, --quota) wins |= ties & -ties;
    }
    compress(acc + kept, wins, x);
    compress_words(positions + kept, wins, positions + j, 0);
    kept += __builtin_popcount(wins);
  }
}

// One NaN, whatever made it; in err and in the keys.
void make_canonical(float* err, int64_t chunk, int32_t* maxima, int64_t groups) {
  const Vec nan = set1(float_of(kNanKey));
  for (int64_t i = 0; i < chunk; i += kLanes) {
    const Vec acc = load(err + i);
    store(err + i, select(is_nan(acc), nan, acc));
  }
  for (int64_t i = 0; i < groups; ++i) maxima[i] = maxima[i] < kNanKey ? maxima[i] : kNanKey;
}

// One chunk whose `err` and grad are whole; selects k <= job.k of its elements.
template <typename Source>
inline int64_t compress_chunk(const ChunkTopk& job, const ChunkScratch& s, const Source& source, float* err,
                              int64_t k, const ChunkRow& row) {
  const int64_t chunk = job.chunk_size, depth = group_depth(chunk, job.k), groups = chunk / depth;
  const int64_t most = 3 * job.k + kLanes;
  int32_t low = threshold_of(*s.guess);
  int64_t candidates = 0;
  int32_t top = depth * kLanes >= kQuad ? accumulate_and_collect(source, err, chunk, depth, s.maxima, low,
                                                                 s.positions, most, candidates)
                                        : accumulate(source, err, chunk, depth, s.maxima);
  const bool wild = top >= kWildKey;
  if (wild) {
    make_canonical(err, chunk, s.maxima, groups);
    top = top < kNanKey ? top : kNanKey;
  }
  const int64_t guessed = candidates;
  if (wild || candidates < k || candidates > most) {
    int32_t least = INT32_MAX;
    for (int64_t i = 0; i < groups; ++i) least = s.maxima[i] < least ? s.maxima[i] : least;
    Bounds rough{least, top + 1, groups, 0};
    bisect(rough, reinterpret_cast<const float*>(s.maxima), groups, k, k / 4);
    low = rough.low;
    candidates = collect(err, chunk, low, s.positions);
  }
  if (candidates == chunk) {
    std::memcpy(s.values, err, static_cast<size_t>(chunk) * sizeof(float));
  } else {
    for (int64_t j = 0; j < candidates; ++j) s.values[j] = err[s.positions[j]];
  }
  store(s.values + candidates, set1(0.0f));
  Bounds exact{low, top + 1, candidates, 0};
  // So many that most are equal, to what all reach.
  if (candidates > most) split(exact, low + 1, s.values, candidates, k);
  if (const int32_t middle = s.guess->kth; exact.low < middle && middle < exact.high)
    split(exact, middle, s.values, candidates, k);
  bisect(exact, s.values, candidates, k, 0);
  if (!wild) learn(*s.guess, exact.low, guessed, k, most);
  keep_largest(s.positions, s.values, candidates, exact, k);

  for (int64_t j = k; j < job.k; ++j) s.values[j] = 0.0f, s.positions[j] = 0;
  put_values(job, s, k, top, row);
  put_indices(job, s.positions, row);
  for (int64_t j = 0; j < k; ++j) err[s.positions[j]] = s.values[j] - s.decoded[j];
  return wild ? clear_nonfinite(err, chunk) : 0;
}

// On a copy of the chunk, a last one that is cut short, padded with zeros, which lose every tie.
template <typename Source>
int64_t compress_part(const ChunkTopk& job, const ChunkScratch& s, const Source& source, float* err,
                      int64_t valid, const ChunkRow& row) {
  std::memset(s.err, 0, static_cast<size_t>(job.chunk_size) * sizeof(float));
  std::memcpy(s.err, err, sizeof(float) * static_cast<size_t>(valid));
  const int64_t cleared = compress_chunk(job, s, source, s.err, valid < job.k ? valid : job.k, row);
  std::memcpy(err, s.err, sizeof(float) * static_cast<size_t>(valid));
  return cleared;
}

inline int64_t valid_of(const ChunkTopk& job, int64_t c) {
  const int64_t left = job.numel - c * job.chunk_size;
  return left < job.chunk_size ? left : job.chunk_size;
}

template <Dtype D>
int64_t compress_chunks(const ChunkTopk& job, const ChunkScratch& s, int64_t begin, int64_t end) {
  constexpr int64_t size = D == Dtype::fp32 ? 4 : 2;
  int64_t cleared = 0;
  for (int64_t c = begin; c < end; ++c) {
    const int64_t at = c * job.chunk_size, valid = valid_of(job, c);
    float* err = job.err + at;
    if (valid == job.chunk_size) {
      cleared += compress_chunk(job, s, Gradient<D>{job.grad, at}, err, job.k, row_of(job, c));
      continue;
    }
    std::memset(s.grad, 0, static_cast<size_t>(job.chunk_size) * sizeof(float));
    std::memcpy(s.grad, static_cast<const char*>(job.grad) + at * size, static_cast<size_t>(valid * size));
    cleared += compress_part(job, s, Gradient<D>{s.grad, 0}, err, valid, row_of(job, c));
  }
  return cleared;
}

}  // namespace

int64_t chunk_topk_compress(const ChunkTopk& job, const ChunkScratch& scratch, int64_t begin, int64_t end) {
  return with_dtype(job.grad_dtype, [&]<Dtype D>() { return compress_chunks<D>(job, scratch, begin, end); });
}

int64_t chunk_topk_compress_mean(const ChunkTopk& job, const ChunkScratch& scratch, float* sums,
                                 float divisor, int64_t chunk, const float* later) {
  const auto compress = [&](const auto& means) {
    const int64_t valid = valid_of(job, chunk);
    float* err = job.err + chunk * job.chunk_size;
    if (valid < job.chunk_size) return compress_part(job, scratch, means, err, valid, row_of(job, chunk));
    return compress_chunk(job, scratch, means, err, job.k, row_of(job, chunk));
  };
  // The inverse of a power of two is exact: the product then rounds as the quotient does, and sooner.
  const bool exact = (bits_of(divisor) & 0x7fffffu) == 0;
  const Vec whole = set1(divisor), inverse = set1(1.0f / divisor);
  if (later != nullptr) later += job.chunk_size / 2;
  return exact ? compress(Means<true>{sums, later, whole, inverse})
               : compress(Means<false>{sums, later, whole, inverse});
}

}  // namespace gck::GCK_ISA
