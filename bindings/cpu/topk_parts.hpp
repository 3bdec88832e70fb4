// How the entries of a top-k job are cut: into parts, which threads work on, each with a list of candidates.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/isa/leaves.hpp"
#include "cpu/scratch.hpp"
#include "cpu/threads.hpp"
#include "cpu/topk.hpp"

namespace gck {

constexpr int64_t kFinelyCut = 1 << 20;  // entries of a vector with kShares parts a thread
constexpr int kShares = 4;
constexpr int64_t kMaxPart = int64_t{1} << 31;  // list positions are 32 bits
// A list is full when another block might not fit: it needs room for one more than what it is to hold, and
// behind that for the rest of a vector.
constexpr int64_t kSpare = 32, kBehind = 32;

// A stretch of one run, inside one part.
struct Piece {
  const void* grad;
  Dtype dtype;
  float* err;
  int64_t begin, count;  // begin: index in the concatenation
  Candidates list;
};

// What a thread works on in one go.
struct Part {
  std::vector<Piece> pieces;
  int64_t count = 0, listed = 0, ties = 0;
  bool overflow = false;
  int64_t cleared = 0;
};

inline std::vector<Part> parts_of(const TopkJob& job) {
  const int threads = parts_for(job.numel, job.threads);
  const int shares = threads > 1 && job.numel >= kFinelyCut ? kShares * threads : threads;
  const int count = std::max(shares, static_cast<int>((job.numel + kMaxPart - 1) / kMaxPart));
  std::vector<Part> parts(static_cast<size_t>(count));
  auto run = job.runs.begin();
  int64_t begin = 0;  // of the run
  for (int t = 0; t < count; ++t) {
    Part& part = parts[static_cast<size_t>(t)];
    const auto [first, last] = part_of(job.numel, count, t, kBlock);
    part.count = last - first;
    for (int64_t at = first; at < last;) {
      for (; at >= begin + run->numel; ++run) begin += run->numel;
      const int64_t end = std::min(last, begin + run->numel), inside = at - begin;
      const int64_t size = run->grad_dtype == Dtype::fp32 ? 4 : 2;
      part.pieces.push_back({static_cast<const char*>(run->grad) + inside * size,
                             run->grad_dtype,
                             run->err + inside,
                             at,
                             end - at,
                             {}});
      at = end;
    }
  }
  return parts;
}

// Memory of the lists: one a part, shared by its pieces, and keys for refining.
class Lists {
 public:
  // `more`: bytes of memory for whoever needs some.
  Lists(const std::vector<Part>& parts, int64_t capacity, size_t more = 0)
      : scratch_(bytes(parts, capacity) + Scratch::padded(more)) {
    for (const Part& part : parts) {
      const int64_t room = std::min(part.count, capacity) + kSpare;
      const auto slots = static_cast<size_t>(room + kBehind);
      rooms_.push_back({static_cast<float*>(scratch_.region(slots * sizeof(float))),
                        static_cast<uint32_t*>(scratch_.region(slots * sizeof(uint32_t))), room, 0, 0,
                        false});
      // A region each: what a part has few of then lies in few pages, which stay.
      keys_.push_back(static_cast<int32_t*>(scratch_.region(slots * sizeof(int32_t))));
    }
    more_ = scratch_.region(more);
  }

  const Candidates& room(size_t part) const { return rooms_[part]; }
  // What is left of it behind what is listed.
  Candidates rest_of(size_t part, int64_t listed) const {
    const Candidates& all = rooms_[part];
    return {all.values + listed, all.indices + listed, all.capacity - listed, 0, 0, false};
  }
  const std::vector<int32_t*>& keys() const { return keys_; }
  void* more() const { return more_; }

 private:
  static size_t bytes(const std::vector<Part>& parts, int64_t capacity) {
    size_t sum = 0;
    for (const Part& part : parts) {
      const auto room = static_cast<size_t>(std::min(part.count, capacity) + kSpare + kBehind);
      sum += 3 * Scratch::padded(room * sizeof(float));
    }
    return sum;
  }

  Scratch scratch_;
  std::vector<Candidates> rooms_;
  std::vector<int32_t*> keys_;
  void* more_;
};

}  // namespace gck
