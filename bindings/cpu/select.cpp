#include "cpu/select.hpp"

#include <algorithm>
#include <functional>

#include "cpu/threads.hpp"

namespace gck {
namespace {

// select_above counts in bins of 512 units in the last place, from the floor up; the last bin holds the
// rest. They cover a quarter of an octave, where the k-th entry lies unless the guess was far too low.
constexpr int kBinShift = 9;
constexpr int kBins = 4096;

int bin_of(float x, int32_t floor) { return std::min((key_of(x) - floor) >> kBinShift, kBins - 1); }

// Each segment's winners: all that lie above the threshold, and ties while the quota lasts.
Selection place(const std::vector<Segment>& segments, Threshold threshold) {
  std::vector<Slot> slots(segments.size());
  for_each_part(static_cast<int>(segments.size()), [&](int t) {
    const auto [x, m] = segments[static_cast<size_t>(t)];
    int64_t above = 0, ties = 0;
    for (int64_t i = 0; i < m; ++i) {
      const int32_t key = key_of(x[i]);
      above += key > threshold.key;
      ties += key == threshold.key;
    }
    slots[static_cast<size_t>(t)] = {0, above, ties};
  });
  int64_t offset = 0, left = threshold.quota;
  for (Slot& slot : slots) {
    slot.offset = offset;
    slot.quota = std::min(left, slot.quota);
    slot.winners += slot.quota;
    offset += slot.winners;
    left -= slot.quota;
  }
  return {threshold, slots};
}

}  // namespace

Threshold kth_largest(const std::vector<Segment>& segments, int64_t rank) {
  constexpr int shifts[] = {20, 10, 0}, bins[] = {2048, 1024, 1024};
  const int parts = static_cast<int>(segments.size());
  std::vector<std::vector<int64_t>> counts(segments.size());
  for (auto& c : counts) c.resize(2048);
  uint32_t prefix = 0;
  for (int digit = 0; digit < 3; ++digit) {
    const int shift = shifts[digit];
    const auto mask = static_cast<uint32_t>(bins[digit] - 1);
    for_each_part(parts, [&](int t) {
      int64_t* count = counts[static_cast<size_t>(t)].data();
      std::fill_n(count, bins[digit], 0);
      const auto [x, m] = segments[static_cast<size_t>(t)];
      if (digit == 0) {
        for (int64_t i = 0; i < m; ++i) ++count[static_cast<uint32_t>(key_of(x[i])) >> shift];
      } else {
        const uint32_t wanted = prefix >> shift;
        for (int64_t i = 0; i < m; ++i) {
          const uint32_t high = static_cast<uint32_t>(key_of(x[i])) >> shift;
          if ((high & ~mask) == wanted) ++count[high & mask];
        }
      }
    });
    for (int bin = bins[digit] - 1;; --bin) {
      int64_t here = 0;
      for (const auto& c : counts) here += c[static_cast<size_t>(bin)];
      if (here >= rank || bin == 0) {
        prefix |= static_cast<uint32_t>(bin) << shift;
        break;
      }
      rank -= here;
    }
  }
  return {static_cast<int32_t>(prefix), rank};
}

Selection select_largest(const std::vector<Segment>& segments, int64_t k) {
  return place(segments, kth_largest(segments, k));
}

Selection select_above(const std::vector<Segment>& segments, int64_t k, int32_t floor, int32_t* scratch) {
  const int parts = static_cast<int>(segments.size());
  std::vector<std::vector<int64_t>> counts(segments.size(), std::vector<int64_t>(kBins));
  for_each_part(parts, [&](int t) {
    int64_t* count = counts[static_cast<size_t>(t)].data();
    const auto [x, m] = segments[static_cast<size_t>(t)];
    for (int64_t i = 0; i < m; ++i) ++count[bin_of(x[i], floor)];
  });
  int64_t rank = k;
  int bin = kBins - 1;
  std::vector<int64_t> inside(segments.size());
  for (;; --bin) {
    int64_t here = 0;
    for (const auto& c : counts) here += c[static_cast<size_t>(bin)];
    if (here >= rank || bin == 0) break;
    rank -= here;
  }
  if (bin == kBins - 1) return select_largest(segments, k);

  // The bin of the k-th entry holds few keys, unless many entries are equal.
  std::vector<int32_t*> keys;
  for (const Segment& segment : segments) {
    keys.push_back(scratch);
    scratch += segment.count;
  }
  for_each_part(parts, [&](int t) {
    const auto p = static_cast<size_t>(t);
    const auto [x, m] = segments[p];
    int64_t found = 0;
    for (int64_t i = 0; i < m; ++i) {
      keys[p][found] = key_of(x[i]);
      found += bin_of(x[i], floor) == bin;
    }
    inside[p] = found;
  });
  int32_t* end = keys[0] + inside[0];
  for (size_t t = 1; t < keys.size(); ++t) end = std::copy(keys[t], keys[t] + inside[t], end);
  int32_t* kth = keys[0] + (rank - 1);
  std::nth_element(keys[0], kth, end, std::greater<>());
  const int32_t key = *kth;
  const int64_t quota = rank - std::count_if(keys[0], end, [&](int32_t other) { return other > key; });
  return place(segments, {key, quota});
}

}  // namespace gck
