#include "cpu/isa/index_codecs.hpp"

namespace gck::GCK_ISA {
namespace {

// Bit strings are read and written as words of 64 bits, little end first, at any address.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bit strings are little end first");

inline uint64_t load_word(const char* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

inline void store_word(char* p, uint64_t word) { std::memcpy(p, &word, sizeof word); }

inline uint64_t mask_of(int bits) { return (uint64_t{1} << bits) - 1; }

template <typename Index>
void pack_low(const EliasFano& job, Range entries) {
  const auto* indices = static_cast<const Index*>(job.indices);
  const int bits = job.low_bits;
  const uint64_t mask = mask_of(bits);
  char* out = job.low + entries.begin / 64 * bits * 8;
  uint64_t word = 0;
  int filled = 0;
  for (int64_t i = entries.begin; i < entries.end; ++i) {
    const uint64_t low = static_cast<uint64_t>(indices[i]) & mask;
    word |= low << filled;
    filled += bits;
    if (filled >= 64) {
      store_word(out, word);
      out += 8;
      filled -= 64;
      word = filled ? low >> (bits - filled) : 0;
    }
  }
  if (filled) store_word(out, word);
}

template <typename Index>
uint64_t set_high(const EliasFano& job, Range entries, Range words, uint64_t bits) {
  const auto* indices = static_cast<const Index*>(job.indices);
  int64_t word = words.begin;
  for (int64_t i = entries.begin; i < entries.end; ++i) {
    const int64_t at = (static_cast<int64_t>(indices[i]) >> job.low_bits) + i;
    if (at >> 6 != word) {
      store_word(job.high + 8 * word++, bits);
      for (; word < at >> 6; ++word) store_word(job.high + 8 * word, 0);
      bits = 0;
    }
    bits |= uint64_t{1} << (at & 63);
  }
  if (word == words.end) return bits;
  store_word(job.high + 8 * word++, bits);
  for (; word < words.end; ++word) store_word(job.high + 8 * word, 0);
  return 0;
}

// The lower bits of entry i, wherever they lie.
inline uint64_t low_of(const EliasFano& job, int64_t i) {
  const int64_t at = i * job.low_bits;
  const int shift = static_cast<int>(at & 63), left = 64 - shift;
  uint64_t low = load_word(job.low + at / 64 * 8) >> shift;
  if (job.low_bits > left) low |= load_word(job.low + at / 64 * 8 + 8) << left;
  return low & mask_of(job.low_bits);
}

template <typename Index>
bool select(const EliasFano& job, Range words, int64_t rank) {
  auto* indices = static_cast<Index*>(job.indices);
  const int bits = job.low_bits;
  const uint64_t mask = mask_of(bits), numel = static_cast<uint64_t>(job.numel);
  // Entries before this one have 8 bytes of lower bits from their first byte on, and those hold all of them.
  const int64_t simple = bits == 0 || bits > 56 ? 0 : ((job.low_bytes - 8) * 8) / bits;
  uint64_t before = 0;
  bool good = true, first = true;
  for (int64_t word = words.begin; word < words.end; ++word) {
    uint64_t ones = load_word(job.high + 8 * word);
    const int64_t stop = rank + __builtin_popcountll(ones);
    const int64_t easy = stop < simple ? stop : rank < simple ? simple : rank;
    const auto next = [&](uint64_t low) {
      const auto high = static_cast<uint64_t>(word * 64 + __builtin_ctzll(ones) - rank);
      ones &= ones - 1;
      const uint64_t index = high << bits | low;
      good &= (index > before || first) && index < numel;
      first = false;
      before = index;
      indices[rank++] = static_cast<Index>(index);
    };
    while (rank < easy) {
      const int64_t at = rank * bits;
      next(load_word(job.low + (at >> 3)) >> (at & 7) & mask);
    }
    while (rank < stop) next(bits ? low_of(job, rank) : 0);
  }
  return good;
}

template <typename Index>
void split(const Index* indices, int64_t count, uint16_t* locals) {
  for (int64_t i = 0; i < count; ++i) locals[i] = static_cast<uint16_t>(indices[i]);
}

template <typename Index>
bool join(const uint16_t* locals, int64_t count, int64_t base, Index* indices) {
  const auto first = static_cast<Index>(base);
  uint16_t bad = 0;
  if (count > 0) indices[0] = static_cast<Index>(first + locals[0]);
  for (int64_t i = 1; i < count; ++i) {
    indices[i] = static_cast<Index>(first + locals[i]);
    bad |= locals[i - 1] >= locals[i];
  }
  return bad == 0;
}

}  // namespace

void elias_fano_low(const EliasFano& job, Range entries) {
  job.wide ? pack_low<int64_t>(job, entries) : pack_low<int32_t>(job, entries);
}

uint64_t elias_fano_high(const EliasFano& job, Range entries, Range words, uint64_t bits) {
  return job.wide ? set_high<int64_t>(job, entries, words, bits)
                  : set_high<int32_t>(job, entries, words, bits);
}

int64_t elias_fano_count(const EliasFano& job, Range words) {
  int64_t count = 0;
  for (int64_t word = words.begin; word < words.end; ++word) {
    count += __builtin_popcountll(load_word(job.high + 8 * word));
  }
  return count;
}

bool elias_fano_select(const EliasFano& job, Range words, int64_t rank) {
  return job.wide ? select<int64_t>(job, words, rank) : select<int32_t>(job, words, rank);
}

void block16_split(const void* indices, bool wide, int64_t count, uint16_t* locals) {
  wide ? split(static_cast<const int64_t*>(indices), count, locals)
       : split(static_cast<const int32_t*>(indices), count, locals);
}

bool block16_join(const uint16_t* locals, int64_t count, int64_t base, void* indices, bool wide) {
  return wide ? join(locals, count, base, static_cast<int64_t*>(indices))
              : join(locals, count, base, static_cast<int32_t*>(indices));
}

}  // namespace gck::GCK_ISA
