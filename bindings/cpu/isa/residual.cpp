// What goes over a tile of a residual while it is in the nearest cache, before and after a compressor's own
// loop: that loop stays what it is without options.
#include "cpu/isa/residual.hpp"

#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {
namespace {

constexpr int64_t kHalf = kBlock / 2;

// Sum of t[0, kHalf): the upper half is added to the lower one until one number is left.
inline double halved(double* t) {
  for (int64_t half = kHalf / 2; half >= 1; half /= 2) {
    for (int64_t i = 0; i < half; ++i) t[i] += t[i + half];
  }
  return t[0];
}

// x[0, kBlock) = grad + err, or err, with zeros for what is not finite and behind `count` elements; returns
// how many are not finite.
template <Dtype D, bool kGrad>
inline int finite_part(const void* grad, const float* err, int64_t at, int64_t count, float* x) {
  int wild = 0;
  for (int64_t i = 0; i < kBlock; i += kLanes, at += kLanes) {
    const auto rest = static_cast<int>(count - i < kLanes ? (count > i ? count - i : 0) : kLanes);
    Vec a = rest == kLanes ? load(err + at) : load_part<Dtype::fp32>(err, at, rest);
    if constexpr (kGrad) a = add(rest == kLanes ? load_as<D>(grad, at) : load_part<D>(grad, at, rest), a);
    const Mask bad = key_ge(a, kInfKey);
    wild += __builtin_popcount(bad);
    store(x + i, select(bad, set1(0.0f), a));
  }
  return wild;
}

template <Dtype D, bool kGrad>
void sums(const void* grad, const float* err, int64_t count, const BlockSums& out) {
  alignas(64) float x[kBlock];
  alignas(64) double l1[kHalf], sq[kHalf];
  for (int64_t at = 0, block = 0; at < count; at += kBlock, ++block) {
    const int wild = finite_part<D, kGrad>(grad, err, at, count - at, x);
    for (int64_t i = 0; i < kHalf; ++i) {
      const double a = x[i], b = x[i + kHalf];
      sq[i] = a * a + b * b;
      if constexpr (kGrad) l1[i] = __builtin_fabs(a) + __builtin_fabs(b);
    }
    out.sq[block] = halved(sq);
    if constexpr (kGrad) {
      out.l1[block] = halved(l1);
      out.nonfinite[block] = wild;
    }
  }
}

}  // namespace

void residual_read(float* err, int64_t count, float decay, float clip) {
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
