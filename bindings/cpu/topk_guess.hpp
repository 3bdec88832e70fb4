// Guessing, from a sample, a threshold that at least k entries reach and few more.
#pragma once

#include "cpu/isa/leaves.hpp"
#include "cpu/topk.hpp"

namespace gck {

struct Sampled {
  Guess guess;
  int32_t high;  // the k-th key is very probably below it
};

// What to list for the k largest of all runs. A run without grad is sampled from err alone. Each `draw` looks
// at other entries: one that follows a wrong guess must not see the same again. `memory`: bytes_for_sample,
// aligned to 8.
Sampled guess_by_sample(const std::vector<TopkRun>& runs, int64_t numel, int64_t k, int draw, int threads,
                        void* memory, const ResidualPass* residual = nullptr);
size_t bytes_for_sample(int64_t numel, int64_t k, int threads);

// The same from the threshold of the last step, unseen.
Sampled guess_by_hint(int32_t key, int64_t numel, int64_t k);

}  // namespace gck
