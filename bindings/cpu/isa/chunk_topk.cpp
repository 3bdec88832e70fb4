// A chunk stays in the nearest caches from the moment that acc is made until its residual is done:
// acc to err with the largest key of each group of elements; a threshold that k groups reach, so at least
// k elements do; the positions of those; the exact k-th key among them; the selected entries to the row.
#include "cpu/isa/chunk_topk.hpp"

#include "cpu/isa/chunk_values.hpp"
#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {
namespace {

// From this magnitude on (2^96), NaN, infinities and sums or roundings that overflow are possible.
constexpr int32_t kWildKey = (96 + 127) << 23;
constexpr int64_t kMaxDepth = 16;
// What is fetched ahead of the next chunk; the hardware does well where it reads on and on.
constexpr int64_t kAhead = 4096;

// Vectors whose lanes share a group: sixteen groups of `depth` elements each. About four groups an entry
// make the threshold tight; at least one is needed.
inline int64_t group_depth(int64_t chunk, int64_t k) {
  int64_t depth = 1;
  while (depth < kMaxDepth && 8 * depth * k <= chunk && 2 * depth * kLanes <= chunk) depth *= 2;
  return depth;
}

template <Dtype D>
inline void accumulate(const void* grad, int64_t at, float* err, int64_t chunk, int64_t depth,
                       int32_t* maxima) {
  constexpr int64_t size = D == Dtype::fp32 ? 4 : 2;
  [[maybe_unused]] const auto next =
      reinterpret_cast<uintptr_t>(grad) + static_cast<uintptr_t>((at + chunk) * size);
  for (int64_t i = 0; i < chunk; maxima += kLanes) {
    Vec best = set1(0.0f);
    for (int64_t stop = i + depth * kLanes; i < stop; i += kLanes) {
      const Vec acc = add(load_as<D>(grad, at + i), load(err + i));
      best = max_key(best, acc);
      if constexpr (D == Dtype::none) continue;
      store(err + i, acc);
      if (i < kAhead)
        __builtin_prefetch(reinterpret_cast<const void*>(next + static_cast<uintptr_t>(i * size)), 0, 2);
    }
    store(reinterpret_cast<float*>(maxima), best);
  }
}

inline int64_t count_reaching(const int32_t* keys, int64_t count, int32_t threshold) {
  int32_t reaching = 0;
  for (int64_t i = 0; i < count; ++i) reaching += keys[i] >= threshold;
  return reaching;
}

// `at_low` keys are >= low, which are at least k; `above` are >= high, which are fewer.
struct Bounds {
  int32_t low, high;
  int64_t at_low, above;
};

// Halves the interval until at most k + slack keys reach its low end, or it has no inside.
inline void bisect(Bounds& b, const int32_t* keys, int64_t count, int64_t k, int64_t slack) {
  while (b.at_low > k + slack && b.high - b.low > 1) {
    const int32_t middle = b.low + (b.high - b.low) / 2;
    const int64_t reaching = count_reaching(keys, count, middle);
    if (reaching >= k) {
      b.low = middle;
      b.at_low = reaching;
    } else {
      b.high = middle;
      b.above = reaching;
    }
  }
}

// Positions of the elements with key >= threshold, ascending; `out` has room for 3 more.
inline int64_t collect(const float* x, int64_t chunk, int32_t threshold, uint32_t* out) {
  uint32_t* const begin = out;
  for (int64_t i = 0; i < chunk; i += 4 * kLanes) {
    uint64_t bits = key_ge(load(x + i), threshold) | key_ge(load(x + i + kLanes), threshold) << kLanes;
    if (chunk - i > 2 * kLanes) {
      const uint64_t upper =
          key_ge(load(x + i + 2 * kLanes), threshold) | key_ge(load(x + i + 3 * kLanes), threshold) << kLanes;
      bits |= upper << 32;
    }
    if (i < kAhead) {
      for (int64_t line = 0; line < 4 * kLanes; line += kLanes)
        __builtin_prefetch(x + chunk + i + line, 1, 2);
    }
    // Four at a time without a branch: fewer than two are usual.
    const int found = __builtin_popcountll(bits);
    uint32_t* at = out;
    do {
      for (int j = 0; j < 4; ++j) {
        *at++ = static_cast<uint32_t>(i) + lowest_bit(bits);
        bits &= bits - 1;
      }
    } while (bits);
    out += found;
  }
  return out - begin;
}

// Keeps the positions of the k largest of `count` candidates, in order; ties go to the lower index.
inline void keep_largest(uint32_t* positions, const int32_t* keys, int64_t count, const Bounds& exact,
                         int64_t k) {
  int64_t kept = 0;
  if (exact.at_low == k) {
    for (int64_t j = 0; j < count; ++j) {
      positions[kept] = positions[j];
      kept += keys[j] >= exact.low;
    }
    return;
  }
  int64_t quota = k - exact.above;
  for (int64_t j = 0; j < count; ++j) {
    const bool tie = keys[j] == exact.low && quota > 0;
    positions[kept] = positions[j];
    kept += keys[j] > exact.low || tie;
    quota -= tie;
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

int64_t clear_nonfinite(float* err, int64_t chunk) {
  int64_t cleared = 0;
  for (int64_t i = 0; i < chunk; i += kLanes) {
    const Vec x = load(err + i);
    const Mask wild = key_ge(x, kInfKey);
    if (!wild) continue;
    store(err + i, select(wild, set1(0.0f), x));
    cleared += __builtin_popcount(wild);
  }
  return cleared;
}

// One chunk whose `err` and grad are whole; selects k <= job.k of its elements.
template <Dtype D>
inline int64_t compress_chunk(const ChunkTopk& job, const ChunkScratch& s, const void* grad, int64_t at,
                              float* err, int64_t k, const ChunkRow& row) {
  const int64_t chunk = job.chunk_size, depth = group_depth(chunk, job.k), groups = chunk / depth;
  accumulate<D>(grad, at, err, chunk, depth, s.maxima);
  int32_t least = INT32_MAX, top = 0;
  for (int64_t i = 0; i < groups; ++i) {
    least = s.maxima[i] < least ? s.maxima[i] : least;
    top = s.maxima[i] > top ? s.maxima[i] : top;
  }
  const bool wild = top >= kWildKey;
  if (wild) {
    make_canonical(err, chunk, s.maxima, groups);
    top = top < kNanKey ? top : kNanKey;
    least = least < kNanKey ? least : kNanKey;
  }
  Bounds rough{least, top + 1, groups, 0};
  bisect(rough, s.maxima, groups, k, k / 4);

  const int64_t candidates = collect(err, chunk, rough.low, s.positions);
  for (int64_t j = 0; j < candidates; ++j) s.keys[j] = key_of(err[s.positions[j]]);
  Bounds exact{rough.low, top + 1, candidates, 0};
  bisect(exact, s.keys, candidates, k, 0);
  keep_largest(s.positions, s.keys, candidates, exact, k);

  for (int64_t j = 0; j < k; ++j) s.values[j] = err[s.positions[j]];
  for (int64_t j = k; j < job.k; ++j) s.values[j] = 0.0f, s.positions[j] = 0;
  put_values(job, s, k, top, row);
  put_indices(job, s.positions, row);
  for (int64_t j = 0; j < k; ++j) err[s.positions[j]] = s.values[j] - s.decoded[j];
  return wild ? clear_nonfinite(err, chunk) : 0;
}

template <Dtype D>
int64_t compress_chunks(const ChunkTopk& job, const ChunkScratch& s, int64_t begin, int64_t end) {
  constexpr int64_t size = D == Dtype::fp32 ? 4 : 2;
  int64_t cleared = 0;
  for (int64_t c = begin; c < end; ++c) {
    const int64_t at = c * job.chunk_size;
    const int64_t valid = job.numel - at < job.chunk_size ? job.numel - at : job.chunk_size;
    const ChunkRow row = row_of(job, c);
    if (valid == job.chunk_size) {
      cleared += compress_chunk<D>(job, s, job.grad, at, job.err + at, job.k, row);
      continue;
    }
    // The last chunk, cut short: on a copy padded with zeros, which lose every tie.
    std::memset(s.err, 0, static_cast<size_t>(job.chunk_size) * sizeof(float));
    std::memset(s.grad, 0, static_cast<size_t>(job.chunk_size) * sizeof(float));
    std::memcpy(s.err, job.err + at, sizeof(float) * static_cast<size_t>(valid));
    if constexpr (D != Dtype::none) {  // else there is no memory behind job.grad
      std::memcpy(s.grad, static_cast<const char*>(job.grad) + at * size, static_cast<size_t>(valid * size));
    }
    cleared += compress_chunk<D>(job, s, s.grad, 0, s.err, valid < job.k ? valid : job.k, row);
    std::memcpy(job.err + at, s.err, sizeof(float) * static_cast<size_t>(valid));
  }
  return cleared;
}

}  // namespace

int64_t chunk_topk_compress(const ChunkTopk& job, const ChunkScratch& scratch, int64_t begin, int64_t end) {
  if (job.grad_dtype == Dtype::none) return compress_chunks<Dtype::none>(job, scratch, begin, end);
  return with_dtype(job.grad_dtype, [&]<Dtype D>() { return compress_chunks<D>(job, scratch, begin, end); });
}

}  // namespace gck::GCK_ISA
