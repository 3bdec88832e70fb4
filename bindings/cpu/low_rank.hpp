// A matrix as the product of two thin ones, on the CPU: the steps of one turn of a power iteration.
#pragma once

#include <vector>

#include "cpu/residual.hpp"
#include "cpu/types.hpp"

namespace gck {

// A vector of `numel` elements as rows of `columns`, the last of which may be cut short.
struct LowRankShape {
  int64_t numel, columns, rank;

  int64_t rows() const { return (numel + columns - 1) / columns; }
};

// Matrices, none of them empty, that all functions work on together, so that threads share them; further
// arguments have a pointer for each. One that is not added to may be the one that it is made of.
using LowRankShapes = std::vector<LowRankShape>;
using Sources = std::vector<const float*>;
using Targets = std::vector<float*>;

struct LowRankInput {
  const void* grad;
  Dtype dtype;
  const float* err;
  float* acc;
};

// basis[0, count) = numbers in [-1, 1) that follow from the seed.
void low_rank_basis(uint64_t seed, int64_t count, float* basis);

// acc = grad + err, which is read as `reading` says; left (rank, rows) = acc times each row of basis (rank,
// columns). Sums are of 64 lanes each, then a halving tree.
void low_rank_project(const LowRankShapes& shapes, const std::vector<LowRankInput>& inputs,
                      const ResidualReading& reading, const Sources& bases, const Targets& lefts,
                      int threads);

// The rows of left (rank, rows) become orthonormal, by the Cholesky factor of their products in fp64; one
// that is all but a combination of those before it becomes zeros.
void low_rank_orthonormalise(const LowRankShapes& shapes, const Targets& lefts, int threads);

// right (rank, columns) = left acc: the rows of blocks of 256 one after the other, then the blocks.
void low_rank_back_project(const LowRankShapes& shapes, const Sources& accs, const Sources& lefts,
                           const Targets& rights, int threads);

// The basis of the next step, (rank, columns): rows of right, each times the power of two that brings its
// largest entry near one, and 2^-12 times numbers in [-1, 1), hashes of the bits of `basis` and of places;
// rows of basis where those of right are not finite.
void low_rank_next_basis(const LowRankShapes& shapes, const Sources& bases, const Sources& rights,
                         const Targets& followings, int threads);

// err = acc - left right, but 0 where that is not finite; how many, is added to `cleared`, if any, one a
// matrix.
void low_rank_settle(const LowRankShapes& shapes, const Sources& accs, const Targets& errs,
                     const Sources& lefts, const Sources& rights, int64_t* cleared, int threads);

// out = alpha * (left right), or out += that.
void low_rank_decompress(const LowRankShapes& shapes, const Sources& lefts, const Sources& rights,
                         const Targets& outs, float alpha, bool add, int threads);

}  // namespace gck
