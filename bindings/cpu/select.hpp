// Finding the k-th largest magnitude, exactly.
#pragma once

#include <vector>

#include "cpu/types.hpp"

namespace gck {

struct Segment {
  const float* x;
  int64_t count;
};

struct Threshold {
  int32_t key;    // of the k-th largest entry
  int64_t quota;  // how many of the entries equal to it are among the k largest
};

// Where a part's winners go in the payload, how many there are, and how many of them may be ties.
struct Slot {
  int64_t offset, winners, quota;
};

struct Selection {
  Threshold threshold;
  std::vector<Slot> slots;  // one a segment
};

// The rank-th largest key (1 = largest) of all segments together, by 11 + 10 + 10 bits from the top.
Threshold kth_largest(const std::vector<Segment>& segments, int64_t rank);

// The threshold of the k largest entries, and each segment's share of them.
Selection select_largest(const std::vector<Segment>& segments, int64_t k);

// The same for lists of entries whose keys are all >= floor, most of them just above it, in two passes.
// `scratch` has room for as many keys as there are entries.
Selection select_above(const std::vector<Segment>& segments, int64_t k, int32_t floor, int32_t* scratch);

}  // namespace gck
