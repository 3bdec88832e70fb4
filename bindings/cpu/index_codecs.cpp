#include "cpu/index_codecs.hpp"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/threads.hpp"

namespace gck {
namespace {

constexpr int64_t kTile = 4096;  // entries that stay in the nearest cache between two passes
constexpr int64_t kBlockSize = 1 << 16;

template <typename Index>
int64_t at(const void* indices, int64_t i) {
  return static_cast<int64_t>(static_cast<const Index*>(indices)[i]);
}

template <typename Index>
bool in_order(const void* indices, int64_t count, int64_t numel, int threads) {
  if (count == 0) return true;
  if (at<Index>(indices, 0) < 0 || at<Index>(indices, count - 1) >= numel) return false;
  const int parts = parts_for(count, threads);
  std::atomic<bool> good{true};
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(count, parts, t, 1);
    if (!leaves().sparse_ascends(indices, sizeof(Index) == 8, std::max<int64_t>(begin, 1), end)) good = false;
  });
  return good;
}

bool in_order(const void* indices, bool wide, int64_t count, int64_t numel, int threads) {
  return wide ? in_order<int64_t>(indices, count, numel, threads)
              : in_order<int32_t>(indices, count, numel, threads);
}

// Whether the bits from `used` on are all 0, of which there are fewer than 64.
bool padding_is_zero(const char* bits, int64_t used, int64_t bytes) {
  for (int64_t byte = used / 8; byte < bytes; ++byte) {
    const int from = byte == used / 8 ? static_cast<int>(used % 8) : 0;
    if (static_cast<unsigned char>(bits[byte]) >> from) return false;
  }
  return true;
}

template <typename Index>
IndexFault decode(const Block16& job, int threads) {
  const auto* ends = static_cast<const Index*>(job.ends);
  const int64_t blocks = (job.numel + kBlockSize - 1) / kBlockSize;
  int64_t before = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (ends[b] < before || ends[b] > job.count) return IndexFault::count;
    before = ends[b];
  }
  if (before != job.count) return IndexFault::count;
  const int parts = parts_for(job.count, threads);
  std::atomic<bool> good{true};
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(blocks, parts, t, 1);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b == 0 ? 0 : ends[b - 1];
      auto* indices = static_cast<Index*>(job.indices) + first;
      const int64_t base = b * kBlockSize, count = ends[b] - first;
      if (!leaves().block16_join(job.locals + first, count, base, indices, job.wide)) good = false;
      // Of locals alone: an index of the last block may not fit its type.
      if (count > 0 && base + job.locals[first + count - 1] >= job.numel) good = false;
    }
  });
  return good ? IndexFault::none : IndexFault::order;
}

template <typename Index>
void find_ends(const Block16& job) {
  const auto *first = static_cast<const Index*>(job.indices), *last = first + job.count, *next = first;
  auto* ends = static_cast<Index*>(job.ends);
  for (int64_t stop = kBlockSize; stop < job.numel + kBlockSize; stop += kBlockSize) {
    next = std::lower_bound(next, last, stop, [](Index index, int64_t limit) { return index < limit; });
    *ends++ = static_cast<Index>(next - first);
  }
}

}  // namespace

IndexFault elias_fano_encode(const EliasFano& job, int threads) {
  if (!in_order(job.indices, job.wide, job.count, job.numel, threads)) return IndexFault::order;
  const Leaves& isa = leaves();
  const auto index = [&](int64_t i) {
    return job.wide ? at<int64_t>(job.indices, i) : at<int32_t>(job.indices, i);
  };
  const int parts = parts_for(job.count, threads);
  // Each part writes the words from that of its first entry up to that of the next part's. Bits of the latter
  // are for the next part's word, when all are done.
  const auto word_of = [&](int64_t i) {
    return i == 0 ? 0 : i == job.count ? job.high_words : ((index(i) >> job.low_bits) + i) >> 6;
  };
  std::vector<uint64_t> carried(static_cast<size_t>(parts));
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(job.count, parts, t, 64);
    int64_t word = word_of(begin);
    const int64_t stop_word = word_of(end);
    uint64_t carry = 0;
    for (int64_t i = begin; i < end; i += kTile) {
      const int64_t stop = std::min(i + kTile, end);
      if (job.low_bits > 0) isa.elias_fano_low(job, {i, stop});
      const int64_t last_word = stop == end ? stop_word : word_of(stop);
      carry = isa.elias_fano_high(job, {i, stop}, {word, last_word}, carry);
      word = last_word;
    }
    carried[static_cast<size_t>(t)] = carry;
  });
  for (int t = 0; t + 1 < parts; ++t) {
    char* word = job.high + 8 * word_of(part_of(job.count, parts, t, 64).end);
    uint64_t bits;
    std::memcpy(&bits, word, sizeof bits);
    bits |= carried[static_cast<size_t>(t)];
    std::memcpy(word, &bits, sizeof bits);
  }
  return IndexFault::none;
}

IndexFault elias_fano_decode(const EliasFano& job, int threads) {
  const Leaves& isa = leaves();
  if (!padding_is_zero(job.low, job.count * job.low_bits, job.low_bytes) ||
      !padding_is_zero(job.high, job.high_bits, 8 * job.high_words)) {
    return IndexFault::padding;
  }
  const int parts = parts_for(job.count, threads);
  std::vector<int64_t> ranks(static_cast<size_t>(parts) + 1);
  for_each_part(parts, [&](int t) {
    ranks[static_cast<size_t>(t) + 1] = isa.elias_fano_count(job, part_of(job.high_words, parts, t, 1));
  });
  for (size_t t = 1; t < ranks.size(); ++t) ranks[t] += ranks[t - 1];
  if (ranks.back() != job.count) return IndexFault::count;
  std::atomic<bool> good{true};
  for_each_part(parts, [&](int t) {
    const Range words = part_of(job.high_words, parts, t, 1);
    if (!isa.elias_fano_select(job, words, ranks[static_cast<size_t>(t)])) good = false;
  });
  const auto index = [&](int64_t i) {
    return job.wide ? at<int64_t>(job.indices, i) : at<int32_t>(job.indices, i);
  };
  for (int t = 1; t < parts && good; ++t) {
    const int64_t rank = ranks[static_cast<size_t>(t)];
    if (rank > 0 && rank < job.count && index(rank - 1) >= index(rank)) good = false;
  }
  return good ? IndexFault::none : IndexFault::order;
}

IndexFault block16_encode(const Block16& job, int threads) {
  if (!in_order(job.indices, job.wide, job.count, job.numel, threads)) return IndexFault::order;
  const int parts = parts_for(job.count, threads);
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(job.count, parts, t, 64);
    const auto* first = static_cast<const char*>(job.indices) + begin * (job.wide ? 8 : 4);
    leaves().block16_split(first, job.wide, end - begin, job.locals + begin);
  });
  job.wide ? find_ends<int64_t>(job) : find_ends<int32_t>(job);
  return IndexFault::none;
}

IndexFault block16_decode(const Block16& job, int threads) {
  return job.wide ? decode<int64_t>(job, threads) : decode<int32_t>(job, threads);
}

}  // namespace gck
