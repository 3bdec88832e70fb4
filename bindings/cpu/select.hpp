// Finding the k-th largest magnitude, exactly.
#pragma once

#include <vector>

#include "cpu/types.hpp"

namespace gck {

struct Segment {
  const float* x;
  int64_t count;
};

// What a thread looks through in one go; groups follow each other in the order of indices.
using Group = std::vector<Segment>;

struct Threshold {
  int32_t key;    // of the k-th largest entry
  int64_t quota;  // how many of the entries equal to it are among the k largest
};

// How many entries of a group lie above the threshold, and how many equal it.
struct Share {
  int64_t above, ties;
};

struct Selection {
  Threshold threshold;
  std::vector<Share> shares;  // one a group
};

// Where a group's winners go in the payload, how many there are, and how many of them may be ties.
struct Slot {
  int64_t offset, winners, quota;
};

// The rank-th largest key (1 = largest) of all groups together, by 11 + 10 + 10 bits from the top.
Threshold kth_largest(const std::vector<Group>& groups, int64_t rank, int threads);

// The threshold of the k largest entries, and each group's share of them.
Selection select_largest(const std::vector<Group>& groups, int64_t k, int threads);

// The same for one list a group, each with room for a vector more. Fast where the k-th key lies in [low,
// high) and few others do. `keys`: room for as many as a list has entries, and 16 more, for each.
Selection select_near(const std::vector<Segment>& lists, int64_t k, int32_t low, int32_t high,
                      const std::vector<int32_t*>& keys, int threads);

// Hands the quota of ties out to the groups in order.
std::vector<Slot> slots_of(const Selection& selection);

}  // namespace gck
