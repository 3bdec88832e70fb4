#include "cpu/isa/sign.hpp"

#include "cpu/isa/rows.hpp"
#include "cpu/isa/sums.hpp"
#include "cpu/isa/tree.hpp"
#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {
namespace {

// Two runs of err are worked on together; apart by this many elements more than whole pages, so that a load
// is not taken for one of what was just stored (processors compare the lowest twelve bits of addresses).
constexpr int64_t kSkew = 256;

inline void put_bits(uint32_t* words, int64_t i, Mask m) {
  const auto half = static_cast<uint16_t>(m);
  std::memcpy(reinterpret_cast<char*>(words) + i / 8, &half, sizeof half);
}

// A chunk whose err still is acc, to become acc - decoded. Its scale is finite, and so is every residual.
struct Pending {
  float* err;
  int64_t count;
  Vec plus, minus;

  static Pending of(float* err, int64_t count, float scale) {
    return {err, count, set1(scale), set1(-scale)};
  }
  void subtract(int64_t i) const {
    const Vec acc = load(err + i);
    store(err + i, sub(acc, select(ge_zero(acc), plus, minus)));
  }
  void subtract_all() const {
    for (int64_t i = 0; i < count; i += kLanes) subtract(i);
  }
};

// acc of a vector, which err becomes; returns its magnitude. `last`, the chunk before, is finished meanwhile
// unless this is the `First`, so that memory never waits for a pass over what the caches hold.
template <Dtype D, bool First>
GCK_INLINE Vec take(const void* grad, int64_t at, float* err, uint32_t* words, int64_t chunk, int64_t i,
                    const Pending& last) {
  const Vec acc = add(load_as<D>(grad, at + i), load(err + i));
  if constexpr (D != Dtype::none) store(err + i, acc);
  put_bits(words, i, ge_zero(acc));
  if constexpr (!First) last.subtract((i + kSkew) & (chunk - 1));
  return abs(acc);
}

// From this size on, the first level of a chunk's sum would take too much of the nearest cache.
constexpr int64_t kLongChunk = 1024;

// err becomes acc; returns the sum of its magnitudes. Strictly upwards, since halves read side by side are
// streams that processors do not foresee, unless a near cache has them.
template <Dtype D, bool First, typename Size>
inline float accumulate(const void* grad, int64_t at, float* err, uint32_t* words, Size chunk,
                        const Pending& last) {
  const auto magnitude = [&](int64_t i) { return take<D, First>(grad, at, err, words, chunk, i, last); };
  if constexpr (is_short<Size>) return upward_sum<Size::number>(magnitude);
  alignas(64) float tree[kMaxChunk / 2];
  const int64_t half = chunk / 2;
  if (D == Dtype::none || chunk >= kLongChunk) {
    for (int64_t i = 0; i < chunk; i += kLanes) magnitude(i);
    return sum_of_magnitudes(err, chunk, tree);
  }
  for (int64_t i = 0; i < half; i += kLanes) store(tree + i, magnitude(i));
  for (int64_t i = 0; i < half; i += kLanes) store(tree + i, add(load(tree + i), magnitude(half + i)));
  return tree_sum(tree, half);
}

// From this size on, what is read again of a chunk is no longer in the nearest cache, or hardly so.
constexpr int64_t kVeryLongChunk = 2048;

// The same of such a chunk. `last` is finished beginning with what was touched last; while the second half is
// taken, the first one's magnitudes come from err.
template <Dtype D>
inline float accumulate_long(const void* grad, int64_t at, float* err, uint32_t* words, int64_t chunk,
                             const Pending& last) {
  alignas(64) float tree[kMaxChunk / 4];
  const int64_t half = chunk / 2, quarter = chunk / 4;
  const auto take = [&](int64_t i) {
    if (i % kPageEntries == 0) ask_for_pages<D>(grad, at + i, err + i);
    const Vec acc = add(load_as<D>(grad, at + i), load(err + i));
    store(err + i, acc);
    put_bits(words, i, ge_zero(acc));
    return abs(acc);
  };
  for (int64_t i = 0; i < half; i += kLanes) {
    take(i);
    if (last.count == 0) continue;
    last.subtract(chunk - kLanes - 2 * i);
    last.subtract(chunk - 2 * kLanes - 2 * i);
  }
  const auto both = [&](int64_t i) { return add(abs(load(err + i)), take(half + i)); };
  for (int64_t i = 0; i < quarter; i += kLanes) store(tree + i, both(i));
  for (int64_t i = 0; i < quarter; i += kLanes) store(tree + i, add(load(tree + i), both(quarter + i)));
  return tree_sum(tree, quarter);
}

// Calls make(c) before it looks at chunk c.
template <Dtype D, typename Make>
int64_t compress_chunks(const SignChunks& job, int64_t begin, int64_t end, Make make) {
  constexpr int64_t width = D == Dtype::fp32 ? 4 : 2;
  int64_t cleared = 0;
  Pending last = Pending::of(nullptr, 0, 0);
  Place place(job, begin);
  for (int64_t c = begin; c < end; ++c, place.next()) {
    make(c);
    const int64_t at = c * job.chunk_size;
    auto* words = reinterpret_cast<uint32_t*>(place.body) + place.slot * (job.chunk_size / 32);
    auto* scale = reinterpret_cast<float*>(place.body + job.scales_offset) + place.slot;
    float* err = job.err + at;
    const int64_t valid = job.numel - at < job.chunk_size ? job.numel - at : job.chunk_size;
    if (valid == job.chunk_size) {
      const bool very_long = D != Dtype::none && valid >= kVeryLongChunk;
      const auto sum_of = [&]<bool First>() {
        return with_size(
            valid, [&](auto size) { return accumulate<D, First>(job.grad, at, err, words, size, last); });
      };
      const float sum = very_long    ? accumulate_long<D>(job.grad, at, err, words, valid, last)
                        : last.count ? sum_of.template operator()<false>()
                                     : sum_of.template operator()<true>();
      *scale = canonical(sum / static_cast<float>(valid));
      last = Pending::of(err, valid, *scale);
      if (!is_finite(*scale)) {
        std::memset(err, 0, sizeof(float) * static_cast<size_t>(valid));
        cleared += valid;
        last.count = 0;
      }
      continue;
    }
    // The last chunk, cut short: on a copy padded with zeros, which add nothing to a sum of magnitudes.
    alignas(64) float part[kMaxChunk] = {};
    alignas(64) char grads[kMaxChunk * 4] = {};
    uint32_t bits[kMaxChunk / 32];
    std::memcpy(part, err, sizeof(float) * static_cast<size_t>(valid));
    if constexpr (D != Dtype::none) {  // else there is no memory behind job.grad
      std::memcpy(grads, static_cast<const char*>(job.grad) + at * width, static_cast<size_t>(valid * width));
    }
    const float sum = accumulate<D, true>(grads, 0, part, bits, job.chunk_size, last);
    *scale = canonical(sum / static_cast<float>(valid));
    if (is_finite(*scale)) {
      Pending::of(part, job.chunk_size, *scale).subtract_all();
      std::memcpy(err, part, sizeof(float) * static_cast<size_t>(valid));
    } else {
      std::memset(err, 0, sizeof(float) * static_cast<size_t>(valid));
      cleared += valid;
    }
    if (valid % 32) bits[valid / 32] &= (1u << valid % 32) - 1;
    std::memcpy(words, bits, sizeof(uint32_t) * static_cast<size_t>((valid + 31) / 32));
  }
  last.subtract_all();
  return cleared;
}

// The sums of the first ranks' signed scales, from zero, are one of thirty-two numbers by five signs, or one
// of sixteen by four: to begin a sum of more ranks with.
#if defined(GCK_AVX512)
template <int Ranks>
struct Begun {
  Vec low, high;  // by the first four signs, where the fifth is minus, and where it is plus

  void set(const float* scales) {
    constexpr Mask positive[4] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00};
    low = set1(0.0f);
    for (int r = 0; r < 4; ++r) low = add(low, select(positive[r], set1(scales[r]), set1(-scales[r])));
    if constexpr (Ranks == 5) {
      high = add(low, set1(scales[4]));
      low = add(low, set1(-scales[4]));
    }
  }

  // Of 64 elements, whose words lie `offset` bytes behind those of each rank.
  GCK_INLINE void put(const char* const* words, int64_t offset, Vec* out) const {
    __m512i signs = _mm512_setzero_si512();
#pragma GCC unroll 5
    for (int r = 0; r < Ranks; ++r) {
      uint64_t bits;
      std::memcpy(&bits, words[r] + offset, sizeof bits);
      signs = _mm512_mask_add_epi8(signs, bits, signs, _mm512_set1_epi8(static_cast<char>(1 << r)));
    }
    alignas(64) char bytes[64];
    _mm512_store_si512(bytes, signs);
    // Else GCC takes them from the register, which costs one more instruction of the scarcest kind for each.
    asm("" : "+m"(bytes));
    for (int v = 0; v < 4; ++v) {
      const __m128i some = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes + 16 * v));
      const __m512i index = _mm512_cvtepu8_epi32(some);
      out[v] = {Ranks == 5 ? _mm512_permutex2var_ps(low.v, index, high.v)
                           : _mm512_permutexvar_ps(index, low.v)};
    }
  }
};
constexpr bool kBegins = true;
#else
template <int Ranks>
struct Begun {
  void set(const float*) {}
  void put(const char* const*, int64_t, Vec*) const {}
};
constexpr bool kBegins = false;
#endif

// Chunks that are whole, of some of the ranks; Vecs vectors of a chunk at a time. Sums are begun by the First
// ranks.
template <int Vecs, int First, typename Count>
void decode_chunks(const SignDecode& job, const Alphas& alpha, int64_t begin, int64_t end, const Run& run,
                   Count ranks) {
  const int64_t size = job.chunk_size;
  const BodiesOfRun words(job.bodies + run.first, ranks);
  const AlphasOfRun factors(alpha, run);
  for (int64_t c = begin; c < end; ++c) {
    float scale[kRanksTogether];
    for (int64_t r = 0; r < ranks; ++r) {
      const char* at = words.of[r] + job.scales_offset + 4 * c;
      std::memcpy(&scale[r], at, sizeof(float));
      // alpha * -scale == -(alpha * scale), so one product a chunk does.
      scale[r] *= factors.of[r];
      ask_ahead(at, 64);
    }
    const auto values = [&](int64_t r, int64_t i, auto take) {
      const Vec plus = in_register(set1(scale[r])), minus = in_register(set1(-scale[r]));
      for (int v = 0; v < Vecs; ++v) {
        uint16_t bits;
        std::memcpy(&bits, words.of[r] + i / 8 + 2 * v, sizeof bits);
        take(v, select(bits, plus, minus));
      }
    };
    if (run.is_copy()) {
      copy_blocks<Vecs>(run, c * size, (c + 1) * size, [&](int64_t i, auto take) { values(0, i, take); });
      continue;
    }
    Begun<First> first;
    if constexpr (First > 0) first.set(scale);
    for (int64_t i = c * size; i < (c + 1) * size; i += Vecs * kLanes) {
      ask_ahead<1>(words.of, ranks, i);
      Vec sums[Vecs];
      if constexpr (First > 0) first.put(words.of, i / 8, sums);
      sum_block<Vecs, 1, First>(run, i, ranks, [&](int64_t r, auto take) { values(r, i, take); }, sums);
    }
  }
}

void decode_some(const SignDecode& job, const Alphas& alpha, int64_t begin, int64_t end, const Run& run) {
  if (job.chunk_size < 4 * kLanes) return decode_chunks<2, 0>(job, alpha, begin, end, run, run.ranks);
  if (!kBegins || run.from || run.written || run.ranks < 4)
    return decode_chunks<4, 0>(job, alpha, begin, end, run, run.ranks);
  if (run.ranks == 4) return decode_chunks<4, 4>(job, alpha, begin, end, run, Known<4>{});
  if (run.ranks == 8) return decode_chunks<4, 5>(job, alpha, begin, end, run, Known<8>{});
  decode_chunks<4, 5>(job, alpha, begin, end, run, run.ranks);
}

// One rank's last chunk, cut short: decoded to, or added to `part`, of a whole chunk. Of a copy, because
// others' memory lies behind.
void decode_part(const SignDecode& job, int64_t rank, int64_t c, int64_t valid, float* part) {
  constexpr int64_t kScale = kMaxChunk / 8;
  char copy[kScale + 4] = {};
  const char *body = job.bodies[rank], *const copies[] = {copy};
  std::memcpy(copy, body + c * job.chunk_size / 8, static_cast<size_t>((valid + 31) / 32 * 4));
  std::memcpy(copy + kScale, body + job.scales_offset + 4 * c, 4);
  const DecodeInto into{part, job.chunk_size, job.into.alpha.of(rank), false, job.into.add, false};
  sign_decompress({copies, 1, kScale, job.chunk_size, into}, 0, 1);
}

}  // namespace

int64_t sign_compress(const SignChunks& job, int64_t begin, int64_t end) {
  return with_dtype(job.grad_dtype,
                    [&]<Dtype D>() { return compress_chunks<D>(job, begin, end, [](int64_t) {}); });
}

void sign_decompress(const SignDecode& job, int64_t begin, int64_t end) {
  const auto some = [&](int64_t from, int64_t to, const Run& run) {
    decode_some(job, job.into.alpha, from, to, run);
  };
  decode_all(job, begin, end, some, decode_part);
}

int64_t sign_reduce(const SignDecode& from, const MeanInto& into, const SignChunks& to, int64_t begin,
                    int64_t end) {
  const auto some = [&](int64_t first, int64_t last, const Run& run) {
    decode_some(from, 1.0f, first, last, run);
  };
  SignChunks job = to;
  job.err = into.err;
  return compress_chunks<Dtype::none>(
      job, begin, end, tile_by_tile(to.chunk_size, from.ranks, begin, end, [&](int64_t first, int64_t last) {
        add_mean_of_all(from, into, first, last, some, decode_part);
      }));
}

}  // namespace gck::GCK_ISA
