#include "cpu/select.hpp"

#include <algorithm>
#include <functional>

#include "cpu/threads.hpp"

namespace gck {
namespace {

constexpr int64_t kFew = 4096;  // entries
constexpr int kBins = 4096;     // of select_near, from the floor up; the last one holds the rest

int bin_of(int32_t key, int32_t floor, int shift) { return std::min((key - floor) >> shift, kBins - 1); }

Share count_share(const float* x, int64_t count, int32_t threshold) {
  Share share{0, 0};
  for (int64_t i = 0; i < count; ++i) {
    const int32_t key = key_of(x[i]);
    share.above += key > threshold;
    share.ties += key == threshold;
  }
  return share;
}

// The same as select_largest, for lists so short that no histogram pays.
Selection select_few(const std::vector<Segment>& lists, int64_t k) {
  std::vector<int32_t> keys;
  for (const auto& [x, count] : lists) {
    for (int64_t i = 0; i < count; ++i) keys.push_back(key_of(x[i]));
  }
  std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
  const int32_t kth = keys[static_cast<size_t>(k - 1)];
  std::vector<Share> shares;
  int64_t above = 0;
  for (const auto& [x, count] : lists) {
    shares.push_back(count_share(x, count, kth));
    above += shares.back().above;
  }
  return {{kth, k - above}, shares};
}

// The highest bin that the rank-th largest entry may lie in; `rank` becomes its rank in that bin.
int bin_of_rank(const std::vector<std::vector<int64_t>>& counts, int bins, int64_t& rank) {
  int bin = bins - 1;
  for (;; --bin) {
    int64_t here = 0;
    for (const auto& count : counts) here += count[static_cast<size_t>(bin)];
    if (here >= rank || bin == 0) return bin;
    rank -= here;
  }
}

std::vector<Share> shares_of(const std::vector<Group>& groups, int32_t threshold) {
  std::vector<Share> shares(groups.size());
  for_each_part(static_cast<int>(groups.size()), [&](int t) {
    Share sum{0, 0};
    for (const auto& [x, count] : groups[static_cast<size_t>(t)]) {
      const Share share = count_share(x, count, threshold);
      sum.above += share.above;
      sum.ties += share.ties;
    }
    shares[static_cast<size_t>(t)] = sum;
  });
  return shares;
}

}  // namespace

Threshold kth_largest(const std::vector<Group>& groups, int64_t rank) {
  constexpr int shifts[] = {20, 10, 0}, bins[] = {2048, 1024, 1024};
  if (groups.size() == 1 && groups[0].size() == 1 && groups[0][0].count <= kFew) {
    return select_few(groups[0], rank).threshold;
  }
  const int parts = static_cast<int>(groups.size());
  std::vector<std::vector<int64_t>> counts(groups.size(), std::vector<int64_t>(2048));
  uint32_t prefix = 0;
  for (int digit = 0; digit < 3; ++digit) {
    const int shift = shifts[digit];
    const auto mask = static_cast<uint32_t>(bins[digit] - 1);
    for_each_part(parts, [&](int t) {
      int64_t* count = counts[static_cast<size_t>(t)].data();
      std::fill_n(count, bins[digit], 0);
      const uint32_t wanted = prefix >> shift;
      for (const auto& [x, m] : groups[static_cast<size_t>(t)]) {
        if (digit == 0) {
          for (int64_t i = 0; i < m; ++i) ++count[static_cast<uint32_t>(key_of(x[i])) >> shift];
        } else {
          for (int64_t i = 0; i < m; ++i) {
            const uint32_t high = static_cast<uint32_t>(key_of(x[i])) >> shift;
            if ((high & ~mask) == wanted) ++count[high & mask];
          }
        }
      }
    });
    prefix |= static_cast<uint32_t>(bin_of_rank(counts, bins[digit], rank)) << shift;
  }
  return {static_cast<int32_t>(prefix), rank};
}

Selection select_largest(const std::vector<Group>& groups, int64_t k) {
  const Threshold threshold = kth_largest(groups, k);
  return {threshold, shares_of(groups, threshold.key)};
}

Selection select_near(const std::vector<Segment>& lists, int64_t k, int32_t floor, int shift,
                      int32_t* scratch) {
  const size_t parts = lists.size();
  int64_t total = 0;
  for (const Segment& list : lists) total += list.count;
  if (total <= kFew) return select_few(lists, k);
  std::vector<std::vector<int64_t>> counts(parts, std::vector<int64_t>(kBins));
  for_each_part(static_cast<int>(parts), [&](int t) {
    int64_t* count = counts[static_cast<size_t>(t)].data();
    const auto [x, m] = lists[static_cast<size_t>(t)];
    for (int64_t i = 0; i < m; ++i) ++count[bin_of(key_of(x[i]), floor, shift)];
  });
  int64_t rank = k;
  const int bin = bin_of_rank(counts, kBins, rank);
  if (bin == kBins - 1) {
    std::vector<Group> groups;
    for (const Segment& list : lists) groups.push_back({list});
    return select_largest(groups, k);
  }

  // The bin of the k-th entry holds few keys, unless many entries are equal.
  std::vector<int32_t*> keys(parts);
  std::vector<Share> shares(parts);
  for (size_t p = 0; p < parts; ++p) {
    keys[p] = scratch;
    scratch += counts[p][static_cast<size_t>(bin)] + 1;  // one past the end is written to
    for (int above = bin + 1; above < kBins; ++above)
      shares[p].above += counts[p][static_cast<size_t>(above)];
  }
  for_each_part(static_cast<int>(parts), [&](int t) {
    const auto p = static_cast<size_t>(t);
    const auto [x, m] = lists[p];
    int32_t* next = keys[p];
    for (int64_t i = 0; i < m; ++i) {
      const int32_t key = key_of(x[i]);
      *next = key;
      next += bin_of(key, floor, shift) == bin;
    }
  });
  std::vector<int32_t> inside;
  for (size_t p = 0; p < parts; ++p) {
    inside.insert(inside.end(), keys[p], keys[p] + counts[p][static_cast<size_t>(bin)]);
  }
  std::nth_element(inside.begin(), inside.begin() + (rank - 1), inside.end(), std::greater<>());
  const int32_t kth = inside[static_cast<size_t>(rank - 1)];
  int64_t above = 0;
  for (size_t p = 0; p < parts; ++p) {
    for (int64_t i = 0; i < counts[p][static_cast<size_t>(bin)]; ++i) {
      shares[p].above += keys[p][i] > kth;
      shares[p].ties += keys[p][i] == kth;
      above += keys[p][i] > kth;
    }
  }
  return {{kth, rank - above}, shares};
}

std::vector<Slot> slots_of(const Selection& selection) {
  std::vector<Slot> slots;
  int64_t offset = 0, left = selection.threshold.quota;
  for (const auto& [above, ties] : selection.shares) {
    const int64_t quota = std::min(left, ties);
    slots.push_back({offset, above + quota, quota});
    offset += above + quota;
    left -= quota;
  }
  return slots;
}

}  // namespace gck
