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

inline void put_indices(const ChunkTopk& job, const uint32_t* positions, const ChunkRow& row) {
  if (job.index_bits == 12) {
    pack_codes(positions, job.k, 12, reinterpret_cast<unsigned char*>(row.indices));
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
  pack_codes(s.codes, job.k, job.value_bits, reinterpret_cast<unsigned char*>(row.values));
}

// A sign and one of two levels: the means of the magnitudes below the mean, and of the others.
inline void put_two_levels(const ChunkTopk& job, const ChunkScratch& s, int64_t k, const ChunkRow& row) {
  int64_t width = 1;
  while (width < job.k) width *= 2;
  float* tree = s.tree;
  // Mean of the magnitudes that `chosen` tells, and their number; 0 of none.
  const auto mean_of = [&](auto chosen, int64_t& count) {
    int64_t some = 0;
    for (int64_t j = 0; j < k; ++j) {
      const float x = magnitude(s.values[j]);
      const bool in = chosen(x);
      tree[j] = in ? x : 0.0f;
      some += in;
    }
    for (int64_t j = k; j < width; ++j) tree[j] = 0.0f;
    count = some;
    const float sum = tree_sum(tree, width);
    return some ? canonical(sum / static_cast<float>(some)) : 0.0f;
  };
  int64_t all, highs, lows;
  const float mean = mean_of([](float) { return true; }, all);
  float high = mean_of([mean](float x) { return x >= mean; }, highs);
  float low = mean_of([mean](float x) { return !(x >= mean); }, lows);
  if (!highs) high = low;
  if (!lows) low = high;
  row.scales[0] = low;
  row.scales[1] = high;
  for (int64_t j = 0; j < job.k; ++j) {
    const bool positive = s.values[j] >= 0, is_high = magnitude(s.values[j]) >= mean;
    s.codes[j] = j < k ? static_cast<uint32_t>(positive) << 1 | static_cast<uint32_t>(is_high) : 0;
    const float level = is_high ? high : low;
    s.decoded[j] = positive ? level : -level;
  }
  pack_codes(s.codes, job.k, 2, reinterpret_cast<unsigned char*>(row.values));
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
