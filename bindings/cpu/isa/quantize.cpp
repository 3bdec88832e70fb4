// A chunk stays in the nearest cache from the moment that acc is made until its residual is done.
#include "cpu/isa/quantize.hpp"

#include "cpu/isa/codes.hpp"
#include "cpu/isa/philox.hpp"
#include "cpu/isa/sums.hpp"
#include "cpu/isa/tree.hpp"

namespace gck::GCK_ISA {
namespace {

constexpr int64_t kMaxChunk = 8192;
// From this magnitude on (2^96), NaN, infinities and products that overflow are possible.
constexpr int32_t kWildKey = (96 + 127) << 23;

// One chunk that is whole in memory, and where its packed codes and scales go.
struct Chunk {
  const void* grad;
  int64_t at;     // of its first element, in grad
  int64_t first;  // the same, in the vector
  float* err;
  int64_t size, valid;  // elements from `valid` on are zeros
  char* codes;
  float* scales;
};

// acc to err; the largest magnitude's key.
template <Dtype D>
inline int32_t accumulate(const Chunk& c) {
  Vec best = set1(0.0f), other = set1(0.0f);
  for (int64_t i = 0; i < c.size; i += 2 * kLanes) {
    const Vec a = add(load_as<D>(c.grad, c.at + i), load(c.err + i));
    const Vec b = add(load_as<D>(c.grad, c.at + i + kLanes), load(c.err + i + kLanes));
    store(c.err + i, a);
    store(c.err + i + kLanes, b);
    best = max_key(best, a);
    other = max_key(other, b);
  }
  alignas(64) float keys[kLanes];
  store(keys, max_key(best, other));
  int32_t top = 0;
  for (float key : keys) {
    const auto k = static_cast<int32_t>(bits_of(key));
    top = k > top ? k : top;
  }
  return top;
}

// What is not finite becomes 0; returns how many that are.
int64_t clear_nonfinite(float* err, int64_t valid) {
  int64_t cleared = 0;
  for (int64_t i = 0; i < valid; ++i) {
    if (is_finite(err[i])) continue;
    err[i] = 0.0f;
    ++cleared;
  }
  return cleared;
}

// acc / scale to whole numbers of at most qmax: to codes; what they do not say stays in err.
template <bool Stochastic>
inline void round_all(const Chunk& c, float scale, float most, const Keys& keys, int8_t* codes) {
  const Vec inverse = set1(1.0f / scale), step = set1(scale), qmax = set1(most), zero = set1(0.0f);
  const auto put = [&](int64_t i, Vec acc, Vec code) {
    store_bytes(codes + i, code);
    store(c.err + i, sub(acc, mul(code, step)));
  };
  for (int64_t i = 0; i < c.size; i += kDraw) {
    const Vec a = load(c.err + i), b = load(c.err + i + kLanes);
    if constexpr (Stochastic) {
      const Draw u = draw(keys, c.first + i);
      const auto rounded = [&](Vec acc, Vec uniform) {
        const Vec size = abs(mul(acc, inverse)), whole = floor_of(size);
        const Vec code = least(add(whole, one_where_less(uniform, sub(size, whole))), qmax);
        return add(with_sign(code, acc), zero);  // -0 would change the residual of -0
      };
      put(i, a, rounded(a, u.first));
      put(i + kLanes, b, rounded(b, u.second));
    } else {
      // No quotient exceeds qmax by half, so that none rounds to more.
      put(i, a, round_even(mul(a, inverse)));
      put(i + kLanes, b, round_even(mul(b, inverse)));
    }
  }
}

template <Dtype D>
inline int64_t compress_scaled(const QuantizeChunks& job, const Keys& keys, const Chunk& c) {
  alignas(64) int8_t codes[kMaxChunk];
  const int32_t top = accumulate<D>(c);
  const int qmax = (1 << (job.bits - 1)) - 1;
  float scale = float_of(static_cast<uint32_t>(top)) / static_cast<float>(qmax);
  int64_t cleared = 0;
  if (top >= kInfKey) {
    for (int64_t i = 0; i < c.size; ++i)
      codes[i] = static_cast<int8_t>(i >= c.valid ? 0 : c.err[i] >= 0 ? qmax : -qmax);
    std::memset(c.err, 0, sizeof(float) * static_cast<size_t>(c.valid));
    cleared = c.valid;
  } else if (scale < float_of(0x00800000u)) {
    scale = 0.0f;
    std::memset(codes, 0, static_cast<size_t>(c.size));
  } else {
    if (job.stochastic)
      round_all<true>(c, scale, static_cast<float>(qmax), keys, codes);
    else
      round_all<false>(c, scale, static_cast<float>(qmax), keys, codes);
    if (top >= kWildKey) cleared = clear_nonfinite(c.err, c.valid);
  }
  *c.scales = canonical(scale);
  pack_bytes(codes, c.size, job.bits, c.codes);
  return cleared;
}

// Fetches what the next chunk has in the places of elements [i, i + 16) of this one: while levels are summed,
// the hardware looks no further ahead.
template <Dtype D>
inline void fetch_ahead(const Chunk& c, int64_t i) {
  constexpr int64_t width = D == Dtype::fp32 ? 4 : 2;
  if constexpr (D != Dtype::none)
    __builtin_prefetch(static_cast<const char*>(c.grad) + (c.at + c.size + i) * width, 0, 2);
  __builtin_prefetch(c.err + c.size + i, 1, 2);
}

// A sign and one of two levels: the means of the magnitudes below the mean, and of the others.
template <Dtype D>
inline int64_t compress_two_levels(const Chunk& c) {
  alignas(64) float tree[kMaxChunk / 2], low_tree[kMaxChunk / 2];
  const int64_t half = c.size / 2;
  const auto take = [&](int64_t i) {
    const Vec acc = add(load_as<D>(c.grad, c.at + i), load(c.err + i));
    if constexpr (D != Dtype::none) store(c.err + i, acc);
    return abs(acc);
  };
  // Strictly upwards: halves read side by side are streams that the hardware does not foresee.
  for (int64_t i = 0; i < half; i += kLanes) store(tree + i, take(i));
  for (int64_t i = 0; i < half; i += kLanes) store(tree + i, add(load(tree + i), take(half + i)));
  const float mean = canonical(tree_sum(tree, half) / static_cast<float>(c.valid));
  // Nothing compares with NaN: then no key may reach this one, which that of a NaN of ones alone does.
  const auto key = static_cast<int32_t>(mean == mean ? bits_of(mean) : 0x7fffffffu);
  if (mean != mean) {
    for (int64_t i = 0; i < c.size; i += kLanes) store(c.err + i, canonical(load(c.err + i)));
  }
  int64_t highs = 0;
  for (int64_t i = 0; i < half; i += kLanes) {
    fetch_ahead<D>(c, i);
    fetch_ahead<D>(c, half + i);
    Mask in_a, in_b;
    const Halves a = split_at(load(c.err + i), key, in_a), b = split_at(load(c.err + half + i), key, in_b);
    store(tree + i, add(a.high, b.high));
    store(low_tree + i, add(a.low, b.low));
    highs += __builtin_popcount(in_a) + __builtin_popcount(in_b);
  }
  // The zeros behind a short chunk reach a mean of 0, as then do all of its elements.
  if (highs > c.valid) highs = c.valid;
  const int64_t lows = c.valid - highs;
  float high = highs ? canonical(tree_sum(tree, half) / static_cast<float>(highs)) : 0.0f;
  float low = lows ? canonical(tree_sum(low_tree, half) / static_cast<float>(lows)) : 0.0f;
  if (!highs) high = low;
  if (!lows) low = high;
  c.scales[0] = low;
  c.scales[1] = high;
  const Vec far = set1(high), near = set1(low), zero = set1(0.0f);
  for (int64_t i = 0; i < c.size; i += kLanes) {
    const Vec acc = load(c.err + i);
    const Mask positive = ge_zero(acc), is_high = key_ge(acc, key);
    // Of acc + 0, the sign is that of the code, also where acc is -0.
    store(c.err + i, sub(acc, with_sign(select(is_high, far, near), add(acc, zero))));
    uint32_t word = interleave(is_high | positive << 16);
    const int64_t left = c.valid - i;
    if (left < kLanes) word = left > 0 ? word & ((1u << 2 * left) - 1) : 0;
    std::memcpy(c.codes + i / 4, &word, sizeof word);
  }
  return is_finite(low) && is_finite(high) ? 0 : clear_nonfinite(c.err, c.valid);
}

template <Dtype D>
inline int64_t compress_chunk(const QuantizeChunks& job, const Keys& keys, const Chunk& c) {
  return job.two_levels ? compress_two_levels<D>(c) : compress_scaled<D>(job, keys, c);
}

template <Dtype D>
int64_t compress_chunks(const QuantizeChunks& job, int64_t begin, int64_t end) {
  constexpr int64_t width = D == Dtype::fp32 ? 4 : 2;
  const int64_t size = job.chunk_size, row = size * job.bits / 8;
  const Keys keys{job.seed};
  int64_t cleared = 0;
  for (int64_t i = begin; i < end; ++i) {
    char* body = job.bodies + i / job.chunks_per_row * job.row_stride;
    const int64_t slot = i % job.chunks_per_row, at = i * size;
    auto* scales = reinterpret_cast<float*>(body + job.scales_offset) + slot * (job.two_levels ? 2 : 1);
    const int64_t valid = job.numel - at < size ? job.numel - at : size;
    if (valid == size) {
      cleared += compress_chunk<D>(
          job, keys, {job.grad, at, job.first + at, job.err + at, size, size, body + slot * row, scales});
      continue;
    }
    // The last chunk, cut short: on a copy padded with zeros.
    alignas(64) float part[kMaxChunk] = {};
    alignas(64) char grads[kMaxChunk * 4] = {};
    char codes[kMaxChunk];
    std::memcpy(part, job.err + at, sizeof(float) * static_cast<size_t>(valid));
    if constexpr (D != Dtype::none) {  // else there is no memory behind job.grad
      std::memcpy(grads, static_cast<const char*>(job.grad) + at * width, static_cast<size_t>(valid * width));
    }
    cleared += compress_chunk<D>(job, keys, {grads, 0, job.first + at, part, size, valid, codes, scales});
    std::memcpy(job.err + at, part, sizeof(float) * static_cast<size_t>(valid));
    std::memcpy(body + slot * row, codes, static_cast<size_t>((valid * job.bits + 7) / 8));
  }
  return cleared;
}

// Chunks that are whole, of some of the ranks; Vecs vectors of a chunk at a time.
template <int Bits, typename Values, int Vecs>
void decode_chunks(const QuantizeDecode& job, float alpha, int64_t begin, int64_t end, const Run& run) {
  const int64_t size = job.chunk_size, stride = job.rank_stride, scales_size = job.two_levels ? 8 : 4;
  const char *codes = job.codes + run.first * stride, *scales = job.scales + run.first * stride;
  Values values[kRanksTogether];
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t r = 0; r < run.ranks; ++r) {
      values[r].set(scales + r * stride + c * scales_size, alpha);
      ask_ahead(codes + r * stride + c * size * Bits / 8, size * Bits / 8, kSumTile * Bits / 8);
      ask_ahead(scales + r * stride + c * scales_size, scales_size, kSumTile / size * scales_size);
    }
    for (int64_t i = c * size; i < (c + 1) * size; i += Vecs * kLanes) {
      sum_block<Vecs>(run, i, [&](int64_t r, int v) {
        return values[r].at(codes + r * stride + (i + v * kLanes) * Bits / 8);
      });
    }
  }
}

template <int Bits, typename Values>
void decode_chunks(const QuantizeDecode& job, float alpha, int64_t begin, int64_t end, const Run& run) {
  if (job.chunk_size < 4 * kLanes)
    decode_chunks<Bits, Values, 2>(job, alpha, begin, end, run);
  else
    decode_chunks<Bits, Values, 4>(job, alpha, begin, end, run);
}

void decode_some(const QuantizeDecode& job, float alpha, int64_t begin, int64_t end, const Run& run) {
  if (job.two_levels) return decode_chunks<2, FourValues<true>>(job, alpha, begin, end, run);
  if (job.bits == 2) return decode_chunks<2, FourValues<false>>(job, alpha, begin, end, run);
  if (job.bits == 4) return decode_chunks<4, SixteenValues>(job, alpha, begin, end, run);
  if (alpha == 1.0f) return decode_chunks<8, Steps<8, true>>(job, alpha, begin, end, run);
  decode_chunks<8, Steps<8>>(job, alpha, begin, end, run);
}

// One rank's last chunk, cut short: decoded to, or added to `part`, of a whole chunk. Of a copy, because
// others' memory lies behind.
void decode_part(const QuantizeDecode& job, int64_t rank, int64_t c, int64_t valid, float* part) {
  char codes[kMaxChunk] = {};
  std::memcpy(codes, job.codes + rank * job.rank_stride + c * job.chunk_size * job.bits / 8,
              static_cast<size_t>((valid * job.bits + 7) / 8));
  QuantizeDecode one = job;
  one.codes = codes;
  one.scales += rank * job.rank_stride + c * (job.two_levels ? 8 : 4);
  one.ranks = 1;
  one.into = {part, job.chunk_size, job.into.alpha, false, job.into.add, false};
  quantize_decompress(one, 0, 1);
}

}  // namespace

int64_t quantize_compress(const QuantizeChunks& job, int64_t begin, int64_t end) {
  if (job.grad_dtype == Dtype::none) return compress_chunks<Dtype::none>(job, begin, end);
  return with_dtype(job.grad_dtype, [&]<Dtype D>() { return compress_chunks<D>(job, begin, end); });
}

void quantize_decompress(const QuantizeDecode& job, int64_t begin, int64_t end) {
  const auto some = [&](int64_t from, int64_t to, const Run& run) {
    decode_some(job, job.into.alpha, from, to, run);
  };
  decode_all(job, begin, end, some, decode_part);
}

void quantize_add_mean(const QuantizeDecode& job, const MeanInto& into, int64_t begin, int64_t end) {
  const auto some = [&](int64_t from, int64_t to, const Run& run) { decode_some(job, 1.0f, from, to, run); };
  add_mean_of_all(job, into, begin, end, some, decode_part);
}

}  // namespace gck::GCK_ISA
