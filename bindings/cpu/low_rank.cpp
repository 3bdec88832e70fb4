#include "cpu/low_rank.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/isa/leaves.hpp"
#include "cpu/threads.hpp"

namespace gck {
namespace {

// Of a row's squares, what must be left when its share of the rows before it is taken away.
constexpr double kLeastLeft = 0x1p-40;
constexpr int64_t kColumnTile = 1024;  // the least that a thread takes of a block of rows

// Lower triangle of a Cholesky factor, column by column; roots are 0 of rows that are not independent.
void factorise(std::vector<double>& gram, int64_t rank, std::vector<double>& roots,
               std::vector<double>& factors) {
  std::vector<double> squares(static_cast<size_t>(rank));
  const auto at = [rank](int64_t i, int64_t j) { return static_cast<size_t>(i * rank + j); };
  for (int64_t j = 0; j < rank; ++j) squares[static_cast<size_t>(j)] = gram[at(j, j)];
  for (int64_t j = 0; j < rank; ++j) {
    const double pivot = gram[at(j, j)];
    // Not where something is not finite: that has to be seen.
    if (pivot < kLeastLeft * squares[static_cast<size_t>(j)] || pivot == 0.0) continue;
    const double root = roots[static_cast<size_t>(j)] = std::sqrt(pivot);
    for (int64_t k = j + 1; k < rank; ++k) factors[at(j, k)] = gram[at(k, j)] / root;
    for (int64_t i = j + 1; i < rank; ++i) {
      for (int64_t k = j + 1; k <= i; ++k) gram[at(i, k)] -= factors[at(j, i)] * factors[at(j, k)];
    }
  }
}

template <typename F>
void for_rows(const LowRankShape& shape, int threads, F f) {
  const int parts = parts_for(shape.numel, threads);
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(shape.rows(), parts, t, 1);
    f(t, begin, end);
  });
}

}  // namespace

void low_rank_basis(uint64_t seed, int64_t count, float* basis) {
  const KeepDenormals guard;
  leaves().low_rank_basis(seed, 0, count, basis);
}

void low_rank_project(const LowRankShape& shape, const void* grad, Dtype grad_dtype, float* err,
                      const ResidualReading& reading, const float* basis, float* left, int threads) {
  const int64_t stride = (shape.columns + kDotLanes - 1) / kDotLanes * kDotLanes;
  std::vector<float> padded;
  if (stride != shape.columns) {
    padded.resize(static_cast<size_t>(shape.rank * stride));
    for (int64_t j = 0; j < shape.rank; ++j)
      std::copy_n(basis + j * shape.columns, shape.columns, padded.data() + j * stride);
    basis = padded.data();
  }
  const LowRankProject job{grad,       grad_dtype,   err,     shape.numel, shape.columns,
                           shape.rank, shape.rows(), reading, basis,       left};
  for_rows(shape, threads,
           [&](int, int64_t begin, int64_t end) { leaves().low_rank_project(job, begin, end); });
}

namespace {

void orthonormalise(float* left, int64_t rows, int64_t rank, int threads) {
  std::vector<double> gram(static_cast<size_t>(rank * rank)), factors(gram.size());
  std::vector<double> roots(static_cast<size_t>(rank));
  const int64_t pairs = rank * (rank + 1) / 2;
  const int parts = parts_for(rows * pairs, threads);
  for_each_part(parts, [&](int t) {
    alignas(64) double lanes[kGramLanes];
    int64_t pair = 0;
    for (int64_t i = 0; i < rank; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        if (pair++ % parts != t) continue;
        leaves().low_rank_gram(left + i * rows, left + j * rows, rows, lanes);
        gram[static_cast<size_t>(i * rank + j)] = lanes[0];
      }
    }
  });
  {
    const KeepDenormals guard;
    factorise(gram, rank, roots, factors);
  }
  const LowRankSolve job{left, rows, rank, roots.data(), factors.data()};
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(rows, parts, t, 1);
    leaves().low_rank_solve(job, begin, end);
  });
}

}  // namespace

void low_rank_orthonormalise(float* left, int64_t rows, int64_t rank, int threads) {
  // Once leaves rows whose angles are off where they were nearly in one plane.
  for (int i = 0; i < 2; ++i) orthonormalise(left, rows, rank, threads);
}

void low_rank_back_project(const LowRankShape& shape, const float* acc, const float* left, float* right,
                           int threads) {
  const int64_t rows = shape.rows(), columns = shape.columns, rank = shape.rank;
  std::vector<float> cut;
  const float* last = acc + (rows - 1) * columns;
  if (shape.numel < rows * columns) {
    cut.resize(static_cast<size_t>(columns));
    std::copy_n(last, shape.numel - (rows - 1) * columns, cut.data());
    last = cut.data();
  }
  const LowRankBack job{acc, last, columns, rank, rows, left};
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock, count = rank * columns;
  const int64_t tiles = (columns + kColumnTile - 1) / kColumnTile;
  std::vector<float> sums(static_cast<size_t>(blocks * count));
  const int parts = parts_for(shape.numel, threads);
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(blocks * tiles, parts, t, 1);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / tiles, from = i % tiles * kColumnTile;
      leaves().low_rank_back_project(job, block, from, std::min(from + kColumnTile, columns),
                                     sums.data() + block * count);
    }
  });
  std::fill_n(right, count, 0.0f);
  const KeepDenormals guard;
  for (int64_t block = 0; block < blocks; ++block)
    leaves().low_rank_add(sums.data() + block * count, count, right, block + 1 == blocks);
}

void low_rank_next_basis(const float* basis, const float* right, float* following, int64_t rank,
                         int64_t columns, int threads) {
  const int parts = parts_for(rank * columns, threads);
  for_each_part(parts, [&](int t) {
    for (int64_t row = t; row < rank; row += parts) {
      const int64_t at = row * columns;
      leaves().low_rank_next_row(basis + at, right + at, following + at, columns, at);
    }
  });
}

int64_t low_rank_settle(const LowRankShape& shape, float* acc, const float* left, const float* right,
                        int threads) {
  const LowRankProduct job{acc,  shape.numel, shape.columns, shape.rank, shape.rows(),
                           left, right,       1.0f,          false};
  std::vector<int64_t> cleared(static_cast<size_t>(parts_for(shape.numel, threads)));
  for_rows(shape, threads, [&](int t, int64_t begin, int64_t end) {
    cleared[static_cast<size_t>(t)] = leaves().low_rank_settle(job, begin, end);
  });
  int64_t total = 0;
  for (int64_t some : cleared) total += some;
  return total;
}

void low_rank_decompress(const LowRankShape& shape, const float* left, const float* right, float* out,
                         float alpha, bool add, int threads) {
  const LowRankProduct job{out,  shape.numel, shape.columns, shape.rank, shape.rows(),
                           left, right,       alpha,         add};
  for_rows(shape, threads,
           [&](int, int64_t begin, int64_t end) { leaves().low_rank_decompress(job, begin, end); });
}

}  // namespace gck
