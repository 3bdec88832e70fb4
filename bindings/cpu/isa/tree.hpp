// Sums whose order is part of the contract, and what they can be.
#pragma once

#include "cpu/isa/known.hpp"
#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {

// Adds the upper half of the lanes to the lower half until one number is left.
#if defined(GCK_AVX512) || defined(GCK_AVX2)
inline float halved(Vec a) {
#if defined(GCK_AVX512)
  const __m256 upper = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(a.v), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), upper);
#else
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#elif defined(GCK_NEON)
inline float halved(Vec a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}
#else
inline float halved(Vec a) {
  for (int half = kLanes / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) a.x[i] += a.x[i + half];
  }
  return a.x[0];
}
#endif

#if !defined(GCK_NEON)
// The largest of the lanes, which are keys.
inline int32_t largest_key(Vec keys) {
#if defined(GCK_AVX512)
  return _mm512_reduce_max_epi32(_mm512_castps_si512(keys.v));
#else
  alignas(64) float x[kLanes];
  store(x, keys);
  int32_t top = 0;
  for (float key : x) {
    const auto k = static_cast<int32_t>(bits_of(key));
    top = k > top ? k : top;
  }
  return top;
#endif
}
#endif

// Sum of t[0, width), width a power of two, in the same order; t is overwritten.
inline float tree_sum(float* t, int64_t width) {
  int64_t half = width / 2;
  for (; half > kLanes; half /= 2) {
    for (int64_t i = 0; i < half; i += kLanes) store(t + i, add(load(t + i), load(t + i + half)));
  }
  if (half == kLanes) return halved(add(load(t), load(t + kLanes)));
  if (width == kLanes) return halved(load(t));
  for (; half >= 1; half /= 2) {
    for (int64_t i = 0; i < half; ++i) t[i] += t[i + half];
  }
  return t[0];
}

// The first levels of the same tree, over value(i) of the vectors at i < width: hands what is left to put(i,
// sum) and returns its width, at most the half. Runs are read side by side: for what a near cache has.
template <typename Width, typename Value, typename Put>
GCK_INLINE int64_t first_sums(Width width, Value value, Put put) {
  const int64_t run = width / 8;
  if (run < kLanes) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i += kLanes) put(i, add(value(i), value(half + i)));
    return half;
  }
#pragma GCC unroll 1
  for (int64_t i = 0; i < run; i += kLanes) {
    const auto two = [&](int j) { return add(value(i + j * run), value(i + (j + 4) * run)); };
    const auto evens = add(two(0), two(2));
    put(i, add(evens, add(two(1), two(3))));
  }
  return run;
}

// Whether half of so many elements fit in registers.
template <typename Size>
constexpr bool is_short = false;
#if defined(GCK_AVX512)
template <int64_t Size>
constexpr bool is_short<Known<Size>> = Size <= 256;
#endif

// The sum in the same order of Size elements, which are short, and which value(i) makes strictly upwards.
template <int64_t Size, typename Value>
GCK_INLINE float upward_sum(Value value) {
  constexpr int half = Size / kLanes / 2;
  Vec sums[half];
#pragma GCC unroll 16
  for (int v = 0; v < 2 * half; ++v) {
    const Vec x = value(v * kLanes);
    sums[v % half] = v < half ? x : add(sums[v % half], x);
  }
  for (int width = half / 2; width >= 1; width /= 2) {
    for (int v = 0; v < width; ++v) sums[v] = add(sums[v], sums[v + width]);
  }
  return halved(sums[0]);
}

// Sum of |x[0, width)| in the same order; `t` has room for half as many.
template <typename Width>
inline float sum_of_magnitudes(const float* x, Width width, float* t) {
  const auto magnitude = [&](int64_t i) { return abs(load(x + i)); };
  return tree_sum(t, first_sums(width, magnitude, [&](int64_t i, Vec sum) { store(t + i, sum); }));
}

inline bool is_finite(float x) { return (bits_of(x) & 0x7fffffffu) < static_cast<uint32_t>(kInfKey); }

inline float canonical(float x) { return x == x ? x : float_of(static_cast<uint32_t>(kNanKey)); }

}  // namespace gck::GCK_ISA
