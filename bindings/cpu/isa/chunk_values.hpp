// How the selected entries of a chunk become its row of the payload.
#pragma once

#include "cpu/isa/leaves.hpp"
#include "cpu/isa/tree.hpp"
#include "cpu/packing.hpp"
#include "cpu/round.hpp"

namespace gck::GCK_ISA {

// Where one chunk's part of each field lies.
struct ChunkRow {
  char* values;
  float* scales;
  char* indices;
};

inline ChunkRow row_of(const ChunkTopk& job, int64_t c) {
  char* body = job.bodies + c / job.chunks_per_row * job.row_stride;
  const int64_t slot = c % job.chunks_per_row;
  return {body + slot * packed_bytes(job.k, job.value_bits),
          reinterpret_cast<float*>(body + job.scales_offset) + slot * (job.value_bits == 2 ? 2 : 1),
          body + job.indices_offset + slot * packed_bytes(job.k, job.index_bits)};
}

inline float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffffu); }

// pack_codes, sixteen codes at a time where there are instructions for it.
inline void pack_row(const uint32_t* codes, int64_t count, int bits, char* row) {
  auto* out = reinterpret_cast<unsigned char*>(row);
  int64_t j = 0;
#if defined(GCK_AVX512)
  for (; j + kLanes <= count; j += kLanes, out += 2 * bits) {
    const __m512i sixteen = _mm512_loadu_si512(codes + j);
    uint64_t packed[4];  // two eights of codes of a byte; four fours of 16 bits
    if (bits == 12) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), _mm512_cvtepi32_epi16(sixteen));
      for (auto& four : packed) four = _pext_u64(four, 0x0fff0fff0fff0fff);
      const uint64_t joined[3] = {packed[0] | packed[1] << 48, packed[1] >> 16 | packed[2] << 32,
                                  packed[2] >> 32 | packed[3] << 16};
      std::memcpy(out, joined, sizeof joined);
      continue;
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi32_epi8(sixteen));
    if (bits == 8) {
      std::memcpy(out, packed, 16);
    } else if (bits == 4) {
      const uint64_t all = _pext_u64(packed[0], 0x0f0f0f0f0f0f0f0f) | _pext_u64(packed[1], 0x0f0f0f0f0f0f0f0f)
                                                                          << 32;
      std::memcpy(out, &all, 8);
    } else {
      const auto all = static_cast<uint32_t>(_pext_u64(packed[0], 0x0303030303030303) |
                                             _pext_u64(packed[1], 0x0303030303030303) << 16);
      std::memcpy(out, &all, 4);
    }
  }
#endif
  pack_codes(codes + j, count - j, bits, out);
}

inline void put_indices(const ChunkTopk& job, const uint32_t* positions, const ChunkRow& row) {
  if (job.index_bits == 12) {
    pack_row(positions, job.k, 12, row.indices);
    return;
  }
  auto* out = reinterpret_cast<uint16_t*>(row.indices);
  for (int64_t j = 0; j < job.k; ++j) out[j] = static_cast<uint16_t>(positions[j]);
}

// Codes of `bits` bits, multiples of top / qmax, where `top` is the key of the largest entry.
inline void put_scaled(const ChunkTopk& job, const ChunkScratch& s, int64_t k, int32_t top,
                       const ChunkRow& row) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to nearest even
  const auto qmax = static_cast<float>((1 << (job.value_bits - 1)) - 1);
  float scale = float_of(static_cast<uint32_t>(top)) / qmax;
  auto* codes = reinterpret_cast<int32_t*>(s.codes);
  if (top >= kInfKey) {
    for (int64_t j = 0; j < job.k; ++j)
      codes[j] = s.values[j] >= 0 ? static_cast<int>(qmax) : -static_cast<int>(qmax);
  } else if (scale < float_of(0x00800000u)) {
    scale = 0.0f;
    for (int64_t j = 0; j < job.k; ++j) codes[j] = 0;
  } else {
    const float inverse = 1.0f / scale;
    for (int64_t j = 0; j < job.k; ++j) {
      float q = s.values[j] * inverse + magic - magic;
      q = q > qmax ? qmax : q;
      q = q < -qmax ? -qmax : q;
      codes[j] = static_cast<int32_t>(q);
    }
  }
  for (int64_t j = k; j < job.k; ++j) codes[j] = 0;
  for (int64_t j = 0; j < k; ++j) s.decoded[j] = static_cast<float>(codes[j]) * scale;
  *row.scales = scale;
  pack_row(s.codes, job.k, job.value_bits, row.values);
}

// A sign and one of two levels: the means of the magnitudes below the mean, and of the others.
inline void put_two_levels(const ChunkTopk& job, const ChunkScratch& s, int64_t k, const ChunkRow& row) {
  int64_t width = 1;
  while (width < job.k) width *= 2;
  const Vec zero = set1(0.0f);
  const auto live = [k](int64_t j) { return j + kLanes <= k ? 0xffffu : j < k ? (1u << (k - j)) - 1 : 0u; };
  const auto mean_of = [width](float* tree, int64_t count) {
    const float sum = tree_sum(tree, width);
    return count ? canonical(sum / static_cast<float>(count)) : 0.0f;
  };
  float *const first = s.tree, *const second = s.tree + (width > kLanes ? width : kLanes);
  for (int64_t j = 0; j < width; j += kLanes)
    store(first + j, select(live(j), abs(load(s.values + j)), zero));
  const float mean = mean_of(first, k);
  // Magnitudes are ordered as their keys. Where one is NaN so is the mean, which nothing reaches.
  const int32_t key = mean == mean ? key_of(mean) : INT32_MAX;
  int64_t highs = 0;
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec x = abs(load(s.values + j));
    const Mask high = key_ge(x, key) & live(j);
    store(first + j, select(high, x, zero));
    store(second + j, select(live(j) & ~high, x, zero));
    highs += __builtin_popcount(high);
  }
  float high = mean_of(first, highs), low = mean_of(second, k - highs);
  if (!highs) high = low;
  if (highs == k) low = high;
  row.scales[0] = low;
  row.scales[1] = high;
  for (int64_t j = 0; j < job.k; ++j) {
    const bool positive = s.values[j] >= 0, is_high = magnitude(s.values[j]) >= mean;
    s.codes[j] = j < k ? static_cast<uint32_t>(positive) << 1 | static_cast<uint32_t>(is_high) : 0;
    const float level = is_high ? high : low;
    s.decoded[j] = positive ? level : -level;
  }
  pack_row(s.codes, job.k, 2, row.values);
}

// Writes job.k values, of which the first k are entries and the rest zeros; decoded[0, k) is what a
// receiver will read.
inline void put_values(const ChunkTopk& job, const ChunkScratch& s, int64_t k, int32_t top,
                       const ChunkRow& row) {
  switch (job.value_bits) {
    case 32:
    case 16: {
      const Dtype dtype = job.value_bits == 32 ? Dtype::fp32 : Dtype::bf16;
      for (int64_t j = 0; j < job.k; ++j) s.decoded[j] = store_rounded(row.values, dtype, j, s.values[j]);
      break;
    }
    case 2:
      put_two_levels(job, s, k, row);
      break;
    default:
      put_scaled(job, s, k, top, row);
  }
}

}  // namespace gck::GCK_ISA
