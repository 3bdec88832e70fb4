// Sixteen doubles: what sums of a vector's lanes are taken in. `squares` is a * a + b * b of what was fp32,
// whose squares are exact, so that a fused multiply-add rounds as a sum of products does.
#pragma once

#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {

#if defined(GCK_AVX512)

struct Doubles {
  __m512d lo, hi;
};

inline Doubles widened(Vec a) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))};
}
inline Doubles squares(Doubles a, Doubles b) {
  return {_mm512_fmadd_pd(b.lo, b.lo, _mm512_mul_pd(a.lo, a.lo)),
          _mm512_fmadd_pd(b.hi, b.hi, _mm512_mul_pd(a.hi, a.hi))};
}
inline Doubles add(Doubles a, Doubles b) { return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)}; }
inline void store_halved(double* eight, Doubles a) { _mm512_storeu_pd(eight, _mm512_add_pd(a.lo, a.hi)); }

#elif defined(GCK_AVX2)

struct Doubles {
  __m256d v[4];
};

inline Doubles widened(Vec a) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(a.lo)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.lo, 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(a.hi)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.hi, 1))}};
}
inline Doubles squares(Doubles a, Doubles b) {
  const auto two = [](__m256d x, __m256d y) { return _mm256_fmadd_pd(y, y, _mm256_mul_pd(x, x)); };
  return {{two(a.v[0], b.v[0]), two(a.v[1], b.v[1]), two(a.v[2], b.v[2]), two(a.v[3], b.v[3])}};
}
inline Doubles add(Doubles a, Doubles b) {
  return {{_mm256_add_pd(a.v[0], b.v[0]), _mm256_add_pd(a.v[1], b.v[1]), _mm256_add_pd(a.v[2], b.v[2]),
           _mm256_add_pd(a.v[3], b.v[3])}};
}
inline void store_halved(double* eight, Doubles a) {
  _mm256_storeu_pd(eight, _mm256_add_pd(a.v[0], a.v[2]));
  _mm256_storeu_pd(eight + 4, _mm256_add_pd(a.v[1], a.v[3]));
}

#elif defined(GCK_NEON)

struct Doubles {
  float64x2_t v[8];
};

inline Doubles widened(Vec a) {
  Doubles r;
  for (int i = 0; i < 4; ++i) {
    r.v[2 * i] = vcvt_f64_f32(vget_low_f32(a.v[i]));
    r.v[2 * i + 1] = vcvt_high_f64_f32(a.v[i]);
  }
  return r;
}
inline Doubles squares(Doubles a, Doubles b) {
  for (int i = 0; i < 8; ++i) a.v[i] = vfmaq_f64(vmulq_f64(a.v[i], a.v[i]), b.v[i], b.v[i]);
  return a;
}
inline Doubles add(Doubles a, Doubles b) {
  for (int i = 0; i < 8; ++i) a.v[i] = vaddq_f64(a.v[i], b.v[i]);
  return a;
}
inline void store_halved(double* eight, Doubles a) {
  for (int i = 0; i < 4; ++i) vst1q_f64(eight + 2 * i, vaddq_f64(a.v[i], a.v[i + 4]));
}

#else

struct Doubles {
  double x[kLanes];
};

inline Doubles widened(Vec a) {
  Doubles r;
  for (int i = 0; i < kLanes; ++i) r.x[i] = a.x[i];
  return r;
}
inline Doubles squares(Doubles a, Doubles b) {
  for (int i = 0; i < kLanes; ++i) a.x[i] = a.x[i] * a.x[i] + b.x[i] * b.x[i];
  return a;
}
inline Doubles add(Doubles a, Doubles b) {
  for (int i = 0; i < kLanes; ++i) a.x[i] += b.x[i];
  return a;
}
inline void store_halved(double* eight, Doubles a) {
  for (int i = 0; i < kLanes / 2; ++i) eight[i] = a.x[i] + a.x[i + kLanes / 2];
}

#endif

// Adds the upper half of the lanes to the lower half until one number is left.
inline double halved(Doubles a) {
  double t[kLanes / 2];
  store_halved(t, a);
  for (int half = kLanes / 4; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) t[i] += t[i + half];
  }
  return t[0];
}

}  // namespace gck::GCK_ISA
