#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck::GCK_ISA {

void low_rank_basis(uint64_t seed, int64_t first, int64_t count, float* basis);
void low_rank_project(const LowRankProject& job, int64_t begin, int64_t end);
void low_rank_gram(const float* x, const float* y, int64_t rows, double* lanes);
void low_rank_solve(const LowRankSolve& job, int64_t begin, int64_t end);
void low_rank_back_project(const LowRankBack& job, int64_t block, int64_t begin, int64_t end, float* part);
void low_rank_add(const float* part, int64_t count, float* sum, bool last);
void low_rank_next_row(const float* basis, const float* right, float* following, int64_t columns, int64_t at);
int64_t low_rank_settle(const LowRankProduct& job, int64_t begin, int64_t end);
void low_rank_decompress(const LowRankProduct& job, int64_t begin, int64_t end);

}  // namespace gck::GCK_ISA
