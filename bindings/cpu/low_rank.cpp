#include "cpu/low_rank.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>

#include "cpu/copy.hpp"
#include "cpu/isa/leaves.hpp"
#include "cpu/threads.hpp"

namespace gck {
namespace {

// Of a row's squares, what must be left when its share of the rows before it is taken away.
constexpr double kLeastLeft = 0x1p-40;
constexpr int64_t kLine = 16;          // elements of a vector
constexpr int64_t kColumnTile = 1024;  // the least that a thread takes of a block of rows

// Lower triangle of a Cholesky factor, column by column; roots are 0 of rows that are not independent.
void factorise(std::vector<double>& gram, int64_t rank, std::vector<double>& squares,
               std::vector<double>& roots, std::vector<double>& factors) {
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

// Threads share things, of which the i-th has units(i) parts, and takes as long as weight(i) elements do:
// f(i, begin, end) is called for all units of all things.
template <typename Weight, typename Units, typename F>
void share(size_t things, int threads, Weight weight, Units units, F f) {
  int64_t total = 0;
  for (size_t i = 0; i < things; ++i) total += weight(i);
  const int parts = parts_for(total, threads);
  for_each_part(parts, [&](int t) {
    const int64_t from = total / parts * t, to = t + 1 == parts ? total : total / parts * (t + 1);
    int64_t start = 0;
    for (size_t i = 0; i < things && start < to; ++i) {
      const int64_t of_it = weight(i), all = units(i);
      const auto unit = [&](int64_t at) {  // the first that is not before an element
        const double before = static_cast<double>(at - start) / static_cast<double>(of_it);
        return before <= 0 ? 0 : before >= 1 ? all : static_cast<int64_t>(std::ceil(before * all));
      };
      if (const int64_t begin = unit(from), end = unit(to); begin < end) f(i, begin, end);
      start += of_it;
    }
  });
}

// Whether results as large as all matrices together would not stay in the caches.
bool are_large(const LowRankShapes& shapes, int threads) {
  int64_t total = 0;
  for (const LowRankShape& shape : shapes) total += shape.numel;
  return is_past_caches(total, threads);
}

bool has_aligned_rows(const LowRankShape& shape, const float* out) {
  return shape.columns % kLine == 0 && reinterpret_cast<uintptr_t>(out) % (sizeof(float) * kLine) == 0;
}

template <typename F>
void share_rows(const LowRankShapes& shapes, int threads, F f) {
  share(
      shapes.size(), threads, [&](size_t i) { return shapes[i].numel; },
      [&](size_t i) { return shapes[i].rows(); }, f);
}

}  // namespace

void low_rank_basis(uint64_t seed, int64_t count, float* basis) {
  const KeepDenormals guard;
  leaves().low_rank_basis(seed, 0, count, basis);
}

void low_rank_project(const LowRankShapes& shapes, const std::vector<LowRankInput>& inputs,
                      const ResidualReading& reading, const Sources& bases, const Targets& lefts,
                      int threads) {
  std::vector<std::vector<float>> padded(shapes.size());
  std::vector<LowRankProject> jobs;
  const bool large = are_large(shapes, threads);
  for (size_t i = 0; i < shapes.size(); ++i) {
    const auto& [numel, columns, rank] = shapes[i];
    const int64_t stride = (columns + kDotLanes - 1) / kDotLanes * kDotLanes;
    const float* basis = bases[i];
    if (stride != columns) {
      padded[i].resize(static_cast<size_t>(rank * stride));
      for (int64_t j = 0; j < rank; ++j)
        std::copy_n(basis + j * columns, columns, padded[i].data() + j * stride);
      basis = padded[i].data();
    }
    const auto& [grad, dtype, err, acc] = inputs[i];
    jobs.push_back({grad, dtype, err, acc, numel, columns, rank, shapes[i].rows(), reading, basis, lefts[i],
                    large && err != acc && has_aligned_rows(shapes[i], acc)});
  }
  share_rows(shapes, threads,
             [&](size_t i, int64_t begin, int64_t end) { leaves().low_rank_project(jobs[i], begin, end); });
}

namespace {

void orthonormalise(const LowRankShapes& shapes, const Targets& lefts, int threads) {
  struct Factor {
    std::vector<double> gram, factors, squares, roots;
  };
  std::vector<Factor> made(shapes.size());
  for (size_t i = 0; i < shapes.size(); ++i) {
    const auto rank = static_cast<size_t>(shapes[i].rank);
    made[i] = {std::vector<double>(rank * rank), std::vector<double>(rank * rank), std::vector<double>(rank),
               std::vector<double>(rank)};
  }
  const auto pairs = [&](size_t i) { return shapes[i].rank * (shapes[i].rank + 1) / 2; };
  const auto products = [&](size_t i) { return shapes[i].rows() * pairs(i); };
  share(shapes.size(), threads, products, pairs, [&](size_t i, int64_t begin, int64_t end) {
    alignas(64) double lanes[kGramLanes];
    const int64_t rows = shapes[i].rows(), rank = shapes[i].rank;
    int64_t pair = 0;
    for (int64_t j = 0; j < rank; ++j) {
      for (int64_t k = 0; k <= j; ++k, ++pair) {
        if (pair < begin || pair >= end) continue;
        leaves().low_rank_gram(lefts[i] + j * rows, lefts[i] + k * rows, rows, lanes);
        made[i].gram[static_cast<size_t>(j * rank + k)] = lanes[0];
      }
    }
  });
  const auto cube = [&](size_t i) { return shapes[i].rank * shapes[i].rank * shapes[i].rank; };
  share(
      shapes.size(), threads, cube, [](size_t) { return int64_t{1}; },
      [&](size_t i, int64_t, int64_t) {
        factorise(made[i].gram, shapes[i].rank, made[i].squares, made[i].roots, made[i].factors);
      });
  const auto rows = [&](size_t i) { return shapes[i].rows(); };
  share(shapes.size(), threads, products, rows, [&](size_t i, int64_t begin, int64_t end) {
    const LowRankSolve job{lefts[i], rows(i), shapes[i].rank, made[i].roots.data(), made[i].factors.data()};
    leaves().low_rank_solve(job, begin, end);
  });
}

}  // namespace

void low_rank_orthonormalise(const LowRankShapes& shapes, const Targets& lefts, int threads) {
  // Once leaves rows whose angles are off where they were nearly in one plane.
  for (int i = 0; i < 2; ++i) orthonormalise(shapes, lefts, threads);
}

void low_rank_back_project(const LowRankShapes& shapes, const Sources& accs, const Sources& lefts,
                           const Targets& rights, int threads) {
  const auto blocks = [&](size_t i) { return (shapes[i].rows() + kRowBlock - 1) / kRowBlock; };
  const auto tiles = [&](size_t i) { return (shapes[i].columns + kColumnTile - 1) / kColumnTile; };
  const auto count = [&](size_t i) { return shapes[i].rank * shapes[i].columns; };
  std::vector<std::vector<float>> cut(shapes.size());
  std::vector<LowRankBack> jobs;
  std::vector<int64_t> places;  // of the parts of each matrix
  int64_t all = 0;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const int64_t columns = shapes[i].columns, rows = shapes[i].rows();
    const float* last = accs[i] + (rows - 1) * columns;
    if (shapes[i].numel < rows * columns) {
      cut[i].resize(static_cast<size_t>(columns));
      std::copy_n(last, shapes[i].numel - (rows - 1) * columns, cut[i].data());
      last = cut[i].data();
    }
    jobs.push_back({accs[i], last, columns, shapes[i].rank, rows, lefts[i]});
    places.push_back(all);
    all += blocks(i) * count(i);
  }
  const auto parts = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(all));
  share(
      shapes.size(), threads, [&](size_t i) { return shapes[i].numel; },
      [&](size_t i) { return blocks(i) * tiles(i); },
      [&](size_t i, int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t block = unit / tiles(i), from = unit % tiles(i) * kColumnTile;
          leaves().low_rank_back_project(jobs[i], block, from,
                                         std::min(from + kColumnTile, shapes[i].columns),
                                         parts.get() + places[i] + block * count(i));
        }
      });
  share(
      shapes.size(), threads, [&](size_t i) { return blocks(i) * count(i); }, count,
      [&](size_t i, int64_t begin, int64_t end) {
        std::fill(rights[i] + begin, rights[i] + end, 0.0f);
        for (int64_t block = 0; block < blocks(i); ++block)
          leaves().low_rank_add(parts.get() + places[i] + block * count(i) + begin, end - begin,
                                rights[i] + begin, block + 1 == blocks(i));
      });
}

void low_rank_next_basis(const LowRankShapes& shapes, const Sources& bases, const Sources& rights,
                         const Targets& followings, int threads) {
  share(
      shapes.size(), threads, [&](size_t i) { return shapes[i].rank * shapes[i].columns; },
      [&](size_t i) { return shapes[i].rank; },
      [&](size_t i, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t at = row * shapes[i].columns;
          leaves().low_rank_next_row(bases[i] + at, rights[i] + at, followings[i] + at, shapes[i].columns,
                                     at);
        }
      });
}

namespace {

LowRankProduct product_of(const LowRankShape& shape, const float* acc, float* out, const float* left,
                          const float* right) {
  return {acc, out, shape.numel, shape.columns, shape.rank, shape.rows(), left, right, 1.0f, false, false};
}

}  // namespace

void low_rank_settle(const LowRankShapes& shapes, const Sources& accs, const Targets& errs,
                     const Sources& lefts, const Sources& rights, int64_t* cleared, int threads) {
  const bool large = are_large(shapes, threads);
  share_rows(shapes, threads, [&](size_t i, int64_t begin, int64_t end) {
    LowRankProduct job = product_of(shapes[i], accs[i], errs[i], lefts[i], rights[i]);
    job.past_caches = large && accs[i] != errs[i] && has_aligned_rows(shapes[i], errs[i]);
    const int64_t some = leaves().low_rank_settle(job, begin, end);
    if (some != 0 && cleared != nullptr) std::atomic_ref(cleared[i]) += some;
  });
}

void low_rank_decompress(const LowRankShapes& shapes, const Sources& lefts, const Sources& rights,
                         const Targets& outs, float alpha, bool add, int threads) {
  const bool large = are_large(shapes, threads);
  share_rows(shapes, threads, [&](size_t i, int64_t begin, int64_t end) {
    LowRankProduct job = product_of(shapes[i], outs[i], outs[i], lefts[i], rights[i]);
    job.alpha = alpha;
    job.add = add;
    job.past_caches = large && !add && has_aligned_rows(shapes[i], outs[i]);
    leaves().low_rank_decompress(job, begin, end);
  });
}

}  // namespace gck
