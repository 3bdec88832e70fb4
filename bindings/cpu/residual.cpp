#include "cpu/residual.hpp"

#include <cstring>

namespace gck {
namespace {

constexpr size_t padded(size_t count) { return (count + kBlock - 1) / kBlock * kBlock; }

// Sums of kBlock numbers each as a halving tree, then of those sums, until there is one. Takes no memory.
double total(std::vector<double> sums) {
  do {
    sums.resize(padded(sums.size()));
    const size_t blocks = sums.size() / kBlock;
    for (size_t block = 0; block < blocks; ++block) {
      double* t = sums.data() + block * kBlock;
      for (int64_t half = kBlock / 2; half >= 1; half /= 2) {
        for (int64_t i = 0; i < half; ++i) t[i] += t[i + half];
      }
      sums[block] = t[0];
    }
    sums.resize(blocks);
  } while (sums.size() > 1);
  return sums[0];
}

}  // namespace

ResidualPass::ResidualPass(int64_t numel, const ResidualOptions& options)
    : reading_(options.reading()), statistics_(options.statistics) {
  if (!measures()) return;
  for (auto* sums : {&l1_, &acc_sq_, &nonfinite_, &err_sq_}) *sums = blocks_of(numel);
}

std::vector<double> ResidualPass::blocks_of(int64_t count) {
  return std::vector<double>(padded(static_cast<size_t>((count + kBlock - 1) / kBlock)));
}

void ResidualPass::finish(int64_t selected) {
  if (!measures()) return;
  statistics_[0] = total(std::move(l1_));
  statistics_[1] = total(std::move(acc_sq_));
  statistics_[2] = total(std::move(err_sq_));
  statistics_[3] = total(std::move(nonfinite_));
  statistics_[4] = static_cast<double>(selected);
}

void ResidualPass::finish_sent(int64_t selected, std::vector<double> sent) {
  finish(selected);
  statistics_[2] = std::max(statistics_[1] - total(std::move(sent)), 0.0);
}

void residual_measure(const Measured& vector, const ResidualOptions& options, int threads) {
  ResidualPass residual(vector.numel, options);
  const int64_t width = vector.grad_dtype == Dtype::fp32 ? 4 : 2;
  const int parts = parts_for(vector.numel, threads);
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(vector.numel, parts, t, kResidualTile);
    alignas(64) float read[kResidualTile];
    for (int64_t at = begin; at < end; at += kResidualTile) {
      const int64_t count = std::min(kResidualTile, end - at);
      if (vector.grad == nullptr) {
        residual.after(vector.err + at, at, count);
        continue;
      }
      std::memcpy(read, vector.err + at, sizeof(float) * static_cast<size_t>(count));
      const auto* grad = static_cast<const char*>(vector.grad) + at * width;
      residual.before(grad, vector.grad_dtype, read, at, count);
    }
  });
  residual.finish(0);
}

}  // namespace gck
