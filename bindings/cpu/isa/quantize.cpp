// A chunk stays in the nearest cache from the moment that acc is made until its residual is done.
#include "cpu/isa/quantize.hpp"

#include "cpu/isa/codes.hpp"
#include "cpu/isa/keys.hpp"
#include "cpu/isa/philox.hpp"
#include "cpu/isa/quantize_chunk.hpp"
#include "cpu/isa/rows.hpp"
#include "cpu/isa/sums.hpp"
#include "cpu/isa/tree.hpp"
#include "cpu/isa/two_levels.hpp"

namespace gck::GCK_ISA {
namespace {

// From this magnitude on (2^96), NaN, infinities and products that overflow are possible.
constexpr int32_t kWildKey = (96 + 127) << 23;

// acc to err; the largest magnitude's key.
template <Dtype D>
inline int32_t accumulate(const Chunk& c) {
  float* const err = c.err;  // what is stored might change the chunk, for all that the compiler knows
  const void* const grad = c.grad;
  const int64_t at = c.at, size = c.size;
  Vec best = set1(0.0f), other = set1(0.0f);
  for (int64_t i = 0; i < size; i += 2 * kLanes) {
    const Vec x = add(load_as<D>(grad, at + i), load(err + i));
    const Vec y = add(load_as<D>(grad, at + i + kLanes), load(err + i + kLanes));
    if constexpr (D != Dtype::none) {
      store(err + i, x);
      store(err + i + kLanes, y);
    }
    best = max_key(best, x);
    other = max_key(other, y);
  }
  return largest_key(max_key(best, other));
}

// A chunk whose err is acc, with what its codes are multiples of.
struct Scaled {
  Chunk chunk;
  int32_t top;  // the largest magnitude's key
  float scale, inverse;

  template <Dtype D>
  void find(int bits) {
    top = accumulate<D>(chunk);
    scale = float_of(static_cast<uint32_t>(top)) / static_cast<float>((1 << (bits - 1)) - 1);
    inverse = 1.0f / scale;
  }
};

// Vectors that are rounded together: with their codes they fit in registers.
#if defined(GCK_NEON)
constexpr int kMostRounded = 2;
#else
constexpr int kMostRounded = 4;
#endif

// Multiples of the scale, whole numbers of at most qmax, to codes; what they do not say stays in err.
template <int Bits, bool Stochastic, int Vecs>
void round_all(const Scaled& s, DrawnWords& drawn) {
  const Vec inverse = set1(s.inverse), step = set1(s.scale);
  const Vec qmax = set1(static_cast<float>((1 << (Bits - 1)) - 1));
  const Chunk& c = s.chunk;
  float* const err = c.err;
  char* const codes = c.codes;
  const int64_t size = c.size, first = c.first;
  const Later later(c);
  for (int64_t i = 0; i < size; i += Vecs * kLanes) {
    Vec acc[Vecs], code[Vecs];
    for (int v = 0; v < Vecs; ++v) {
      later.ask(i + v * kLanes);
      acc[v] = load(err + i + v * kLanes);
    }
    if constexpr (Stochastic) {
      const uint64_t* words = drawn.of(first + i);
      const auto round = [&]<int V>() {
        code[V % Vecs] = round_by(numbers<V>(words), acc[V % Vecs], inverse, qmax);
      };
      if (Vecs == 4 || (first + i) % 64 == 0) round.template operator()<0>(), round.template operator()<1>();
      if (Vecs == 4 || (first + i) % 64 != 0) round.template operator()<2>(), round.template operator()<3>();
    } else {
      // No quotient exceeds qmax by half, so that none rounds to more.
      for (int v = 0; v < Vecs; ++v) code[v] = round_even(mul(acc[v], inverse));
    }
    store_codes<Bits>(codes + i * Bits / 8, code);
    for (int v = 0; v < Vecs; ++v) store(err + i + v * kLanes, sub(acc[v], mul(code[v], step)));
  }
}

template <int Bits, bool Stochastic>
inline void round_all(const Scaled& s, DrawnWords& drawn) {
  if (s.chunk.size >= kMostRounded * kLanes) return round_all<Bits, Stochastic, kMostRounded>(s, drawn);
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

// The last chunk, cut short: on a copy padded with zeros.
template <Dtype D>
int64_t compress_part(const QuantizeChunks& job, int64_t i, const Place<QuantizeChunks>& place,
                      DrawnWords& drawn) {
  constexpr int64_t width = D == Dtype::fp32 ? 4 : 2;
  const int64_t size = job.chunk_size, row = size * job.bits / 8, at = i * size, valid = job.numel - at;
  alignas(64) float part[kMaxChunk] = {};
  alignas(64) char grads[kMaxChunk * 4] = {};
  char codes[kMaxChunk];
  std::memcpy(part, job.err + at, sizeof(float) * static_cast<size_t>(valid));
  if constexpr (D != Dtype::none) {  // else there is no memory behind job.grad
    std::memcpy(grads, static_cast<const char*>(job.grad) + at * width, static_cast<size_t>(valid * width));
  }
  auto* const scales = reinterpret_cast<float*>(place.body + job.scales_offset);
  Chunk c{grads, 0, 0, job.first + at, part, size, valid, codes, scales};
  int64_t cleared = 0;
  if (job.two_levels) {
    c.scales += 2 * place.slot;
    TwoLevels levels;
    levels.chunk = c;
    levels.find_mean<D>();
    levels.find_levels();
    cleared = levels.subtract();
  } else {
    c.scales += place.slot;
    Scaled scaled;
    scaled.chunk = c;
    scaled.find<D>(job.bits);
    cleared = send_scaled(scaled, job.bits, job.stochastic, drawn);
  }
  std::memcpy(job.err + at, part, sizeof(float) * static_cast<size_t>(valid));
  std::memcpy(place.body + place.slot * row, codes, static_cast<size_t>((valid * job.bits + 7) / 8));
  return cleared;
}

// Calls make(i) before it looks at chunk i.
template <Dtype D, typename Make>
int64_t compress_chunks(const QuantizeChunks& job, int64_t begin, int64_t end, Make make) {
  constexpr int64_t width = D == Dtype::fp32 ? 4 : 2;
  const int64_t size = job.chunk_size, row = size * job.bits / 8;
  DrawnWords drawn{job.seed};
  int64_t cleared = 0;
  // A chunk gets its codes when the next one's scale is being made, which takes long, and from little. None
  // is copied: that would wait for all that has been stored meanwhile.
  Scaled scaled[2];
  TwoLevels levels[3];
  const bool staged = size <= 256;      // three longer ones would leave the nearest cache
  const auto finish = [&](int64_t i) {  // all that can be done before chunk i is looked at again
    if (!job.two_levels) {
      if (i > begin) cleared += send_scaled(scaled[(i - 1 - begin) % 2], job.bits, job.stochastic, drawn);
      return;
    }
    if (i > begin + 1 && staged) cleared += levels[(i - 2 - begin) % 3].subtract();
    if (i > begin) levels[(i - 1 - begin) % 3].find_levels();
    if (i > begin && !staged) cleared += levels[(i - 1 - begin) % 3].subtract();
  };
  const auto set = [&](Chunk& c, int64_t at, char* codes, float* scales) {
    c.grad = job.grad;
    c.width = D == Dtype::none ? 0 : width;
    c.at = at;
    c.first = job.first + at;
    c.err = job.err + at;
    c.size = c.valid = size;
    c.codes = codes;
    c.scales = scales;
  };
  Place place(job, begin);
  int64_t i = begin;
  for (; i < end && (i + 1) * size <= job.numel; ++i, place.next()) {
    make(i);
    char* const codes = place.body + place.slot * row;
    auto* const scales = reinterpret_cast<float*>(place.body + job.scales_offset);
    if (job.two_levels) {
      TwoLevels& next = levels[(i - begin) % 3];
      set(next.chunk, i * size, codes, scales + 2 * place.slot);
      next.find_mean<D>();
    } else {
      Scaled& next = scaled[(i - begin) % 2];
      set(next.chunk, i * size, codes, scales + place.slot);
      next.find<D>(job.bits);
    }
    finish(i);
  }
  finish(i);
  if (job.two_levels && i > begin && staged) cleared += levels[(i - 1 - begin) % 3].subtract();
  if (i < end) {
    make(i);
    cleared += compress_part<D>(job, i, place, drawn);
  }
  return cleared;
}

// Chunks that are whole, of some of the ranks; Vecs vectors of a chunk at a time.
template <int Bits, typename Values, int Vecs, typename Count>
void decode_chunks(const QuantizeDecode& job, const Alphas& alpha, int64_t begin, int64_t end, const Run& run,
                   Count ranks) {
  const int64_t size = job.chunk_size, scales_size = job.two_levels ? 8 : 4;
  const BodiesOfRun codes(job.bodies + run.first, ranks);
  const AlphasOfRun factors(alpha, run);
  Values values[kRanksTogether];
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t r = 0; r < ranks; ++r) {
      const char* scales = codes.of[r] + job.scales_offset + c * scales_size;
      values[r].set(scales, factors.of[r]);
      ask_ahead(scales, 64);
    }
    if (run.is_copy()) {
      copy_blocks<Vecs, Values::kWays>(run, c * size, (c + 1) * size, [&](int64_t i, auto take) {
        for (int v = 0; v < Vecs; ++v) take(v, values[0].at(codes.of[0] + i * Bits / 8, v));
      });
      continue;
    }
    for (int64_t i = c * size; i < (c + 1) * size; i += Vecs * kLanes) {
      ask_ahead<Bits>(codes.of, ranks, i);
      const auto of = [&](int64_t r, auto take) {
        const char* at = codes.of[r] + i * Bits / 8;
        for (int v = 0; v < Vecs; ++v) take(v, values[r].at(at, v));
      };
      Vec sums[Vecs];
      sum_block<Vecs, Values::kWays>(run, i, ranks, of, sums);
    }
  }
}

template <int Bits, typename Values>
void decode_chunks(const QuantizeDecode& job, const Alphas& alpha, int64_t begin, int64_t end,
                   const Run& run) {
  if (job.chunk_size >= 4 * kLanes) {
    // Only scales of these have all a register each; tables would be moved to and fro.
    if (Bits == 8 && run.ranks == kRanksTogether && !run.written)
      return decode_chunks<Bits, Values, 4>(job, alpha, begin, end, run, Known<kRanksTogether>{});
    return decode_chunks<Bits, Values, 4>(job, alpha, begin, end, run, run.ranks);
  }
  if constexpr (Values::kWays <= 2) decode_chunks<Bits, Values, 2>(job, alpha, begin, end, run, run.ranks);
}

template <bool Levels>
void decode_of_four(const QuantizeDecode& job, const Alphas& alpha, int64_t begin, int64_t end,
                    const Run& run) {
  if (job.chunk_size < 4 * kLanes)
    decode_chunks<2, FourValues<Levels>>(job, alpha, begin, end, run);
  else
    decode_chunks<2, Table<2, Levels>>(job, alpha, begin, end, run);
}

void decode_some(const QuantizeDecode& job, const Alphas& alpha, int64_t begin, int64_t end, const Run& run) {
  if (job.two_levels) return decode_of_four<true>(job, alpha, begin, end, run);
  if (job.bits == 2) return decode_of_four<false>(job, alpha, begin, end, run);
  if (job.bits == 4) return decode_chunks<4, Table<4>>(job, alpha, begin, end, run);
  if (alpha.is_one()) return decode_chunks<8, Steps<8, true>>(job, alpha, begin, end, run);
  decode_chunks<8, Steps<8>>(job, alpha, begin, end, run);
}

// One rank's last chunk, cut short: decoded to, or added to `part`, of a whole chunk. Of a copy, because
// others' memory lies behind.
void decode_part(const QuantizeDecode& job, int64_t rank, int64_t c, int64_t valid, float* part) {
  const int64_t scales_size = job.two_levels ? 8 : 4;
  char copy[kMaxChunk + 8] = {};
  const char *body = job.bodies[rank], *const copies[] = {copy};
  std::memcpy(copy, body + c * job.chunk_size * job.bits / 8,
              static_cast<size_t>((valid * job.bits + 7) / 8));
  std::memcpy(copy + kMaxChunk, body + job.scales_offset + c * scales_size, static_cast<size_t>(scales_size));
  QuantizeDecode one = job;
  one.bodies = copies;
  one.ranks = 1;
  one.scales_offset = kMaxChunk;
  one.into = {part, job.chunk_size, job.into.alpha.of(rank), false, job.into.add, false};
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
