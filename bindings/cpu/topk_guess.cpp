#include "cpu/topk_guess.hpp"

#include <algorithm>
#include <cmath>

namespace gck {
namespace {

constexpr int64_t kLine = 16;            // elements of a sampled line: one cache line of fp32
constexpr int64_t kMaxLines = 4096;      // lines in the sample
constexpr int64_t kSampleFraction = 64;  // at most one element in this many is sampled
constexpr int kCoarseShift = 20;         // sampled keys are first counted in 2^11 bins
constexpr int kCoarseBins = 1 << (31 - kCoarseShift);
constexpr int64_t kDense = 25;               // one entry in this many to list is many
constexpr int64_t kLinesWorthWaiting = 256;  // for another thread
constexpr int64_t kBehind = 32;              // that lists need room for behind their last entry
constexpr float kHintMargin = 0.96f;

// As many lines as pay: a line costs about a dozen times what it takes to list an entry and to put it back.
// With L lines about n sqrt(ratio / L) such entries are listed for the margin's root, and n / 2 L for its
// constant.
int64_t lines_for(int64_t numel, int64_t k) {
  const auto n = static_cast<double>(numel), r = static_cast<double>(k) / n;
  const double lines = std::max(std::pow(n * std::sqrt(r) / 18, 2.0 / 3), std::sqrt(n / 23));
  const int64_t most = std::min(kMaxLines, numel / (kLine * kSampleFraction));
  return std::clamp<int64_t>(static_cast<int64_t>(lines), 1, std::max<int64_t>(1, most));
}

uint64_t hash(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

struct Line {
  const char* grad;
  Dtype dtype;
  const float* err;
  int64_t length;
};

// Memory of a sample, in that of the caller: fresh pages would take longer than the sampling.
struct Sample {
  int64_t lines, size;
  int parts;                // threads at work
  Line* places;             // of each line
  float* acc;               // kLine a line; zeros where a line lies past its run's end
  uint32_t* coarse_counts;  // kCoarseBins a part, by key >> kCoarseShift
  float* values;            // those that may be asked for

  Sample(int64_t numel, int64_t k, int threads, void* memory)
      : lines(lines_for(numel, k)), size(lines * kLine), parts(lines < kLinesWorthWaiting ? 1 : threads) {
    const auto start = reinterpret_cast<uintptr_t>(memory);
    const auto take = [&](int64_t count, size_t each) {
      bytes += static_cast<size_t>(count) * each;
      return reinterpret_cast<void*>(start + bytes - static_cast<size_t>(count) * each);
    };
    places = static_cast<Line*>(take(lines, sizeof(Line)));
    acc = static_cast<float*>(take(size, sizeof(float)));
    coarse_counts = static_cast<uint32_t*>(take(int64_t{parts} * kCoarseBins, sizeof(uint32_t)));
    values = static_cast<float*>(take(size + kBehind, sizeof(float)));
  }

  size_t bytes = 0;
};

// Where the lines [first, last) lie.
void find_lines(const std::vector<TopkRun>& runs, int64_t stride, int draw, int64_t first, int64_t last,
                Line* places) {
  auto run = runs.begin();
  int64_t begin = 0;  // of the run
  for (int64_t line = first; line < last; ++line) {
    const uint64_t seed = static_cast<uint64_t>(line) | static_cast<uint64_t>(draw) << 32;
    const auto jitter = static_cast<int64_t>(hash(seed) % static_cast<uint64_t>(stride));
    const int64_t at = (line * stride + jitter) * kLine;
    for (; at >= begin + run->numel; ++run) begin += run->numel;
    const int64_t inside = std::max<int64_t>(0, std::min(at - begin, run->numel - kLine));
    const int64_t size = run->grad_dtype == Dtype::fp32 ? 4 : 2;
    const auto* grad = static_cast<const char*>(run->grad);
    places[line] = {grad == nullptr ? nullptr : grad + inside * size, run->grad_dtype, run->err + inside,
                    std::min(kLine, run->numel)};
  }
}

void ask_for(const Line& line) {
  __builtin_prefetch(line.grad);
  __builtin_prefetch(line.err);
}

void take_sample(Sample& sample, const std::vector<TopkRun>& runs, int64_t numel, int draw,
                 const ResidualPass* residual) {
  const Leaves& isa = leaves();
  const int64_t stride = std::max<int64_t>(1, numel / kLine / sample.lines);
  for_each_part(sample.parts, [&](int t) {
    const auto [first, last] = part_of(sample.lines, sample.parts, t, 1);
    uint32_t* counts = sample.coarse_counts + t * kCoarseBins;
    std::fill_n(counts, kCoarseBins, 0);
    // All lines first of all: memory answers while others are being asked for.
    find_lines(runs, stride, draw, first, last, sample.places);
    for (int64_t i = first; i < last; ++i) ask_for(sample.places[i]);
    for (int64_t i = first; i < last; ++i) {
      const Line& line = sample.places[i];
      float* acc = sample.acc + i * kLine;
      if (line.length < kLine) std::fill_n(acc, kLine, 0.0f);
      if (line.grad == nullptr) {
        std::copy_n(line.err, line.length, acc);
      } else {
        float err[kLine];
        std::copy_n(line.err, line.length, err);
        if (residual != nullptr) residual->read(err, line.length);
        isa.add(line.grad, line.dtype, err, line.length, acc);
      }
      for (int64_t j = 0; j < kLine; ++j) ++counts[key_of(acc[j]) >> kCoarseShift];
    }
  });
}

}  // namespace

// The sample's entry of rank f + 5 sqrt(sum of c^2) + 8, where f is the expected rank of the k-th entry and
// c the number of entries that a line has above rank f: entries of a line are not independent, and c^2
// measures how clustered they are. Lines are hashed, so that no period of the gradient aligns with them.
Sampled guess_by_sample(const std::vector<TopkRun>& runs, int64_t numel, int64_t k, int draw, int threads,
                        void* memory, const ResidualPass* residual) {
  Sample sample(numel, k, threads, memory);
  take_sample(sample, runs, numel, draw, residual);
  const int64_t size = sample.size;
  const double expected = static_cast<double>(k) / static_cast<double>(numel) * static_cast<double>(size);
  const auto clamped = [&](double rank) {
    return static_cast<int64_t>(std::clamp(std::ceil(rank), 1.0, static_cast<double>(size)));
  };
  // No line has more than kLine above rank f, so that no rank beyond this one will be asked for.
  const int64_t farthest = clamped(expected + 5 * std::sqrt((expected + 1) * kLine) + 8);
  int bin = kCoarseBins - 1;
  for (int64_t above = 0; bin > 0; --bin) {
    for (int t = 0; t < sample.parts; ++t) above += sample.coarse_counts[t * kCoarseBins + bin];
    if (above >= farthest) break;
  }
  const float* top = sample.values;
  const int64_t count =
      leaves().topk_collect(sample.acc, size, static_cast<int32_t>(bin) << kCoarseShift, sample.values);

  const auto key_of_rank = [&](int64_t rank) {
    return leaves().topk_kth(top, count, std::clamp<int64_t>(rank, 1, count), 0);
  };
  const int32_t middle = key_of_rank(clamped(expected));
  const auto squares = static_cast<double>(leaves().topk_squares(sample.acc, sample.lines, middle));
  const double margin = 5 * std::sqrt(squares) + 8;
  const int64_t rank = clamped(expected + margin);
  const int32_t low = key_of_rank(rank), highest = key_of_rank(clamped(expected - margin));
  // Too few of the sample lie above for a bound: none.
  const int32_t high = expected > margin + 1 ? highest + 1 : INT32_MAX;
  const int64_t equal = std::count_if(top, top + count, [low](float x) { return key_of(x) == low; });
  if (equal > rank / 4 + kLine) return {{low + 1, true, false, low + 1}, std::max(high, low + 2)};
  // Whatever is not finite always reaches the list.
  return {{std::min(low, kInfKey), false, k > numel / kDense, std::min(middle, kInfKey)}, high};
}

size_t bytes_for_sample(int64_t numel, int64_t k, int threads) {
  return Sample(numel, k, threads, nullptr).bytes;
}

Sampled guess_by_hint(int32_t key, int64_t numel, int64_t k) {
  const int32_t last = std::min(key, kInfKey);
  const int32_t low = key_of(float_of(static_cast<uint32_t>(last)) * kHintMargin);
  return {{low, false, k > numel / kDense, last}, last + (last - low)};
}

}  // namespace gck
