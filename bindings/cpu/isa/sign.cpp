#include "cpu/isa/sign.hpp"

#include "cpu/isa/tree.hpp"
#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {
namespace {

constexpr int64_t kMaxChunk = 8192;

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

// err becomes acc; returns the sum of its magnitudes. Strictly upwards, since halves read side by side are
// streams that processors do not foresee; and `last`, the chunk before, is finished meanwhile unless this is
// the `First`, so that memory never waits for a pass over what the caches hold.
template <Dtype D, bool First>
inline float accumulate(const void* grad, int64_t at, float* err, uint32_t* words, int64_t chunk,
                        const Pending& last) {
  alignas(64) float tree[kMaxChunk / 2];
  const int64_t half = chunk / 2;
  const auto take = [&](int64_t i) {
    const Vec acc = add(load_as<D>(grad, at + i), load(err + i));
    store(err + i, acc);
    put_bits(words, i, ge_zero(acc));
    if constexpr (!First) last.subtract((i + kSkew) & (chunk - 1));
    return abs(acc);
  };
  for (int64_t i = 0; i < half; i += kLanes) store(tree + i, take(i));
  for (int64_t i = 0; i < half; i += kLanes) store(tree + i, add(load(tree + i), take(half + i)));
  return tree_sum(tree, half);
}

template <Dtype D>
int64_t compress_chunks(const SignChunks& job, int64_t begin, int64_t end) {
  constexpr int64_t size = D == Dtype::fp32 ? 4 : 2;
  int64_t cleared = 0;
  Pending last = Pending::of(nullptr, 0, 0);
  for (int64_t c = begin; c < end; ++c) {
    char* body = job.bodies + c / job.chunks_per_row * job.row_stride;
    const int64_t slot = c % job.chunks_per_row, at = c * job.chunk_size;
    auto* words = reinterpret_cast<uint32_t*>(body) + slot * (job.chunk_size / 32);
    auto* scale = reinterpret_cast<float*>(body + job.scales_offset) + slot;
    float* err = job.err + at;
    const int64_t valid = job.numel - at < job.chunk_size ? job.numel - at : job.chunk_size;
    if (valid == job.chunk_size) {
      const float sum = last.count ? accumulate<D, false>(job.grad, at, err, words, valid, last)
                                   : accumulate<D, true>(job.grad, at, err, words, valid, last);
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
    std::memcpy(grads, static_cast<const char*>(job.grad) + at * size, static_cast<size_t>(valid * size));
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

}  // namespace

int64_t sign_compress(const SignChunks& job, int64_t begin, int64_t end) {
  return with_dtype(job.grad_dtype, [&]<Dtype D>() { return compress_chunks<D>(job, begin, end); });
}

void sign_decompress(const SignDecode& job, int64_t chunk_begin, int64_t chunk_end) {
  for (int64_t c = chunk_begin; c < chunk_end; ++c) {
    const int64_t at = c * job.chunk_size;
    const int64_t end = at + job.chunk_size < job.numel ? at + job.chunk_size : job.numel;
    // alpha * -scale == -(alpha * scale), so one product a chunk does.
    const Vec plus = set1(job.alpha * job.scales[c]), minus = set1(-(job.alpha * job.scales[c]));
    for (int64_t i = at; i < end; i += kLanes) {
      const Mask bits = job.words[i / 32] >> (i % 32);
      Vec value = select(bits & 0xffffu, plus, minus);
      const auto rest = static_cast<int>(end - i);
      if (rest >= kLanes) {
        if (job.accumulate) value = add(load(job.out + i), value);
        store(job.out + i, value);
      } else {
        if (job.accumulate) value = add(load_part<Dtype::fp32>(job.out, i, rest), value);
        store_part(job.out + i, value, rest);
      }
    }
  }
}

}  // namespace gck::GCK_ISA
