// Sixteen floats, for the instruction set that this translation unit is compiled for.
#pragma once

#include "cpu/isa/leaves.hpp"
#include "cpu/round.hpp"

#if defined(GCK_AVX512) || defined(GCK_AVX2)
#include <immintrin.h>
#endif

// For functions that compilers find too large, and whose vectors would then go through memory.
#define GCK_INLINE inline __attribute__((always_inline))

namespace gck::GCK_ISA {

constexpr int kLanes = 16;
using Mask = uint32_t;  // bit i is lane i

#if defined(GCK_AVX512)

struct Vec {
  __m512 v;
};

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline __m256i load_half(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Vec load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(p)), 16))};
}
inline Vec load_fp16(const uint16_t* p) { return {_mm512_cvtph_ps(load_half(p))}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store_past_caches(float* p, Vec a) { _mm512_stream_ps(p, a.v); }  // p aligned to a Vec
inline void order_stores() { _mm_sfence(); }
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// Lane by lane the larger key, where `best` holds keys already.
inline Vec max_key(Vec best, Vec a) {
  const __m512i key = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff));
  return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(best.v), key))};
}
inline Mask ge_zero(Vec a) { return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GE_OQ); }
inline Mask is_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
inline Vec canonical(Vec a) {
  return {_mm512_mask_mov_ps(a.v, static_cast<__mmask16>(is_nan(a)),
                             _mm512_castsi512_ps(_mm512_set1_epi32(kNanKey)))};
}
inline Mask key_ge(Vec a, int32_t threshold) {
  const __m512i key = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff));
  return _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(threshold));
}
inline bool any_key_ge(Vec a, Vec b, int32_t threshold) {
  return key_ge(a, threshold) | key_ge(b, threshold);
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(m), no.v, yes.v)};
}
// Canonical fp32 rounded to bf16 or fp16, nearest even: back in fp32, and as 16 narrow numbers.
inline __m512i bf16_bits(Vec a) {  // in the upper halves
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}
inline __m256i fp16_bits(Vec a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec round_bf16(Vec a) { return {_mm512_castsi512_ps(bf16_bits(a))}; }
inline Vec round_fp16(Vec a) { return {_mm512_cvtph_ps(fp16_bits(a))}; }
inline void store_bf16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(a), 16)));
}
inline void store_fp16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), fp16_bits(a));
}
// Compress in a register, then store all lanes: compressing stores are slow on Zen 4.
inline void compress(float* p, Mask m, Vec a) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(m), a.v));
}
// Lane numbers from base on, of the lanes in m.
inline void compress_index(uint32_t* p, Mask m, uint32_t base) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(base)));
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(m), index));
}

inline void compress_words(uint32_t* p, Mask m, const uint32_t* words, uint32_t plus) {
  const __m512i sum = _mm512_add_epi32(_mm512_loadu_si512(words), _mm512_set1_epi32(static_cast<int>(plus)));
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(m), sum));
}

#elif defined(GCK_AVX2)

struct Vec {
  __m256 lo, hi;
};

inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m128i load_half(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m256 widen_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16));
}
inline Vec load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline Vec load_fp16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_half(p)), _mm256_cvtph_ps(load_half(p + 8))};
}
inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_past_caches(float* p, Vec a) {  // p aligned to a Vec
  _mm256_stream_ps(p, a.lo);
  _mm256_stream_ps(p + 8, a.hi);
}
inline void order_stores() { _mm_sfence(); }
inline Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec abs(Vec a) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, magnitude), _mm256_and_ps(a.hi, magnitude)};
}
inline Vec max_key(Vec best, Vec a) {
  const auto larger = [](__m256 x, __m256 y) {
    const __m256i key = _mm256_and_si256(_mm256_castps_si256(y), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(x), key));
  };
  return {larger(best.lo, a.lo), larger(best.hi, a.hi)};
}
inline Mask join(__m256 lo, __m256 hi) {
  return static_cast<Mask>(_mm256_movemask_ps(lo)) | static_cast<Mask>(_mm256_movemask_ps(hi)) << 8;
}
inline Mask ge_zero(Vec a) {
  const __m256 zero = _mm256_setzero_ps();
  return join(_mm256_cmp_ps(a.lo, zero, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, zero, _CMP_GE_OQ));
}
inline Mask is_nan(Vec a) {
  return join(_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q));
}
inline Vec canonical(Vec a) {
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(kNanKey));
  const auto one = [&](__m256 x) { return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)); };
  return {one(a.lo), one(a.hi)};
}
inline Mask key_ge(Vec a, int32_t threshold) {
  const __m256i below = _mm256_set1_epi32(threshold - 1);  // threshold >= 0: no overflow
  const auto ge = [&](__m256 x) {
    const __m256i key = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(key, below));
  };
  return join(ge(a.lo), ge(a.hi));
}
inline bool any_key_ge(Vec a, Vec b, int32_t threshold) {
  const __m256i below = _mm256_set1_epi32(threshold - 1);
  const auto ge = [&](__m256 x) {
    const __m256i key = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_cmpgt_epi32(key, below);
  };
  const __m256i any =
      _mm256_or_si256(_mm256_or_si256(ge(a.lo), ge(a.hi)), _mm256_or_si256(ge(b.lo), ge(b.hi)));
  return !_mm256_testz_si256(any, any);
}
inline __m256 widen_mask(Mask m) {  // bit i -> all bits of lane i
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i on = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(m)), bit);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(on, bit));
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, widen_mask(m)),
          _mm256_blendv_ps(no.hi, yes.hi, widen_mask(m >> 8))};
}
// Canonical fp32 rounded to bf16 or fp16, nearest even: back in fp32, and as 16 narrow numbers.
inline __m256i bf16_bits(__m256 x) {  // in the upper halves
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
}
inline __m128i fp16_bits(__m256 x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec round_bf16(Vec a) {
  return {_mm256_castsi256_ps(bf16_bits(a.lo)), _mm256_castsi256_ps(bf16_bits(a.hi))};
}
inline Vec round_fp16(Vec a) { return {_mm256_cvtph_ps(fp16_bits(a.lo)), _mm256_cvtph_ps(fp16_bits(a.hi))}; }
inline void store_bf16(uint16_t* p, Vec a) {
  const __m256i lo = _mm256_srli_epi32(bf16_bits(a.lo), 16), hi = _mm256_srli_epi32(bf16_bits(a.hi), 16);
  const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), both);
}
inline void store_fp16(uint16_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), fp16_bits(a.lo));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), fp16_bits(a.hi));
}
// For each byte, the positions of its set bits. A table, because the instruction that could compute it
// (pext) takes hundreds of cycles on some processors with AVX2.
struct FrontLanes {
  uint64_t of[256];
};
constexpr FrontLanes front_lanes_table() {
  FrontLanes table{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int bit = 0, slot = 0; bit < 8; ++bit) {
      if (byte >> bit & 1) table.of[byte] |= static_cast<uint64_t>(bit) << 8 * slot++;
    }
  }
  return table;
}
static constexpr FrontLanes kFrontLanes = front_lanes_table();
inline __m256i front_lanes(Mask m) {  // positions of the set bits of m, as a permutation
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kFrontLanes.of[m & 0xff])));
}
inline void compress(float* p, Mask m, Vec a) {
  _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(a.lo, front_lanes(m)));
  p += __builtin_popcount(m & 0xff);
  _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(a.hi, front_lanes(m >> 8)));
}
inline void compress_index(uint32_t* p, Mask m, uint32_t base) {
  const auto put = [&](Mask half, uint32_t first) {
    const __m256i index = _mm256_add_epi32(front_lanes(half), _mm256_set1_epi32(static_cast<int>(first)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), index);
    p += __builtin_popcount(half & 0xff);
  };
  put(m & 0xff, base);
  put(m >> 8, base + 8);
}

inline void compress_words(uint32_t* p, Mask m, const uint32_t* words, uint32_t plus) {
  const auto put = [&](Mask half, const uint32_t* from) {
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i sum = _mm256_add_epi32(word, _mm256_set1_epi32(static_cast<int>(plus)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(sum, front_lanes(half)));
    p += __builtin_popcount(half & 0xff);
  };
  put(m & 0xff, words);
  put(m >> 8, words + 8);
}

#else  // portable: plain loops that any compiler turns into whatever the machine has

struct Vec {
  float x[kLanes];
};

template <typename F>
inline Vec each(F f) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.x[i] = f(i);
  return r;
}
template <typename F>
inline Mask where(F f) {
  Mask m = 0;
  for (int i = 0; i < kLanes; ++i) m |= static_cast<Mask>(f(i)) << i;
  return m;
}
inline Vec load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline Vec load_bf16(const uint16_t* p) {
  return each([&](int i) { return float_of(static_cast<uint32_t>(p[i]) << 16); });
}
inline Vec load_fp16(const uint16_t* p) {
  return each([&](int i) { return from_fp16(p[i]); });
}
inline void store(float* p, Vec a) { std::memcpy(p, a.x, sizeof a.x); }
inline void store_past_caches(float* p, Vec a) { store(p, a); }
inline void order_stores() {}
inline Vec set1(float x) {
  return each([&](int) { return x; });
}
inline Vec add(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] + b.x[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] - b.x[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] * b.x[i]; });
}
inline Vec div(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] / b.x[i]; });
}
inline Vec abs(Vec a) {
  return each([&](int i) { return float_of(bits_of(a.x[i]) & 0x7fffffffu); });
}
inline Vec max_key(Vec best, Vec a) {
  return each([&](int i) {
    const uint32_t key = bits_of(a.x[i]) & 0x7fffffffu;
    return float_of(key > bits_of(best.x[i]) ? key : bits_of(best.x[i]));
  });
}
inline Mask ge_zero(Vec a) {
  return where([&](int i) { return a.x[i] >= 0; });
}
inline Mask is_nan(Vec a) {
  return where([&](int i) { return a.x[i] != a.x[i]; });
}
inline Vec canonical(Vec a) {
  return each([&](int i) { return a.x[i] == a.x[i] ? a.x[i] : float_of(kNanKey); });
}
inline Mask key_ge(Vec a, int32_t threshold) {
  return where([&](int i) { return static_cast<int32_t>(bits_of(a.x[i]) & 0x7fffffffu) >= threshold; });
}
inline bool any_key_ge(Vec a, Vec b, int32_t threshold) {
  return key_ge(a, threshold) | key_ge(b, threshold);
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return each([&](int i) { return (m >> i & 1) ? yes.x[i] : no.x[i]; });
}
// Canonical fp32 rounded to bf16 or fp16, nearest even: back in fp32, and as 16 narrow numbers.
inline Vec round_bf16(Vec a) {
  return each([&](int i) { return float_of(static_cast<uint32_t>(to_bf16(a.x[i])) << 16); });
}
inline Vec round_fp16(Vec a) {
  return each([&](int i) { return from_fp16(to_fp16(a.x[i])); });
}
inline void store_bf16(uint16_t* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(a.x[i]);
}
inline void store_fp16(uint16_t* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_fp16(a.x[i]);
}
inline void compress(float* p, Mask m, Vec a) {
  for (; m; m &= m - 1) *p++ = a.x[__builtin_ctz(m)];
}
inline void compress_index(uint32_t* p, Mask m, uint32_t base) {
  for (; m; m &= m - 1) *p++ = base + static_cast<uint32_t>(__builtin_ctz(m));
}

inline void compress_words(uint32_t* p, Mask m, const uint32_t* words, uint32_t plus) {
  for (; m; m &= m - 1) *p++ = words[__builtin_ctz(m)] + plus;
}

#endif

// Position of the lowest set bit; anything where there is none.
inline uint32_t lowest_bit(uint64_t bits) {
#if defined(GCK_AVX512) || defined(GCK_AVX2)
  return static_cast<uint32_t>(_tzcnt_u64(bits));
#else
  return bits ? static_cast<uint32_t>(__builtin_ctzll(bits)) : 0;
#endif
}

template <Dtype D>
inline Vec load_as(const void* base, int64_t i) {
  if constexpr (D == Dtype::fp32) return load(static_cast<const float*>(base) + i);
  if constexpr (D == Dtype::bf16) return load_bf16(static_cast<const uint16_t*>(base) + i);
  if constexpr (D == Dtype::fp16) return load_fp16(static_cast<const uint16_t*>(base) + i);
  if constexpr (D == Dtype::none) return set1(-0.0f);  // x + (-0.0) is x for every x
}

// The hardware reads ahead within a page, and at the next one waits for its address to be translated. A loop
// over grad[at] and err that calls this every kPageEntries has that done while there are two pages before it.
constexpr int64_t kPageEntries = 1024;
template <Dtype D>
inline void ask_for_pages(const void* grad, int64_t at, const float* err) {
  constexpr int64_t size = D == Dtype::fp32 ? 4 : 2;
  __builtin_prefetch(static_cast<const char*>(grad) + (at + 2 * kPageEntries) * size, 0, 2);
  __builtin_prefetch(err + 2 * kPageEntries, 1, 2);
}

// Copies `count` < 16 elements into a full vector's worth, zeros behind them.
template <Dtype D>
inline Vec load_part(const void* base, int64_t i, int count) {
  constexpr size_t size = D == Dtype::fp32 ? 4 : 2;
  alignas(64) char whole[kLanes * 4] = {};
  std::memcpy(whole, static_cast<const char*>(base) + i * static_cast<int64_t>(size),
              size * static_cast<size_t>(count));
  return load_as<D>(whole, 0);
}

inline void store_part(float* p, Vec a, int count) {
  alignas(64) float whole[kLanes];
  store(whole, a);
  std::memcpy(p, whole, sizeof(float) * static_cast<size_t>(count));
}

// Canonical fp32 as a receiver of `dtype` will see it.
inline Vec rounded(Vec a, Dtype dtype) {
  return dtype == Dtype::fp32 ? a : dtype == Dtype::bf16 ? round_bf16(a) : round_fp16(a);
}

// Calls f.template operator()<D>() for the run-time dtype.
template <typename F>
inline auto with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::bf16:
      return f.template operator()<Dtype::bf16>();
    case Dtype::fp16:
      return f.template operator()<Dtype::fp16>();
    default:
      return f.template operator()<Dtype::fp32>();
  }
}

}  // namespace gck::GCK_ISA
