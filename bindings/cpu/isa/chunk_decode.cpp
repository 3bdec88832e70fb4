// The entries of chunks, unpacked by vectors and added one by one.
#include "cpu/isa/chunk_decode.hpp"

#include "cpu/isa/codes.hpp"
#include "cpu/isa/vec.hpp"
#include "cpu/packing.hpp"
#include "cpu/round.hpp"

namespace gck::GCK_ISA {
namespace {

// Where one rank's part of a chunk lies in a field that has `nbytes` bytes a chunk, `offset` bytes from the
// start of the body.
inline const unsigned char* row_of(const ChunkTopkDecode& job, int64_t offset, int64_t rank, int64_t chunk,
                                   int64_t nbytes) {
  return reinterpret_cast<const unsigned char*>(job.bodies[rank] + offset + chunk * nbytes);
}

inline int64_t valid_of(const ChunkTopkDecode& job, int64_t chunk) {
  const int64_t left = job.numel - chunk * job.chunk_size;
  return left < job.chunk_size ? left : job.chunk_size;
}

// Codes of 12 bits; `out` has room for 32 more.
inline void unpack_12(const unsigned char* row, int64_t count, uint16_t* out) {
#if defined(GCK_AVX512)
  // A quarter of the vector takes twelve bytes, with eight codes: each to the 16 bits that hold it, those at
  // odd places four bits too high.
  const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
  const __m512i pairs =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11));
  const __m512i places = _mm512_set1_epi32(4 << 16), low = _mm512_set1_epi16(0xfff);
  int64_t left = packed_bytes(count, 12);
  for (int64_t j = 0; j < count; j += 32, row += 48, left -= 48) {
    const __mmask64 there = left >= 48 ? (uint64_t{1} << 48) - 1 : (uint64_t{1} << left) - 1;
    const __m512i bytes = _mm512_permutexvar_epi32(quarters, _mm512_maskz_loadu_epi8(there, row));
    const __m512i codes = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, pairs), places);
    _mm512_storeu_si512(out + j, _mm512_and_si512(codes, low));
  }
#else
  for (int64_t j = 0; j < count; j += 2, row += 3) {
    const bool both = j + 1 < count;  // a lone code has two bytes
    const uint32_t two = row[0] | row[1] << 8 | (both ? row[2] << 16 : 0);
    out[j] = two & 0xfff;
    out[j + 1] = static_cast<uint16_t>(two >> 12);
  }
#endif
}

inline void read_positions(const ChunkTopkDecode& job, int64_t rank, int64_t chunk, uint16_t* out) {
  const int64_t nbytes = packed_bytes(job.k, job.index_bits);
  const unsigned char* row = row_of(job, job.indices_offset, rank, chunk, nbytes);
  if (job.index_bits == 12)
    unpack_12(row, job.k, out);
  else
    std::memcpy(out, row, static_cast<size_t>(nbytes));
}

// Vectors of codes as they are decoded; returns how many entries have been.
template <typename Values>
inline int64_t read_vectors(const Values& values, const unsigned char* row, int64_t count, float* out) {
  const int64_t whole = count / kLanes;
  for (int64_t v = 0; v < whole; ++v)
    store(out + v * kLanes, values.at(reinterpret_cast<const char*>(row), static_cast<int>(v)));
  return whole * kLanes;
}

template <Dtype D>
struct Narrow {
  float alpha;
  Vec at(const char* row, int v) const { return mul(load_as<D>(row, v * kLanes), set1(alpha)); }
};

template <typename Values>
inline Values with_scales(const char* scales, float alpha) {
  Values values;
  values.set(scales, alpha);
  return values;
}

// alpha * decoded; codes behind whole vectors are read by the byte: up to three more than k.
inline void read_values(const ChunkTopkDecode& job, int64_t rank, int64_t chunk, float* out) {
  const int bits = job.value_bits;
  const int64_t k = job.k, scales = bits == 2 ? 2 : 1;
  const unsigned char* row = row_of(job, 0, rank, chunk, packed_bytes(k, bits));
  const float alpha = job.alpha.of(rank);
  if (bits >= 16) {
    const Dtype dtype = bits == 32 ? Dtype::fp32 : Dtype::bf16;
    int64_t j = bits == 32 ? read_vectors(Narrow<Dtype::fp32>{alpha}, row, k, out)
                           : read_vectors(Narrow<Dtype::bf16>{alpha}, row, k, out);
    for (; j < k; ++j) out[j] = alpha * load_widened(row, dtype, j);
    return;
  }
  const auto* of_chunk =
      reinterpret_cast<const char*>(row_of(job, job.scales_offset, rank, chunk, 4 * scales));
  float scale[2];
  std::memcpy(scale, of_chunk, sizeof(float) * static_cast<size_t>(scales));
  if (bits == 8) {
    int64_t j = read_vectors(with_scales<Steps<8>>(of_chunk, alpha), row, k, out);
    for (; j < k; ++j) out[j] = alpha * (static_cast<float>(static_cast<int8_t>(row[j])) * scale[0]);
  } else if (bits == 4) {
    int64_t j = read_vectors(with_scales<Steps<4>>(of_chunk, alpha), row, k, out);
    const auto value = [&](int code) { return alpha * (static_cast<float>((code ^ 8) - 8) * scale[0]); };
    for (row += j / 2; j < k; j += 2, ++row) {
      out[j] = value(*row & 15);
      out[j + 1] = value(*row >> 4);
    }
  } else {
    const auto four = with_scales<FourValues<true>>(of_chunk, alpha);
    int64_t j = read_vectors(four, row, k, out);
    for (row += j / 4; j < k; j += 4, ++row) {
      for (int i = 0; i < 4; ++i) out[j + i] = four.values[*row >> 2 * i & 3];
    }
  }
}

// Whether positions ascend within [0, valid), at any address.
inline bool are_good(const unsigned char* row, int64_t count, int64_t valid) {
  const auto at = [row](int64_t j) {
    uint16_t position;
    std::memcpy(&position, row + 2 * j, sizeof position);
    return position;
  };
  if (at(count - 1) >= valid) return false;
#if defined(GCK_AVX512)
  __mmask32 wrong = 0;
  for (int64_t j = 1; j < count; j += 32) {
    const auto there = static_cast<__mmask32>(count - j >= 32 ? ~0u : (1u << (count - j)) - 1);
    const __m512i before = _mm512_maskz_loadu_epi16(there, row + 2 * (j - 1));
    wrong |= _mm512_mask_cmpge_epu16_mask(there, before, _mm512_maskz_loadu_epi16(there, row + 2 * j));
  }
  return wrong == 0;
#else
  uint16_t wrong = 0;
  for (int64_t j = 1; j < count; ++j) wrong = static_cast<uint16_t>(wrong | (at(j - 1) >= at(j)));
  return wrong == 0;
#endif
}

// The first of `count` positions that is out of range or not above the one before it.
inline int64_t first_bad(const uint16_t* at, int64_t count, int64_t valid) {
  int64_t j = 0;
  while (j < count && at[j] < valid && (j == 0 || at[j] > at[j - 1])) ++j;
  return j;
}

// Asks for a rank's next rows: there are more of them than processors follow by themselves.
inline void ask_for_next(const char* body, int64_t offset, int64_t chunk, int64_t nbytes) {
  const auto row = reinterpret_cast<uintptr_t>(body) + static_cast<uintptr_t>(offset);
  for (int64_t byte = 0; byte < nbytes; byte += 64)
    __builtin_prefetch(
        reinterpret_cast<const void*>(row + static_cast<uintptr_t>((chunk + 1) * nbytes + byte)));
}

}  // namespace

int64_t chunk_topk_first_bad(const ChunkTopkDecode& job, const ChunkEntries& scratch, int64_t begin,
                             int64_t end) {
  const int64_t chunks = (job.numel + job.chunk_size - 1) / job.chunk_size;
  for (int64_t rank = 0; rank < job.ranks; ++rank) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t valid = valid_of(job, c), count = job.k < valid ? job.k : valid;
      const unsigned char* row = row_of(job, job.indices_offset, rank, c, 2 * job.k);
      if (job.index_bits == 12) {
        read_positions(job, rank, c, scratch.positions);
        row = reinterpret_cast<const unsigned char*>(scratch.positions);
      }
      if (are_good(row, count, valid)) continue;
      read_positions(job, rank, c, scratch.positions);
      return (rank * chunks + c) * job.k + first_bad(scratch.positions, count, valid);
    }
  }
  return -1;
}

void chunk_topk_put(const ChunkTopkDecode& job, const ChunkEntries& scratch, int64_t chunk, float* out,
                    const float* later) {
  const int64_t valid = valid_of(job, chunk), count = job.k < valid ? job.k : valid;
  const uint16_t* at = scratch.positions;
  const float* values = scratch.values;
  const int64_t half = job.chunk_size / kLanes / 2;
  const int64_t share = later == nullptr ? 0 : (half + job.ranks - 1) / job.ranks * kLanes;
  for (int64_t rank = 0; rank < job.ranks; ++rank) {
    for (int64_t i = rank * share; i < (rank + 1) * share; i += kLanes) __builtin_prefetch(later + i, 1, 2);
    read_positions(job, rank, chunk, scratch.positions);
    read_values(job, rank, chunk, scratch.values);
    const char* body = job.bodies[rank];
    ask_for_next(body, job.indices_offset, chunk, packed_bytes(job.k, job.index_bits));
    ask_for_next(body, 0, chunk, packed_bytes(job.k, job.value_bits));
    if (job.value_bits < 16) ask_for_next(body, job.scales_offset, chunk, job.value_bits == 2 ? 8 : 4);
    if (job.add) {
      for (int64_t j = 0; j < count; ++j) out[at[j]] += values[j];
    } else {
      for (int64_t j = 0; j < count; ++j) out[at[j]] = values[j];
    }
  }
}

}  // namespace gck::GCK_ISA
