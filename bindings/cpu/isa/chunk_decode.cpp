// The entries of chunks, unpacked by vectors and added one by one.
#include "cpu/isa/chunk_decode.hpp"

#include "cpu/isa/vec.hpp"
#include "cpu/packing.hpp"
#include "cpu/round.hpp"

namespace gck::GCK_ISA {
namespace {

// Where one rank's part of a chunk lies in a field that has `nbytes` bytes a chunk.
inline const unsigned char* row_of(const ChunkTopkDecode& job, const char* field, int64_t rank, int64_t chunk,
                                   int64_t nbytes) {
  return reinterpret_cast<const unsigned char*>(field + rank * job.rank_stride + chunk * nbytes);
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
  const unsigned char* row = row_of(job, job.indices, rank, chunk, nbytes);
  if (job.index_bits == 12)
    unpack_12(row, job.k, out);
  else
    std::memcpy(out, row, static_cast<size_t>(nbytes));
}

// alpha * decoded; codes are read by the byte: up to three more than k.
inline void read_values(const ChunkTopkDecode& job, int64_t rank, int64_t chunk, float* out) {
  const int bits = job.value_bits;
  const int64_t k = job.k;
  const unsigned char* row = row_of(job, job.values, rank, chunk, packed_bytes(k, bits));
  const float alpha = job.alpha;
  if (bits == 32) {
    for (int64_t j = 0; j < k; ++j) out[j] = alpha * load_widened(row, Dtype::fp32, j);
    return;
  }
  if (bits == 16) {
    for (int64_t j = 0; j < k; ++j) out[j] = alpha * load_widened(row, Dtype::bf16, j);
    return;
  }
  const int64_t scales = bits == 2 ? 2 : 1;
  float scale[2];
  std::memcpy(scale, row_of(job, job.scales, rank, chunk, 4 * scales),
              sizeof(float) * static_cast<size_t>(scales));
  if (bits == 8) {
    for (int64_t j = 0; j < k; ++j)
      out[j] = alpha * (static_cast<float>(static_cast<int8_t>(row[j])) * scale[0]);
  } else if (bits == 4) {
    float table[16];
    for (int i = 0; i < 16; ++i) table[i] = alpha * (static_cast<float>((i ^ 8) - 8) * scale[0]);
    for (int64_t j = 0; j < k; j += 2, ++row) {
      out[j] = table[*row & 15];
      out[j + 1] = table[*row >> 4];
    }
  } else {
    const float table[4] = {alpha * -scale[0], alpha * -scale[1], alpha * scale[0], alpha * scale[1]};
    for (int64_t j = 0; j < k; j += 4, ++row) {
      for (int i = 0; i < 4; ++i) out[j + i] = table[*row >> 2 * i & 3];
    }
  }
}

// The first of `count` positions that is out of range or not above the one before it, or -1.
inline int64_t first_bad(const uint16_t* at, int64_t count, int64_t valid) {
  uint16_t wrong = at[count - 1] >= valid;
  for (int64_t j = 1; j < count; ++j) wrong = static_cast<uint16_t>(wrong | (at[j - 1] >= at[j]));
  if (!wrong) return -1;
  for (int64_t j = 0; j < count; ++j) {
    if (at[j] >= valid || (j > 0 && at[j] <= at[j - 1])) return j;
  }
  return -1;
}

// Asks for a rank's next rows: there are more of them than processors follow by themselves.
inline void ask_for_next(const char* field, int64_t rank_stride, int64_t rank, int64_t chunk,
                         int64_t nbytes) {
  const auto row = reinterpret_cast<uintptr_t>(field) + static_cast<uintptr_t>(rank * rank_stride);
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
      read_positions(job, rank, c, scratch.positions);
      const int64_t entry = first_bad(scratch.positions, count, valid);
      if (entry >= 0) return (rank * chunks + c) * job.k + entry;
    }
  }
  return -1;
}

void chunk_topk_put(const ChunkTopkDecode& job, const ChunkEntries& scratch, int64_t chunk, float* out) {
  const int64_t valid = valid_of(job, chunk), count = job.k < valid ? job.k : valid;
  const uint16_t* at = scratch.positions;
  const float* values = scratch.values;
  for (int64_t rank = 0; rank < job.ranks; ++rank) {
    read_positions(job, rank, chunk, scratch.positions);
    read_values(job, rank, chunk, scratch.values);
    ask_for_next(job.indices, job.rank_stride, rank, chunk, packed_bytes(job.k, job.index_bits));
    ask_for_next(job.values, job.rank_stride, rank, chunk, packed_bytes(job.k, job.value_bits));
    if (job.add) {
      for (int64_t j = 0; j < count; ++j) out[at[j]] += values[j];
    } else {
      for (int64_t j = 0; j < count; ++j) out[at[j]] = values[j];
    }
  }
}

void add_mean(float* sum, int64_t count, float divisor, float* err) {
  // The inverse of a power of two is exact: the product then rounds as the quotient does, and sooner.
  const bool exact = (bits_of(divisor) & 0x7fffffu) == 0;
  const Vec inverse = set1(1.0f / divisor), whole = set1(divisor), zero = set1(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec x = load(sum + i);
    store(err + i, add(exact ? mul(x, inverse) : div(x, whole), load(err + i)));
    store(sum + i, zero);
  }
  for (; i < count; ++i) {
    err[i] = sum[i] / divisor + err[i];
    sum[i] = 0.0f;
  }
}

}  // namespace gck::GCK_ISA
