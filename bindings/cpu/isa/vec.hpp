// Sixteen floats, for the instruction set that this translation unit is compiled for: Vec and the functions
// that each of the four files has, and what is made of them.
#pragma once

#if defined(GCK_AVX512)
#include "cpu/isa/vec_avx512.hpp"
#elif defined(GCK_AVX2)
#include "cpu/isa/vec_avx2.hpp"
#elif defined(GCK_NEON)
#include "cpu/isa/vec_neon.hpp"
#else
#include "cpu/isa/vec_portable.hpp"
#endif

namespace gck::GCK_ISA {

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
