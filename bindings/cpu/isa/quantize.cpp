// A chunk stays in the nearest cache from the moment that acc is made until its residual is done.
#include "cpu/isa/quantize.hpp"

#include "cpu/isa/codes.hpp"
#include "cpu/isa/keys.hpp"
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
  int64_t width;  // of an element of grad; 0: there is none
  int64_t at;     // of its first element, in grad
  int64_t first;  // the same, in the vector
  float* err;
  int64_t size, valid;  // elements from `valid` on are zeros
  char* codes;
  float* scales;
};

// Asks for what the chunk after the next one has in the place of elements [i, i + 16): while codes are made
// of what the nearest cache has, the hardware looks no further ahead.
inline void ask_for_later(const Chunk& c, int64_t i) {
  if (!c.width) return;
  __builtin_prefetch(static_cast<const char*>(c.grad) + (c.at + 2 * c.size + i) * c.width, 0, 2);
  __builtin_prefetch(c.err + 2 * c.size + i, 1, 2);
}

// acc to err; the largest magnitude's key.
template <Dtype D>
inline int32_t accumulate(const Chunk& c) {
  Vec best = set1(0.0f), other = set1(0.0f);
  for (int64_t i = 0; i < c.size; i += 2 * kLanes) {
    const Vec a = add(load_as<D>(c.grad, c.at + i), load(c.err + i));
    const Vec b = add(load_as<D>(c.grad, c.at + i + kLanes), load(c.err + i + kLanes));
    if constexpr (D != Dtype::none) {
      store(c.err + i, a);
      store(c.err + i + kLanes, b);
    }
    best = max_key(best, a);
    other = max_key(other, b);
  }
  return largest_key(max_key(best, other));
}

// A chunk whose err is acc, with what its codes are multiples of.
struct Scaled {
  Chunk chunk;
  int32_t top;  // the largest magnitude's key
  float scale, inverse;
};

template <Dtype D>
inline Scaled scaled(const Chunk& c, int bits) {
  const int32_t top = accumulate<D>(c);
  const float scale = float_of(static_cast<uint32_t>(top)) / static_cast<float>((1 << (bits - 1)) - 1);
  return {c, top, scale, 1.0f / scale};
}

// Multiples of the scale, whole numbers of at most qmax, to codes; what they do not say stays in err.
template <int Bits, bool Stochastic, int Vecs>
void round_all(const Scaled& s, DrawnWords& drawn) {
  const Vec inverse = set1(s.inverse), step = set1(s.scale);
  const Vec qmax = set1(static_cast<float>((1 << (Bits - 1)) - 1));
  const Chunk c = s.chunk;
  for (int64_t i = 0; i < c.size; i += Vecs * kLanes) {
    Vec acc[Vecs], code[Vecs];
    for (int v = 0; v < Vecs; ++v) {
      ask_for_later(c, i + v * kLanes);
      acc[v] = load(c.err + i + v * kLanes);
    }
    if constexpr (Stochastic) {
      const uint64_t* words = drawn.of(c.first + i);
      const auto round = [&]<int V>() {
        code[V % Vecs] = round_by(numbers<V>(words), acc[V % Vecs], inverse, qmax);
      };
      if (Vecs == 4 || (c.first + i) % 64 == 0)
        round.template operator()<0>(), round.template operator()<1>();
      if (Vecs == 4 || (c.first + i) % 64 != 0)
        round.template operator()<2>(), round.template operator()<3>();
    } else {
      // No quotient exceeds qmax by half, so that none rounds to more.
      for (int v = 0; v < Vecs; ++v) code[v] = round_even(mul(acc[v], inverse));
    }
    store_codes<Bits>(c.codes + i * Bits / 8, code);
    for (int v = 0; v < Vecs; ++v) store(c.err + i + v * kLanes, sub(acc[v], mul(code[v], step)));
  }
}

template <int Bits, bool Stochastic>
inline void round_all(const Scaled& s, DrawnWords& drawn) {
  if (s.chunk.size >= 4 * kLanes) return round_all<Bits, Stochastic, 4>(s, drawn);
  round_all<Bits, Stochastic, 2>(s, drawn);
}

// A chunk with something not finite: codes of the largest magnitude, and no residual.
int64_t send_nonfinite(const Chunk& c, int bits) {
  const int qmax = (1 << (bits - 1)) - 1;
  int8_t codes[kMaxChunk];
  for (int64_t i = 0; i < c.size; ++i)
    codes[i] = static_cast<int8_t>(i >= c.valid ? 0 : c.err[i] >= 0 ? qmax : -qmax);
  pack_bytes(codes, c.size, bits, c.codes);
  std::memset(c.err, 0, sizeof(float) * static_cast<size_t>(c.valid));
  return c.valid;
}

template <int Bits>
int64_t send_scaled(const Scaled& s, bool stochastic, DrawnWords& drawn) {
  const Chunk& c = s.chunk;
  *c.scales = canonical(s.scale);
  if (s.top >= kInfKey) return send_nonfinite(c, Bits);
  if (s.scale < float_of(0x00800000u)) {
    *c.scales = 0.0f;
    std::memset(c.codes, 0, static_cast<size_t>(c.size * Bits / 8));
    return 0;
  }
  stochastic ? round_all<Bits, true>(s, drawn) : round_all<Bits, false>(s, drawn);
  return s.top >= kWildKey ? clear_nonfinite(c.err, c.valid) : 0;
}

int64_t send_scaled(const Scaled& s, int bits, bool stochastic, DrawnWords& drawn) {
  if (bits == 8) return send_scaled<8>(s, stochastic, drawn);
  return bits == 4 ? send_scaled<4>(s, stochastic, drawn) : send_scaled<2>(s, stochastic, drawn);
}

// A chunk whose err is acc, with the mean of its magnitudes.
struct Mean {
  Chunk chunk;
  float mean;
};

template <Dtype D>
inline Mean mean_of(const Chunk& c) {
  alignas(64) float tree[kMaxChunk / 2];
  if constexpr (D != Dtype::none) {
    for (int64_t i = 0; i < c.size; i += kLanes)
      store(c.err + i, add(load_as<D>(c.grad, c.at + i), load(c.err + i)));
  }
  return {c, canonical(sum_of_magnitudes(c.err, c.size, tree) / static_cast<float>(c.valid))};
}

// Codes of 2 bits from element `first` on.
void clear_codes(char* codes, int64_t first, int64_t size) {
  std::memset(codes + (first + 3) / 4, 0, static_cast<size_t>(size / 4 - (first + 3) / 4));
  if (first % 4) codes[first / 4] = static_cast<char>(codes[first / 4] & ((1 << 2 * (first % 4)) - 1));
}

// A sign and one of two levels: the means of the magnitudes below the mean, and of the others.
int64_t send_two_levels(const Mean& m) {
  alignas(64) float tree[kMaxChunk / 2], low_tree[kMaxChunk / 2];
  const Chunk c = m.chunk;
  const float mean = m.mean;
  // Nothing compares with NaN: then no key may reach this one, which that of a NaN of ones alone does.
  const auto key = static_cast<int32_t>(mean == mean ? bits_of(mean) : 0x7fffffffu);
  if (mean != mean) {
    for (int64_t i = 0; i < c.size; i += kLanes) store(c.err + i, canonical(load(c.err + i)));
  }
  int64_t highs = 0;
  const auto split = [&](int64_t i) {
    ask_for_later(c, i);
    Mask in;
    const Halves both = split_at(load(c.err + i), key, in);
    highs += __builtin_popcount(in);
    return both;
  };
  const int64_t width = first_sums(c.size, split, [&](int64_t i, const Halves& both) {
    store(tree + i, both.high);
    store(low_tree + i, both.low);
  });
  // The zeros behind a short chunk reach a mean of 0, as then do all of its elements.
  if (highs > c.valid) highs = c.valid;
  const int64_t lows = c.valid - highs;
  float high = highs ? canonical(tree_sum(tree, width) / static_cast<float>(highs)) : 0.0f;
  float low = lows ? canonical(tree_sum(low_tree, width) / static_cast<float>(lows)) : 0.0f;
  if (!highs) high = low;
  if (!lows) low = high;
  c.scales[0] = low;
  c.scales[1] = high;
  const Vec far = set1(high), near = set1(low);
  for (int64_t i = 0; i < c.size; i += 2 * kLanes) {
    uint32_t words[2];
    for (int v = 0; v < 2; ++v) {
      float* at = c.err + i + v * kLanes;
      const Vec acc = load(at);
      const Mask positive = ge_zero(acc), is_high = key_ge(acc, key);
      store(at, sub(acc, signed_like(acc, positive, select(is_high, far, near))));
      words[v] = interleave(is_high, positive);
    }
    std::memcpy(c.codes + i / 4, words, sizeof words);
  }
  if (c.valid < c.size) clear_codes(c.codes, c.valid, c.size);
  return is_finite(low) && is_finite(high) ? 0 : clear_nonfinite(c.err, c.valid);
}

// Calls make(i) before it looks at chunk i.
template <Dtype D, typename Make>
int64_t compress_chunks(const QuantizeChunks& job, int64_t begin, int64_t end, Make make) {
  constexpr int64_t width = D == Dtype::fp32 ? 4 : 2;
  const int64_t size = job.chunk_size, row = size * job.bits / 8;
  DrawnWords drawn{job.seed};
  int64_t cleared = 0;
  // A chunk gets its codes when the next one's scale is being made, which takes long, and from little.
  Scaled last{};
  Mean last_mean{};
  const auto send_last = [&] {
    if (last.chunk.size) cleared += send_scaled(last, job.bits, job.stochastic, drawn);
    if (last_mean.chunk.size) cleared += send_two_levels(last_mean);
  };
  for (int64_t i = begin; i < end; ++i) {
    make(i);
    char* body = job.bodies + i / job.chunks_per_row * job.row_stride;
    const int64_t slot = i % job.chunks_per_row, at = i * size;
    auto* scales = reinterpret_cast<float*>(body + job.scales_offset) + slot * (job.two_levels ? 2 : 1);
    const int64_t valid = job.numel - at < size ? job.numel - at : size;
    if (valid == size) {
      const Chunk c{job.grad,     D == Dtype::none ? 0 : width,
                    at,           job.first + at,
                    job.err + at, size,
                    size,         body + slot * row,
                    scales};
      if (job.two_levels) {
        const Mean next = mean_of<D>(c);
        send_last();
        last_mean = next;
        continue;
      }
      const Scaled next = scaled<D>(c, job.bits);
      send_last();
      last = next;
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
    const Chunk c{grads, 0, 0, job.first + at, part, size, valid, codes, scales};
    cleared += job.two_levels ? send_two_levels(mean_of<D>(c))
                              : send_scaled(scaled<D>(c, job.bits), job.bits, job.stochastic, drawn);
    std::memcpy(job.err + at, part, sizeof(float) * static_cast<size_t>(valid));
    std::memcpy(body + slot * row, codes, static_cast<size_t>((valid * job.bits + 7) / 8));
  }
  send_last();
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
      ask_ahead(scales + r * stride + c * scales_size, 64);
    }
    if (run.is_copy()) {
      copy_blocks<Vecs, Values::kWays>(run, c * size, (c + 1) * size, [&](int64_t i, int v) {
        return values[0].at(codes + i * Bits / 8, v);
      });
      continue;
    }
    for (int64_t i = c * size; i < (c + 1) * size; i += Vecs * kLanes) {
      ask_ahead<Bits>(codes, stride, run.ranks, i);
      sum_block<Vecs, Values::kWays>(
          run, i, [&](int64_t r, int v) { return values[r].at(codes + r * stride + i * Bits / 8, v); });
    }
  }
}

template <int Bits, typename Values>
void decode_chunks(const QuantizeDecode& job, float alpha, int64_t begin, int64_t end, const Run& run) {
  if (job.chunk_size >= 4 * kLanes) return decode_chunks<Bits, Values, 4>(job, alpha, begin, end, run);
  if constexpr (Values::kWays <= 2) decode_chunks<Bits, Values, 2>(job, alpha, begin, end, run);
}

template <bool Levels>
void decode_of_four(const QuantizeDecode& job, float alpha, int64_t begin, int64_t end, const Run& run) {
  if (job.chunk_size < 4 * kLanes)
    decode_chunks<2, FourValues<Levels>>(job, alpha, begin, end, run);
  else
    decode_chunks<2, Table<2, Levels>>(job, alpha, begin, end, run);
}

void decode_some(const QuantizeDecode& job, float alpha, int64_t begin, int64_t end, const Run& run) {
  if (job.two_levels) return decode_of_four<true>(job, alpha, begin, end, run);
  if (job.bits == 2) return decode_of_four<false>(job, alpha, begin, end, run);
  if (job.bits == 4) return decode_chunks<4, Table<4>>(job, alpha, begin, end, run);
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
  return with_dtype(job.grad_dtype,
                    [&]<Dtype D>() { return compress_chunks<D>(job, begin, end, [](int64_t) {}); });
}

void quantize_decompress(const QuantizeDecode& job, int64_t begin, int64_t end) {
  const auto some = [&](int64_t from, int64_t to, const Run& run) {
    decode_some(job, job.into.alpha, from, to, run);
  };
  decode_all(job, begin, end, some, decode_part);
}

int64_t quantize_reduce(const QuantizeDecode& from, const MeanInto& into, const QuantizeChunks& to,
                        int64_t begin, int64_t end) {
  const auto some = [&](int64_t first, int64_t last, const Run& run) {
    decode_some(from, 1.0f, first, last, run);
  };
  QuantizeChunks job = to;
  job.err = into.err;
  return compress_chunks<Dtype::none>(
      job, begin, end, tile_by_tile(to.chunk_size, from.ranks, begin, end, [&](int64_t first, int64_t last) {
        add_mean_of_all(from, into, first, last, some, decode_part);
      }));
}

}  // namespace gck::GCK_ISA
