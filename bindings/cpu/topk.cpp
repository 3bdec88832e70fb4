// Guess a low threshold from a sample, stream acc once and move what is above it to a list, refine the
// threshold on the list, emit the k winners in order and put the losers back. Where the guess was too
// high, or the list overflowed, the same refine and emit read err, which then holds all of acc.
#include "cpu/topk.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/isa/leaves.hpp"
#include "cpu/round.hpp"
#include "cpu/select.hpp"
#include "cpu/threads.hpp"

namespace gck {
namespace {

constexpr int64_t kLine = 16;             // elements of a sampled line: one cache line of fp32
constexpr int64_t kMaxLines = 4096;       // lines in the sample
constexpr int64_t kSampleFraction = 64;   // at most one element in this many is sampled
constexpr int64_t kMinSampled = 1 << 16;  // below this many elements, selecting from err costs as little
constexpr int64_t kTile = 4096;           // elements that emit looks at together when it reads err
constexpr int64_t kMaxPart = int64_t{1} << 31;  // list positions are 32 bits

uint64_t hash(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// A threshold that at least k entries very probably reach, and few more: the sample's entry of rank
// f + 5 sqrt(sum of squared hits a line) + 8, where f is the expected rank of the k-th. Lines are
// hashed, so that a periodic gradient cannot align with them; hits a line measure how clustered it is.
int32_t guess_threshold(const TopkJob& job, const Leaves& isa) {
  const int64_t lines = std::min(kMaxLines, job.numel / (kLine * kSampleFraction));
  const int64_t stride = job.numel / kLine / lines;
  const int64_t size = job.grad_dtype == Dtype::fp32 ? 4 : 2;
  std::vector<float> sample(static_cast<size_t>(lines * kLine));
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t jitter =
        static_cast<int64_t>(hash(static_cast<uint64_t>(line)) % static_cast<uint64_t>(stride));
    const int64_t at = (line * stride + jitter) * kLine;
    isa.add(static_cast<const char*>(job.grad) + at * size, job.grad_dtype, job.err + at, kLine,
            sample.data() + line * kLine);
  }
  const std::vector<Segment> all{{sample.data(), lines * kLine}};
  const double expected =
      static_cast<double>(job.k) / static_cast<double>(job.numel) * static_cast<double>(lines * kLine);
  const auto rank_of = [&](double rank) {
    return static_cast<int64_t>(std::min(std::ceil(rank), static_cast<double>(lines * kLine)));
  };
  const int32_t middle = kth_largest(all, std::max<int64_t>(1, rank_of(expected))).key;
  double squares = 0;
  for (int64_t line = 0; line < lines; ++line) {
    const float* x = sample.data() + line * kLine;
    const auto hits =
        static_cast<double>(std::count_if(x, x + kLine, [&](float v) { return key_of(v) >= middle; }));
    squares += hits * hits;
  }
  const int32_t low = kth_largest(all, rank_of(expected + 5 * std::sqrt(squares) + 8)).key;
  return std::min(low, kInfKey);  // whatever is not finite always reaches the list
}

// Writes one winner and returns its residual, cleared (and counted) if not finite.
struct Writer {
  const TopkJob& job;
  int64_t cleared = 0;

  float residual(float r) {
    if (std::isfinite(r)) return r;
    ++cleared;
    return 0.0f;
  }

  float put(int64_t slot, float acc, int64_t index) {
    const float sent = store_rounded(job.values, job.value_dtype, slot, acc);
    if (job.wide_indices) {
      static_cast<int64_t*>(job.indices)[slot] = index;
    } else {
      static_cast<int32_t*>(job.indices)[slot] = static_cast<int32_t>(index);
    }
    return residual(acc - sent);
  }
};

// Goes through candidates in order: winners to the payload, losers back to err. Where the stream took
// the candidates out of err, 0 is there already, and a winner that leaves nothing needs no write: each
// would touch another cache line.
void emit(const Candidates& list, int64_t base, bool taken_out, int32_t threshold, Slot& slot, float* err,
          Writer& writer) {
  for (int64_t j = 0; j < list.count; ++j) {
    const float acc = list.values[j];
    const int64_t index = base + list.indices[j];
    const int32_t key = key_of(acc);
    if (key > threshold || (key == threshold && slot.quota > 0)) {
      slot.quota -= key == threshold;
      const float rest = writer.put(slot.offset++, acc, index);
      if (!taken_out || rest != 0.0f) err[index] = rest;
    } else {
      err[index] = writer.residual(acc);
    }
  }
}

// Scratch memory that nothing is written to before it is used: the kernel gives pages as they fill.
struct Lists {
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<Candidates> parts;

  Lists(int count, int64_t capacity) {
    capacity = (capacity + kLine - 1) / kLine * kLine;
    const auto slots = static_cast<size_t>(capacity + kLine);
    for (int t = 0; t < count; ++t) {
      memory.emplace_back(new char[slots * (sizeof(float) + sizeof(uint32_t))]);
      auto* values = reinterpret_cast<float*>(memory.back().get());
      parts.push_back({values, reinterpret_cast<uint32_t*>(values + slots), capacity, 0, false});
    }
  }

  int64_t capacity() const { return parts[0].capacity * static_cast<int64_t>(parts.size()); }
};

}  // namespace

int64_t topk_compress(const TopkJob& job) {
  const Leaves& isa = leaves();
  const int64_t n = job.numel;
  const int parts = std::max(parts_for(n, job.threads), static_cast<int>((n + kMaxPart - 1) / kMaxPart));
  std::vector<Range> ranges;
  int64_t longest = 0;
  for (int t = 0; t < parts; ++t) {
    ranges.push_back(part_of(n, parts, t, 64));
    longest = std::max(longest, ranges.back().end - ranges.back().begin);
  }
  const KeepDenormals guard;
  const bool sampled = n >= kMinSampled && job.k <= n / 4;
  // Twice k covers clustered gradients, where one part holds most winners; the constant, small k.
  Lists lists(parts, sampled ? std::min(longest, 2 * job.k + (1 << 14)) : 0);
  Lists tiles(parts, kTile + kLine);
  const std::unique_ptr<int32_t[]> keys(new int32_t[static_cast<size_t>(lists.capacity())]);
  const int32_t guess = sampled ? guess_threshold(job, isa) : INT32_MAX;

  const int64_t size = job.grad_dtype == Dtype::fp32 ? 4 : 2;
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = ranges[static_cast<size_t>(t)];
    isa.topk_stream(static_cast<const char*>(job.grad) + begin * size, job.grad_dtype, job.err + begin,
                    end - begin, guess, &lists.parts[static_cast<size_t>(t)]);
  });
  int64_t listed = 0;
  bool overflow = false;
  for (const Candidates& list : lists.parts) {
    listed += list.count;
    overflow |= list.overflow;
  }

  std::vector<int64_t> cleared(static_cast<size_t>(parts));
  std::vector<Segment> segments;
  if (listed >= job.k && !overflow) {
    for (const Candidates& list : lists.parts) segments.push_back({list.values, list.count});
    auto [threshold, slots] = select_above(segments, job.k, guess, keys.get());
    for_each_part(parts, [&, threshold = threshold, slots = slots.data()](int t) {
      const auto p = static_cast<size_t>(t);
      if (job.value_dtype == Dtype::fp32 && !job.wide_indices) {
        cleared[p] = isa.topk_emit(lists.parts[p], {threshold.key, slots[p].quota, job.err + ranges[p].begin,
                                                    static_cast<float*>(job.values) + slots[p].offset,
                                                    static_cast<int32_t*>(job.indices) + slots[p].offset,
                                                    static_cast<int32_t>(ranges[p].begin), slots[p].winners});
        return;
      }
      Writer writer{job};
      emit(lists.parts[p], ranges[p].begin, true, threshold.key, slots[p], job.err, writer);
      cleared[p] = writer.cleared;
    });
  } else {
    for_each_part(parts, [&](int t) {
      const auto p = static_cast<size_t>(t);
      const Candidates& list = lists.parts[p];
      for (int64_t j = 0; j < list.count; ++j) job.err[ranges[p].begin + list.indices[j]] = list.values[j];
    });
    for (const Range& range : ranges) segments.push_back({job.err + range.begin, range.end - range.begin});
    auto [threshold, slots] = select_largest(segments, job.k);
    for_each_part(parts, [&, threshold = threshold, slots = slots.data()](int t) {
      const auto p = static_cast<size_t>(t);
      Writer writer{job};
      for (int64_t at = ranges[p].begin; at < ranges[p].end; at += kTile) {
        Candidates& tile = tiles.parts[p];
        tile.count = 0;
        isa.topk_collect(job.err + at, std::min(kTile, ranges[p].end - at), std::min(threshold.key, kInfKey),
                         &tile);
        emit(tile, at, false, threshold.key, slots[p], job.err, writer);
      }
      cleared[p] = writer.cleared;
    });
  }
  int64_t total = 0;
  for (int64_t c : cleared) total += c;
  return total;
}

int64_t topk_decompress(const SparseDecode& job) {
  const auto* narrow = static_cast<const int32_t*>(job.indices);
  const auto* wide = static_cast<const int64_t*>(job.indices);
  const auto index = [&](int64_t j) { return job.wide_indices ? wide[j] : narrow[j]; };
  int64_t before = -1;
  for (int64_t j = 0; j < job.k; ++j) {
    const int64_t i = index(j);
    if (i <= before || i >= job.numel) return j;
    before = i;
  }
  const int parts = parts_for(job.numel, job.threads);
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(job.numel, parts, t, 64);
    if (!job.accumulate) std::fill(job.out + begin, job.out + end, 0.0f);
    int64_t low = 0, high = job.k;  // first position with an index >= begin
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (index(middle) < begin) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    for (int64_t j = low; j < job.k && index(j) < end; ++j) {
      const float value = job.alpha * load_widened(job.values, job.value_dtype, j);
      float& out = job.out[index(j)];
      out = job.accumulate ? out + value : value;
    }
  });
  return -1;
}

}  // namespace gck
