// How the selected entries of a chunk become its row of the payload.
#pragma once

#include "cpu/isa/codes.hpp"
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

// Positions of 12 bits, two in three bytes, little end first.
inline void pack_12(const uint32_t* positions, int64_t count, char* row) {
  auto* out = reinterpret_cast<unsigned char*>(row);
  int64_t j = 0;
#if defined(GCK_AVX512)
  for (; j + kLanes <= count; j += kLanes, out += 24) {
    uint64_t four[4];  // of 16 bits each
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(four),
                        _mm512_cvtepi32_epi16(_mm512_loadu_si512(positions + j)));
    for (auto& bits : four) bits = _pext_u64(bits, 0x0fff0fff0fff0fff);
    const uint64_t joined[3] = {four[0] | four[1] << 48, four[1] >> 16 | four[2] << 32,
                                four[2] >> 32 | four[3] << 16};
    std::memcpy(out, joined, sizeof joined);
  }
#endif
  for (; j + 2 <= count; j += 2, out += 3) {
    const uint32_t two = (positions[j] & 0xfffu) | (positions[j + 1] & 0xfffu) << 12;
    out[0] = static_cast<unsigned char>(two);
    out[1] = static_cast<unsigned char>(two >> 8);
    out[2] = static_cast<unsigned char>(two >> 16);
  }
  if (j < count) {
    out[0] = static_cast<unsigned char>(positions[j]);
    out[1] = static_cast<unsigned char>(positions[j] >> 8 & 0xfu);
  }
}

inline void put_indices(const ChunkTopk& job, const uint32_t* positions, const ChunkRow& row) {
  if (job.index_bits == 12) return pack_12(positions, job.k, row.indices);
  auto* out = reinterpret_cast<uint16_t*>(row.indices);
  for (int64_t j = 0; j < job.k; ++j) out[j] = static_cast<uint16_t>(positions[j]);
}

// Codes of `bits` bits, multiples of top / qmax, where `top` is the key of the largest entry.
inline void put_scaled(const ChunkTopk& job, const ChunkScratch& s, int64_t k, int32_t top,
                       const ChunkRow& row) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to nearest even
  const int bits = job.value_bits;
  const auto qmax = static_cast<float>((1 << (bits - 1)) - 1);
  float scale = float_of(static_cast<uint32_t>(top)) / qmax;
  int8_t* const codes = s.codes;
  if (top >= kInfKey) {
    for (int64_t j = 0; j < k; ++j) codes[j] = static_cast<int8_t>(s.values[j] >= 0 ? qmax : -qmax);
  } else if (scale < float_of(0x00800000u)) {
    scale = 0.0f;
    for (int64_t j = 0; j < k; ++j) codes[j] = 0;
  } else {
    const float inverse = 1.0f / scale;
    for (int64_t j = 0; j < k; ++j) {
      float q = s.values[j] * inverse + magic - magic;
      q = q > qmax ? qmax : q;
      q = q < -qmax ? -qmax : q;
      codes[j] = static_cast<int8_t>(static_cast<int32_t>(q));
    }
  }
  for (int64_t j = 0; j < k; ++j) s.decoded[j] = static_cast<float>(codes[j]) * scale;
  *row.scales = scale;
  const int64_t whole = job.k / 8 * 8, rest = job.k - whole;
  for (int64_t j = k; j < whole + 8; ++j) codes[j] = 0;
  pack_bytes(codes, whole, bits, row.values);
  char last[8];
  pack_bytes(codes + whole, 8, bits, last);
  std::memcpy(row.values + whole * bits / 8, last, static_cast<size_t>((rest * bits + 7) / 8));
}

// A sign and one of two levels: the means of the magnitudes below the mean, and of the others.
inline void put_two_levels(const ChunkTopk& job, const ChunkScratch& s, int64_t k, const ChunkRow& row) {
  int64_t width = 1;
  while (width < job.k) width *= 2;
  const auto live = [k](int64_t j) { return j + kLanes <= k ? 0xffffu : j < k ? (1u << (k - j)) - 1 : 0u; };
  const auto entries = [&](int64_t j) { return select(live(j), load(s.values + j), set1(0.0f)); };
  const auto mean_of = [width](float* tree, int64_t count) {
    const float sum = tree_sum(tree, width);
    return count ? canonical(sum / static_cast<float>(count)) : 0.0f;
  };
  float *const tree = s.tree, *const low_tree = s.tree + (width > kLanes ? width : kLanes);
  for (int64_t j = 0; j < width; j += kLanes) store(tree + j, abs(entries(j)));
  const float mean = mean_of(tree, k);
  // Magnitudes are ordered as their keys. Where one is NaN so is the mean, which nothing reaches.
  const int32_t key = mean == mean ? key_of(mean) : INT32_MAX;
  int64_t highs = 0;
  for (int64_t j = 0; j < width; j += kLanes) {
    Mask reaching;
    const Halves both = split_at(entries(j), key, reaching);
    store(tree + j, both.high);
    store(low_tree + j, both.low);
    highs += __builtin_popcount(reaching & live(j));
  }
  float high = mean_of(tree, highs), low = mean_of(low_tree, k - highs);
  if (!highs) high = low;
  if (highs == k) low = high;
  row.scales[0] = low;
  row.scales[1] = high;
  const Vec far = set1(high), near = set1(low);
  for (int64_t j = 0; j < job.k; j += kLanes) {
    const Vec acc = load(s.values + j);
    const auto positive = ge_zero(acc), reaching = key_ge(acc, key);
    store(s.decoded + j, signed_like(acc, positive, select(reaching, far, near)));
    const uint32_t word = interleave(reaching & live(j), positive & live(j));
    const int64_t rest = job.k - j;
    std::memcpy(row.values + j / 4, &word,
                rest >= kLanes ? sizeof word : static_cast<size_t>((rest + 3) / 4));
  }
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
