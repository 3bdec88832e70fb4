// What goes over a tile of a residual while it is in the nearest cache, before and after a compressor's own
// loop: that loop stays what it is without options.
#include "cpu/isa/residual.hpp"

#include "cpu/isa/doubles.hpp"
#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {
namespace {

constexpr int kVectors = kBlock / kLanes;
constexpr int64_t kAhead = 2 * kBlock;

struct Norms {
  Doubles l1, sq;
};

// The halving tree of the vectors j, j + Step, j + 2 * Step, ..., without their lanes, which `leaf` makes:
// depth first, so that what is half done stays in registers.
template <bool kL1, int Step = 1, typename F>
[[gnu::always_inline]] inline Norms tree(F& leaf, int j = 0) {
  if constexpr (2 * Step == kVectors) {
    const Doubles x = widened(abs(leaf(j))), y = widened(abs(leaf(j + Step)));
    return {add(x, y), squares(x, y)};
  } else {
    const Norms a = tree<kL1, 2 * Step>(leaf, j), b = tree<kL1, 2 * Step>(leaf, j + Step);
    if constexpr (kL1) return {add(a.l1, b.l1), add(a.sq, b.sq)};
    return {a.l1, add(a.sq, b.sq)};
  }
}

// grad + err, or err where there is no gradient.
template <Dtype D, bool kGrad>
inline Vec accumulated(const void* grad, const float* err, int64_t at) {
  if constexpr (kGrad) return add(load_as<D>(grad, at), load(err + at));
  return load(err + at);
}

// x[0, kBlock) = the same, with zeros for what is not finite and behind `count` elements; returns how many
// are not finite.
template <Dtype D, bool kGrad>
int finite_part(const void* grad, const float* err, int64_t at, int64_t count, float* x) {
  int wild = 0;
  for (int64_t i = 0; i < kBlock; i += kLanes, at += kLanes) {
    Vec a = set1(0.0f);
    if (const auto rest = static_cast<int>(count - i); rest >= kLanes) {
      a = accumulated<D, kGrad>(grad, err, at);
    } else if (rest > 0) {
      a = load_part<Dtype::fp32>(err, at, rest);
      if constexpr (kGrad) a = add(load_part<D>(grad, at, rest), a);
    }
    const Mask bad = key_ge(a, kInfKey);
    wild += __builtin_popcount(bad);
    store(x + i, select(bad, set1(0.0f), a));
  }
  return wild;
}

template <Dtype D, bool kGrad>
void sums(const void* grad, const float* err, int64_t count, const BlockSums& out) {
  constexpr int64_t size = D == Dtype::fp32 ? 4 : 2;
  for (int64_t at = 0, block = 0; at < count; at += kBlock, ++block) {
    Vec largest = set1(0.0f);
    Norms norms;
    if (count - at >= kBlock) {
      int64_t ahead = at + kAhead;
      const auto read = [&](int j) {
        const int64_t i = at + j * kLanes;
        if constexpr (kGrad) {  // the tree's order is none that the hardware foresees
          __builtin_prefetch(static_cast<const char*>(grad) + ahead * size);
          __builtin_prefetch(err + ahead, 1);
          ahead += kLanes;
        }
        const Vec x = accumulated<D, kGrad>(grad, err, i);
        if constexpr (kGrad) largest = max_key(largest, x);
        return x;
      };
      norms = tree<kGrad>(read);
    }
    int wild = 0;
    if (count - at < kBlock || (kGrad && key_ge(largest, kInfKey))) {
      alignas(64) float x[kBlock];
      wild = finite_part<D, kGrad>(grad, err, at, count - at, x);
      const auto read = [&](int j) { return load(x + j * kLanes); };
      norms = tree<kGrad>(read);
    }
    out.sq[block] = halved(norms.sq);
    if constexpr (kGrad) {
      out.l1[block] = halved(norms.l1);
      out.nonfinite[block] = wild;
    }
  }
}

}  // namespace

void residual_read(float* err, int64_t count, const ResidualReading& reading) {
  const auto [decay, clip] = reading;
  // Of two zeros, and where one is NaN, the second operand is taken: a NaN stays, and so does the sign of 0.
  for (int64_t i = 0; i < count; ++i) {
    float x = err[i] * decay;
    x = clip < x ? clip : x;
    x = -clip > x ? -clip : x;
    err[i] = x;
  }
}

void residual_sums(const void* grad, Dtype dtype, const float* err, int64_t count, const BlockSums& out) {
  if (grad == nullptr) return sums<Dtype::fp32, false>(grad, err, count, out);
  with_dtype(dtype, [&]<Dtype D>() { sums<D, true>(grad, err, count, out); });
}

}  // namespace gck::GCK_ISA
