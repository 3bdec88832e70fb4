// What a call may ask for beside its compression: a residual that decays and is clipped as it is read, and
// statistics. Both are done tile by tile, on what the compressor's own loop is about to read, or has just
// written: no further pass over memory.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/isa/leaves.hpp"
#include "cpu/threads.hpp"

namespace gck {

// Elements between two of its steps: so few that the hardware, which reads ahead, is always at work.
constexpr int64_t kResidualTile = 1024;

struct ResidualOptions {
  float decay = 1.0f;
  const float* clip = nullptr;   // none
  double* statistics = nullptr;  // five: see ResidualPass

  // A clip that is not above 0 is 0.
  ResidualReading reading() const {
    if (clip == nullptr) return {decay};
    return {decay, *clip > 0 ? *clip : 0.0f};
  }
};

// One pass over a residual of `numel` elements, in tiles that begin at multiples of kBlock.
//
// acc = grad + clamp(decay * err, -clip, clip). The statistics are
// |acc|_1, |acc|_2^2, |err|_2^2 afterwards, how many of acc are not finite (these count as 0 in the norms),
// and how many entries the payload has. Every sum is one of kBlock numbers, then of kBlock such sums, and so
// on, each as a halving tree, with zeros behind the last: the same for any tiles and threads.
class ResidualPass {
 public:
  ResidualPass(int64_t numel, const ResidualOptions& options);

  // Whether nothing is asked for, and nothing needs to be called.
  bool idle() const { return reading_.is_plain() && statistics_ == nullptr; }
  bool measures() const { return statistics_ != nullptr; }

  // err becomes what is to be added to grad.
  void read(float* err, int64_t count) const {
    if (!reading_.is_plain()) leaves().residual_read(err, count, reading_);
  }

  // The same for elements [begin, begin + count) of the vector, with the sums of acc.
  void before(const void* grad, Dtype dtype, float* err, int64_t begin, int64_t count) {
    read(err, count);
    if (!measures()) return;
    const int64_t block = begin / kBlock;
    leaves().residual_sums(grad, dtype, err, count,
                           {l1_.data() + block, acc_sq_.data() + block, nonfinite_.data() + block});
  }

  // err[0, count), of elements from `begin` on, is what stays.
  void after(const float* err, int64_t begin, int64_t count) {
    if (measures())
      leaves().residual_sums(nullptr, Dtype::fp32, err, count,
                             {nullptr, err_sq_.data() + begin / kBlock, nullptr});
  }

  // Writes the statistics of a payload of so many entries.
  void finish(int64_t selected);
  // The same where |err|^2 is |acc|^2 less what was sent of it: `sent`, made by `blocks_of` entries.
  void finish_sent(int64_t selected, std::vector<double> sent);

  // Zeros for the sums of so many numbers, and behind them.
  static std::vector<double> blocks_of(int64_t count);

 private:
  ResidualReading reading_;
  double* statistics_;
  std::vector<double> l1_, acc_sq_, nonfinite_, err_sq_;  // of each block
};

// The statistics of a vector that others compress: before, of acc, which is grad and `err` as it is read;
// afterwards, where grad is null, of what is left in `err`. The rest of them becomes 0.
struct Measured {
  const void* grad;
  Dtype grad_dtype;
  const float* err;
  int64_t numel;
};
void residual_measure(const Measured& vector, const ResidualOptions& options, int threads);

// A vector that is compressed by chunks.
struct Chunked {
  const void* grad;
  Dtype grad_dtype;
  float* err;
  int64_t numel, chunk_size;
};

// Calls leaf(part, begin, end) for all chunks, each part on a thread of its own, and returns the sum of the
// results. With options, a tile's chunks at a time.
template <typename Leaf>
int64_t compress_chunks(const Chunked& vector, const ResidualOptions& options, int64_t selected, int threads,
                        Leaf leaf) {
  ResidualPass residual(vector.numel, options);
  const bool idle = residual.idle();
  const int parts = parts_for(vector.numel, threads);
  const int64_t size = vector.chunk_size, width = vector.grad_dtype == Dtype::fp32 ? 4 : 2;
  const int64_t chunks = (vector.numel + size - 1) / size;
  const int64_t unit = idle ? 1 : std::max<int64_t>(kBlock / size, 1);
  const int64_t step = idle ? chunks : std::max<int64_t>(kResidualTile / size, 1);
  std::vector<int64_t> cleared(static_cast<size_t>(parts));
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, unit);
    for (int64_t c = begin; c < end; c += step) {
      const int64_t stop = std::min(c + step, end), at = c * size;
      const int64_t count = std::min(stop * size, vector.numel) - at;
      const auto* grad = static_cast<const char*>(vector.grad) + at * width;
      if (!idle) residual.before(grad, vector.grad_dtype, vector.err + at, at, count);
      cleared[static_cast<size_t>(t)] += leaf(t, c, stop);
      if (!idle) residual.after(vector.err + at, at, count);
    }
  });
  residual.finish(selected);
  int64_t total = 0;
  for (int64_t some : cleared) total += some;
  return total;
}

}  // namespace gck
