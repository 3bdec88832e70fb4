// A matrix as the product of two thin ones, on the CPU: the steps of one turn of a power iteration.
#pragma once

#include "cpu/residual.hpp"
#include "cpu/types.hpp"

namespace gck {

// A vector of `numel` elements as rows of `columns`, the last of which may be cut short.
struct LowRankShape {
  int64_t numel, columns, rank;

  int64_t rows() const { return (numel + columns - 1) / columns; }
};

// basis[0, count) = numbers in [-1, 1) that follow from the seed.
void low_rank_basis(uint64_t seed, int64_t count, float* basis);

// err becomes acc = grad + err, as `reading` says; left (rank, rows) = acc times each row of basis (rank,
// columns). Sums are of 64 lanes each, then a halving tree.
void low_rank_project(const LowRankShape& shape, const void* grad, Dtype grad_dtype, float* err,
                      const ResidualReading& reading, const float* basis, float* left, int threads);

// The rows of left (rank, rows) become orthonormal, by the Cholesky factor of their products in fp64; one
// that is all but a combination of those before it becomes zeros.
void low_rank_orthonormalise(float* left, int64_t rows, int64_t rank, int threads);

// right (rank, columns) = left acc: the rows of blocks of 256 one after the other, then the blocks.
void low_rank_back_project(const LowRankShape& shape, const float* acc, const float* left, float* right,
                           int threads);

// The basis of the next step, (rank, columns): rows of right, each times the power of two that brings its
// largest entry near one, and 2^-12 times numbers in [-1, 1), hashes of the bits of `basis` and of places;
// rows of basis where those of right are not finite.
void low_rank_next_basis(const float* basis, const float* right, float* following, int64_t rank,
                         int64_t columns, int threads);

// acc -= left right; returns how many of what is left were not finite, and are zeros now.
int64_t low_rank_settle(const LowRankShape& shape, float* acc, const float* left, const float* right,
                        int threads);

// out = alpha * (left right), or out += that.
void low_rank_decompress(const LowRankShape& shape, const float* left, const float* right, float* out,
                         float alpha, bool add, int threads);

}  // namespace gck
