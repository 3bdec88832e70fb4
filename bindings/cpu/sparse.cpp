#include "cpu/sparse.hpp"

#include <algorithm>
#include <atomic>

#include "cpu/isa/leaves.hpp"
#include "cpu/round.hpp"
#include "cpu/threads.hpp"

namespace gck {
namespace {

// Entries of out that are worked on while all rows pass by: half of a nearest cache.
constexpr int64_t kTile = 4096;
constexpr int64_t kCheckGrain = 1 << 16;
// From this many entries on, out is written past the caches: it would not stay there, and writing through
// them reads first what is overwritten.
constexpr int64_t kPastCaches = 1 << 21;

template <typename Index>
bool ascends(const Index* indices, int64_t begin, int64_t end) {
  bool good = true;
  for (int64_t j = begin; j < end; ++j) good &= indices[j - 1] < indices[j];
  return good;
}

// The first position of one row at which something is wrong, or -1.
template <typename Index>
int64_t first_bad(const Index* indices, int64_t count, int64_t numel) {
  for (int64_t j = 0; j < count; ++j) {
    if (indices[j] < 0 || indices[j] >= numel || (j > 0 && indices[j] <= indices[j - 1])) return j;
  }
  return -1;
}

template <typename Index>
BadIndex check(const SparseJob& job) {
  const auto indices = [&](size_t row) { return static_cast<const Index*>(job.rows[row].indices); };
  const auto useful = static_cast<int>(
      std::min<int64_t>(job.threads, job.count * static_cast<int64_t>(job.rows.size()) / kCheckGrain));
  const int parts = std::max(1, useful);
  std::atomic<bool> good{true};
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(job.count, parts, t, 1);
    for (size_t row = 0; row < job.rows.size(); ++row) {
      if (!ascends(indices(row), std::max<int64_t>(begin, 1), end)) good = false;
    }
  });
  for (size_t row = 0; row < job.rows.size() && job.count > 0; ++row) {
    const Index* all = indices(row);
    if (good && all[0] >= 0 && all[job.count - 1] < job.numel) continue;
    if (const int64_t bad = first_bad(all, job.count, job.numel); bad >= 0) {
      return {static_cast<int64_t>(row), bad};
    }
  }
  return {-1, -1};
}

template <typename Index, Dtype D>
void add_rows(const SparseJob& job, int64_t begin, int64_t end, int64_t* next) {
  const Leaves& isa = leaves();
  const size_t rows = job.rows.size();
  // next: the first entry of each row that is not yet added
  for (size_t row = 0; row < rows; ++row) {
    const auto* indices = static_cast<const Index*>(job.rows[row].indices);
    next[row] = std::lower_bound(indices, indices + job.count, begin,
                                 [](Index index, int64_t at) { return index < at; }) -
                indices;
  }
  const bool past_caches = job.numel >= kPastCaches;
  alignas(64) float fresh[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t stop = std::min(at + kTile, end);
    float* tile = job.clear ? fresh : job.out + at;
    if (job.clear) std::fill_n(fresh, stop - at, 0.0f);
    for (size_t row = 0; row < rows; ++row) {
      const auto* indices = static_cast<const Index*>(job.rows[row].indices);
      const void* values = job.rows[row].values;
      int64_t j = next[row];
      for (; j < job.count && indices[j] < stop; ++j) {
        const float value = job.alpha * load_widened(values, D, j);
        float& place = tile[indices[j] - at];
        place = job.add ? place + value : value;
      }
      next[row] = j;
    }
    if (!job.clear) continue;
    if (past_caches) {
      isa.copy_out(fresh, job.out + at, stop - at);
    } else {
      std::copy_n(fresh, stop - at, job.out + at);
    }
  }
}

template <typename Index>
void decompress(const SparseJob& job) {
  const int parts = parts_for(job.numel, job.threads);
  const size_t rows = job.rows.size();
  std::vector<int64_t> positions(rows * static_cast<size_t>(parts));
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(job.numel, parts, t, 64);
    int64_t* next = positions.data() + rows * static_cast<size_t>(t);
    switch (job.value_dtype) {
      case Dtype::fp32:
        return add_rows<Index, Dtype::fp32>(job, begin, end, next);
      case Dtype::bf16:
        return add_rows<Index, Dtype::bf16>(job, begin, end, next);
      case Dtype::fp16:
        return add_rows<Index, Dtype::fp16>(job, begin, end, next);
    }
  });
}

}  // namespace

BadIndex sparse_decompress(const SparseJob& job) {
  const BadIndex bad = job.wide_indices ? check<int64_t>(job) : check<int32_t>(job);
  if (bad.row >= 0) return bad;
  job.wide_indices ? decompress<int64_t>(job) : decompress<int32_t>(job);
  return bad;
}

}  // namespace gck
