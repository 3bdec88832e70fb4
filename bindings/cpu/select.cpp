#include "cpu/select.hpp"

#include <algorithm>
#include <bit>
#include <functional>
#include <numeric>

#include "cpu/isa/leaves.hpp"
#include "cpu/threads.hpp"

namespace gck {
namespace {

constexpr int64_t kFew = 4096;  // entries that a histogram does not pay for
constexpr int64_t kLanes = 16;  // room that a leaf needs behind entries
constexpr int kBinBits = 11;    // of the histogram that select_near makes of [low, high)

Share count_share(const float* x, int64_t count, int32_t threshold) {
  Share share{0, 0};
  for (int64_t i = 0; i < count; ++i) {
    const int32_t key = key_of(x[i]);
    share.above += key > threshold;
    share.ties += key == threshold;
  }
  return share;
}

// Of lists whose entries are few enough to be put one behind the other.
int32_t kth_of_few(const std::vector<Segment>& lists, int64_t k) {
  if (lists.size() == 1) return leaves().topk_kth(lists[0].x, lists[0].count, k, 0);
  int64_t total = 0;
  for (const Segment& list : lists) total += list.count;
  std::vector<float> all(static_cast<size_t>(total + kLanes));
  auto next = all.begin();
  for (const auto& [x, count] : lists) next = std::copy_n(x, count, next);
  return leaves().topk_kth(all.data(), total, k, 0);
}

// The same as select_largest, for lists so short that no histogram pays.
Selection select_few(const std::vector<Segment>& lists, int64_t k) {
  const int32_t kth = kth_of_few(lists, k);
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

int64_t entries_of(const std::vector<Group>& groups) {
  int64_t sum = 0;
  for (const Group& group : groups) {
    for (const Segment& segment : group) sum += segment.count;
  }
  return sum;
}

std::vector<Share> shares_of(const std::vector<Group>& groups, int32_t threshold, int threads) {
  std::vector<Share> shares(groups.size());
  share_parts(static_cast<int>(groups.size()), threads, entries_of(groups), [&](int t) {
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

Threshold kth_largest(const std::vector<Group>& groups, int64_t rank, int threads) {
  constexpr int shifts[] = {20, 10, 0}, bins[] = {2048, 1024, 1024};
  if (groups.size() == 1 && groups[0].size() == 1 && groups[0][0].count <= kFew) {
    return select_few(groups[0], rank).threshold;
  }
  const int parts = static_cast<int>(groups.size());
  const int64_t entries = entries_of(groups);
  std::vector<std::vector<int64_t>> counts(groups.size(), std::vector<int64_t>(2048));
  uint32_t prefix = 0;
  for (int digit = 0; digit < 3; ++digit) {
    const int shift = shifts[digit];
    const auto mask = static_cast<uint32_t>(bins[digit] - 1);
    share_parts(parts, threads, entries, [&](int t) {
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

Selection select_largest(const std::vector<Group>& groups, int64_t k, int threads) {
  const Threshold threshold = kth_largest(groups, k, threads);
  return {threshold, shares_of(groups, threshold.key, threads)};
}

Selection select_near(const std::vector<Segment>& lists, int64_t k, int32_t low, int32_t high,
                      const std::vector<int32_t*>& keys, int threads) {
  const size_t parts = lists.size();
  int64_t total = 0;
  for (const Segment& list : lists) total += list.count;
  if (total <= kFew) return select_few(lists, k);

  // Keys in [low, high), and how many lie above.
  std::vector<int64_t> inside(parts);
  std::vector<Share> shares(parts);
  share_parts(static_cast<int>(parts), threads, total, [&](int t) {
    const auto p = static_cast<size_t>(t);
    shares[p].above = leaves().topk_split(lists[p].x, lists[p].count, low, high, keys[p], &inside[p]);
  });
  int64_t rank = k, within = 0;
  for (size_t p = 0; p < parts; ++p) {
    rank -= shares[p].above;
    within += inside[p];
  }
  if (rank < 1 || rank > within) {
    std::vector<Group> groups;
    for (const Segment& list : lists) groups.push_back({list});
    return select_largest(groups, k, threads);
  }

  // Bins of these, and what lies in the bin of the k-th, until that is little or a single key.
  while (within > kFew && high - low > 1) {
    const int bits = std::bit_width(static_cast<uint32_t>(high - low - 1));
    const int shift = std::max(bits - kBinBits, 0);
    const bool shared = within >= kWorthWaiting;  // else one thread does all, in one histogram
    std::vector<std::vector<int64_t>> counts(shared ? parts : 1, std::vector<int64_t>(size_t{1} << kBinBits));
    share_parts(static_cast<int>(parts), threads, within, [&](int t) {
      const auto p = static_cast<size_t>(t);
      int64_t* count = counts[shared ? p : 0].data();
      for (int64_t i = 0; i < inside[p]; ++i) ++count[(keys[p][i] - low) >> shift];
    });
    const int bin = bin_of_rank(counts, 1 << kBinBits, rank);
    low += bin << shift;
    high = static_cast<int32_t>(std::min<int64_t>(high, int64_t{low} + (int64_t{1} << shift)));
    share_parts(static_cast<int>(parts), threads, within, [&](int t) {
      const auto p = static_cast<size_t>(t);
      const auto* x = reinterpret_cast<const float*>(keys[p]);
      shares[p].above += leaves().topk_split(x, inside[p], low, high, keys[p], &inside[p]);
    });
    within = std::accumulate(inside.begin(), inside.end(), int64_t{0});
  }
  std::vector<int32_t> last;
  for (size_t p = 0; p < parts; ++p) last.insert(last.end(), keys[p], keys[p] + inside[p]);
  std::nth_element(last.begin(), last.begin() + (rank - 1), last.end(), std::greater<>());
  const int32_t kth = last[static_cast<size_t>(rank - 1)];
  int64_t quota = k;
  for (size_t p = 0; p < parts; ++p) {
    int64_t above = 0, ties = 0;
    for (int64_t i = 0; i < inside[p]; ++i) {
      above += keys[p][i] > kth;
      ties += keys[p][i] == kth;
    }
    shares[p].above += above;
    shares[p].ties = ties;
    quota -= shares[p].above;
  }
  return {{kth, quota}, shares};
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
