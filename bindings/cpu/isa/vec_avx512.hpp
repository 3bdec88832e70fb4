// Vec of AVX-512: one register, and masks of its own kind.
#pragma once

#include <immintrin.h>

#include "cpu/isa/lanes.hpp"

namespace gck::GCK_ISA {

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
// Hides where a comes from: GCC would take a broadcast apart and do it again for each use, lane by lane.
inline Vec in_register(Vec a) {
  asm("" : "+v"(a.v));
  return a;
}
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
inline Vec compressed(Mask m, Vec a) { return {_mm512_maskz_compress_ps(static_cast<__mmask16>(m), a.v)}; }
// Compress in a register, then store all lanes: compressing stores are slow on Zen 4.
inline void compress(float* p, Mask m, Vec a) { store(p, compressed(m, a)); }
// Lane numbers from base on, of the lanes in m.
inline void compress_index(uint32_t* p, Mask m, uint32_t base) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(base)));
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(m), index));
}

inline Vec compressed_words(Mask m, const uint32_t* words, uint32_t plus) {
  const __m512i sum = _mm512_add_epi32(_mm512_loadu_si512(words), _mm512_set1_epi32(static_cast<int>(plus)));
  return compressed(m, {_mm512_castsi512_ps(sum)});
}
inline void compress_words(uint32_t* p, Mask m, const uint32_t* words, uint32_t plus) {
  _mm512_storeu_si512(p, _mm512_castps_si512(compressed_words(m, words, plus).v));
}
// Lane i goes to lane (i + by) % 16.
inline Vec rotated(Vec a, int by) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_permutexvar_ps(_mm512_sub_epi32(lane, _mm512_set1_epi32(by)), a.v)};
}

// Position of the lowest set bit; anything where there is none.
inline uint32_t lowest_bit(uint64_t bits) { return static_cast<uint32_t>(_tzcnt_u64(bits)); }

}  // namespace gck::GCK_ISA
