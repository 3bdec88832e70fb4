#include "cpu/isa/topk.hpp"

#include "cpu/isa/keys.hpp"
#include "cpu/isa/left.hpp"
#include "cpu/isa/ranks.hpp"
#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {
namespace {

constexpr int kPair = 2 * kLanes;   // entries between two looks whether any of them is wanted
constexpr int kBlock = 4 * kLanes;  // bits of a mask
// How the wanted lanes of a vector are taken together: by an instruction; by looking permutations up in a
// table, which is worth a branch where there is nothing to take; or one by one.
enum class Take { instruction, table, one_by_one };
#if defined(GCK_AVX512)
constexpr Take kTake = Take::instruction;
#elif defined(GCK_AVX2) || defined(GCK_NEON)
constexpr Take kTake = Take::table;
#else
constexpr Take kTake = Take::one_by_one;
#endif

// Appends the lanes in `m`; there is room for a vector.
inline int64_t put(const Candidates& out, int64_t count, Mask m, Vec acc, int64_t at) {
  compress(out.values + count, m, canonical(acc));
  compress_index(out.indices + count, m, static_cast<uint32_t>(at));
  return count + __builtin_popcount(m);
}

// Lists entries of a tile that lies in err already, at positions behind those that are listed. One by one,
// and without a branch that depends on whether an entry wins, where winners leave nothing.
inline void put_listed(const Candidates& out, int64_t begin, int64_t end, float* err, int32_t expected,
                       Dtype value_dtype) {
  if (value_dtype != Dtype::fp32) {
    for (int64_t j = begin; j < end; ++j) {
      float& place = err[out.indices[j]];
      const float acc = place;
      out.values[j] = acc == acc ? acc : float_of(kNanKey);
      if (key_of(acc) >= expected) place = left_by(acc, value_dtype);
    }
    return;
  }
  for (int64_t j = begin; j < end; ++j) {
    float& place = err[out.indices[j]];
    const float acc = place;
    const auto stays = static_cast<uint32_t>(-static_cast<int32_t>(key_of(acc) < expected));
    out.values[j] = acc == acc ? acc : float_of(kNanKey);
    place = float_of(bits_of(acc) & stays);
  }
}

template <Dtype D, bool kGrad>
inline Vec accumulated(const void* grad, const float* err, int64_t i) {
  if constexpr (kGrad) return add(load_as<D>(grad, i), load(err + i));
  return load(err + i);
}

// The mask of four vectors, whose sum with grad is left in err.
template <Dtype D, bool kGrad, bool kTies>
inline uint64_t add_block(const void* grad, float* err, int64_t at, int32_t threshold, int64_t& ties) {
  uint64_t reach = 0;
  for (int64_t lane = 0; lane < kBlock; lane += kPair) {
    const int64_t i = at + lane;
    Vec a = accumulated<D, kGrad>(grad, err, i), b = accumulated<D, kGrad>(grad, err, i + kLanes);
    if constexpr (kTies) a = canonical(a), b = canonical(b);
    store(err + i, a);
    store(err + i + kLanes, b);
    const uint64_t in = key_ge(a, threshold) | key_ge(b, threshold) << kLanes;
    if constexpr (kTies) {
      ties += __builtin_popcount(key_ge(a, threshold - 1) | key_ge(b, threshold - 1) << kLanes);
      ties -= __builtin_popcountll(in);
    }
    reach |= in << lane;
  }
  return reach;
}

// The same of a tile of kPageEntries where most vectors hold some to list.
template <Dtype D, bool kGrad>
inline int64_t list_dense_tile(const void* grad, float* err, int64_t at, Guess guess, Dtype value_dtype,
                               const Candidates& out) {
  int64_t listed = out.count;
  for (int64_t i = at; i < at + kPageEntries; i += kLanes) {
    const Vec acc = accumulated<D, kGrad>(grad, err, i);
    listed = put(out, listed, key_ge(acc, guess.threshold), acc, i);
    store(err + i, select(key_ge(acc, guess.expected), left_by(canonical(acc), value_dtype), acc));
  }
  return listed;
}

template <Dtype D, bool kGrad, bool kTies>
inline int64_t list_tile(const void* grad, float* err, int64_t at, Guess guess, Dtype value_dtype,
                         Candidates& out) {
  uint32_t* end = out.indices + out.count;
  for (int64_t i = at; i < at + kPageEntries; i += kBlock) {
    end = put_positions(add_block<D, kGrad, kTies>(grad, err, i, guess.threshold, out.ties), i, end);
  }
  const int64_t listed = end - out.indices;
  put_listed(out, out.count, listed, err, guess.expected, value_dtype);
  return listed;
}

// Tiles of kPageEntries, without a branch that the entries decide; returns where those end that fit into
// count and whose entries surely fit into the list.
template <Dtype D, bool kGrad, bool kTies, bool kDense>
int64_t stream_tiles(const void* grad, float* err, int64_t count, Guess guess, Dtype value_dtype,
                     Candidates& out) {
  int64_t at = 0;
  if (kDense && kTake == Take::table) return at;
  for (; at + kPageEntries <= count && out.count + kPageEntries + kBlock <= out.capacity;
       at += kPageEntries) {
    ask_for_pages<D>(grad, at, err + at);
    if constexpr (kDense && kTake == Take::instruction) {
      out.count = list_dense_tile<D, kGrad>(grad, err, at, guess, value_dtype, out);
    } else {
      out.count = list_tile<D, kGrad, kTies>(grad, err, at, guess, value_dtype, out);
    }
  }
  return at;
}

template <Dtype D, bool kGrad, bool kTies, bool kDense>
void stream(const void* grad, float* err, int64_t count, Guess guess, Dtype value_dtype, Candidates& out) {
  int64_t i = stream_tiles<D, kGrad, kTies, kDense>(grad, err, count, guess, value_dtype, out);
  const int32_t threshold = guess.threshold, expected = guess.expected;
  int64_t listed = out.count, ties = 0;
  for (; i + kPair <= count; i += kPair) {
    if (i % kPageEntries == 0) ask_for_pages<D>(grad, i, err + i);
    Vec a = accumulated<D, kGrad>(grad, err, i), b = accumulated<D, kGrad>(grad, err, i + kLanes);
    if constexpr (kTies) a = canonical(a), b = canonical(b);
    if constexpr (kTies) {
      ties += __builtin_popcount(key_ge(a, threshold - 1) ^ key_ge(a, threshold));
      ties += __builtin_popcount(key_ge(b, threshold - 1) ^ key_ge(b, threshold));
    }
    if (any_key_ge(a, b, threshold)) {
      if (listed + kPair > out.capacity) {
        out.overflow = true;
      } else {
        listed = put(out, listed, key_ge(a, threshold), a, i);
        listed = put(out, listed, key_ge(b, threshold), b, i + kLanes);
        a = select(key_ge(a, expected), left_by(canonical(a), value_dtype), a);
        b = select(key_ge(b, expected), left_by(canonical(b), value_dtype), b);
      }
    }
    store(err + i, a);
    store(err + i + kLanes, b);
  }
  for (; i < count; i += kLanes) {
    const int rest = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    const Mask live = (1u << rest) - 1;
    Vec acc = load_part<Dtype::fp32>(err, i, rest);
    if constexpr (kGrad) acc = add(load_part<D>(grad, i, rest), acc);
    if constexpr (kTies) acc = canonical(acc);
    const Mask in = key_ge(acc, threshold) & live;
    if constexpr (kTies) ties += __builtin_popcount((key_ge(acc, threshold - 1) & live) ^ in);
    if (in && listed + kPair > out.capacity) {
      out.overflow = true;
    } else if (in) {
      listed = put(out, listed, in, acc, i);
      acc = select(key_ge(acc, expected), left_by(canonical(acc), value_dtype), acc);
    }
    store_part(err + i, acc, rest);
  }
  out.count = listed;
  out.ties += ties;
}

// Lists what `stream` would list, and leaves err alone.
template <Dtype D, bool kDense>
void look_through(const void* grad, const float* err, int64_t count, int32_t threshold, Candidates& out) {
  alignas(64) float block[kPair];
  int64_t listed = out.count, i = 0;
  for (; i + kPair <= count; i += kPair) {
    if (i % kPageEntries == 0) ask_for_pages<D>(grad, i, err + i);
    const Vec a = accumulated<D, true>(grad, err, i), b = accumulated<D, true>(grad, err, i + kLanes);
    if (!any_key_ge(a, b, threshold)) continue;
    if (listed + kPair > out.capacity) {
      out.overflow = true;
      break;
    }
    const Mask in_a = key_ge(a, threshold), in_b = key_ge(b, threshold);
    if constexpr (kDense) {
      listed = put(out, put(out, listed, in_a, a, i), in_b, b, i + kLanes);
    } else {
      store(block, canonical(a));
      store(block + kLanes, canonical(b));
      for (Mask m = in_a | in_b << kLanes; m; m &= m - 1, ++listed) {
        const int lane = __builtin_ctz(m);
        out.values[listed] = block[lane];
        out.indices[listed] = static_cast<uint32_t>(i + lane);
      }
    }
  }
  for (; i < count && !out.overflow; i += kLanes) {
    const int rest = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    const Vec acc = add(load_part<D>(grad, i, rest), load_part<Dtype::fp32>(err, i, rest));
    const Mask in = key_ge(acc, threshold) & ((1u << rest) - 1);
    out.overflow = in && listed + kPair > out.capacity;
    if (!out.overflow) listed = put(out, listed, in, acc, i);
  }
  out.count = listed;
}

template <Dtype D>
void maxima_of(const void* grad, float* err, int64_t count, int64_t vectors, float* maxima) {
  for (int64_t first = 0; first < count; first += vectors * kLanes, maxima += kLanes) {
    const int64_t end = first + vectors * kLanes < count ? first + vectors * kLanes : count;
    Vec largest = set1(0.0f);
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) {
      const Vec acc = add(load_as<D>(grad, i), load(err + i));
      store(err + i, acc);
      largest = max_key(largest, canonical(acc));
    }
    if (const int rest = static_cast<int>(end - i)) {
      const Vec acc = add(load_part<D>(grad, i, rest), load_part<Dtype::fp32>(err, i, rest));
      store_part(err + i, acc, rest);
      largest = max_key(largest, canonical(acc));
    }
    store(maxima, largest);
  }
}

template <Dtype D>
void add_all(const void* grad, const float* err, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, add(load_as<D>(grad, i), load(err + i)));
  if (const int rest = static_cast<int>(count - i)) {
    store_part(out + i, add(load_part<D>(grad, i, rest), load_part<Dtype::fp32>(err, i, rest)), rest);
  }
}

}  // namespace

void topk_stream(const void* grad, Dtype dtype, float* err, int64_t count, Guess guess, Dtype value_dtype,
                 Candidates* out) {
  with_dtype(dtype, [&]<Dtype D>() {
    const auto run = [&]<bool kGrad>() {
      // Where ties are counted few entries are listed, or a vector's worth at a time.
      guess.ties    ? stream<D, kGrad, true, false>(grad, err, count, guess, value_dtype, *out)
      : guess.dense ? stream<D, kGrad, false, true>(grad, err, count, guess, value_dtype, *out)
                    : stream<D, kGrad, false, false>(grad, err, count, guess, value_dtype, *out);
    };
    grad == nullptr ? run.template operator()<false>() : run.template operator()<true>();
  });
}

void topk_look(const void* grad, Dtype dtype, const float* err, int64_t count, Guess guess, Candidates* out) {
  with_dtype(dtype, [&]<Dtype D>() {
    guess.dense ? look_through<D, true>(grad, err, count, guess.threshold, *out)
                : look_through<D, false>(grad, err, count, guess.threshold, *out);
  });
}

void topk_maxima(const void* grad, Dtype dtype, float* err, int64_t count, int64_t vectors, float* maxima) {
  with_dtype(dtype, [&]<Dtype D>() { maxima_of<D>(grad, err, count, vectors, maxima); });
}

int64_t topk_collect(const float* x, int64_t count, int32_t threshold, float* out) {
  int64_t listed = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec acc = load(x + i);
    if (const Mask m = key_ge(acc, threshold)) {
      compress(out + listed, m, canonical(acc));
      listed += __builtin_popcount(m);
    }
  }
  return listed;
}

int64_t topk_squares(const float* x, int64_t lines, int32_t threshold) {
  static_assert(kLanes == 16);  // a line's entries
  int64_t squares = 0;
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t hits = __builtin_popcount(key_ge(canonical(load(x + line * kLanes)), threshold));
    squares += hits * hits;
  }
  return squares;
}

int64_t topk_split(const float* x, int64_t count, int32_t low, int32_t high, int32_t* keys, int64_t* inside) {
  int64_t above = 0, listed = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Mask live = count - i >= kLanes ? 0xffffu : (1u << (count - i)) - 1;
    const Vec acc = load(x + i);  // lists have room for a whole vector
    const Mask over = key_ge(acc, high) & live, in = key_ge(acc, low) & live & ~over;
    above += __builtin_popcount(over);
    if (in) {
      compress(reinterpret_cast<float*>(keys + listed), in, abs(acc));
      listed += __builtin_popcount(in);
    }
  }
  *inside = listed;
  return above;
}

int32_t topk_kth(const float* x, int64_t count, int64_t rank, int64_t slack) {
  return count <= kFewest ? kth_of_fewest(x, count, rank) : bisected(x, count, rank, slack);
}

int64_t topk_clear(float* x, int64_t count) { return clear_nonfinite(x, count); }

void add_to(const void* grad, Dtype dtype, const float* err, int64_t count, float* out) {
  with_dtype(dtype, [&]<Dtype D>() { add_all<D>(grad, err, count, out); });
}

}  // namespace gck::GCK_ISA
