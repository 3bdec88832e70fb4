// Thin matrices: products of many rows with few, in the order of sums that docs/kernels/low_rank.md has.
#include "cpu/isa/low_rank.hpp"

#include "cpu/isa/philox.hpp"
#include "cpu/isa/residual.hpp"
#include "cpu/isa/tree.hpp"

namespace gck::GCK_ISA {
namespace {

constexpr int kDotVecs = kDotLanes / kLanes;
// Rows of the basis whose sums fit in registers together, and rows of the matrix that share a load.
#if defined(GCK_AVX512)
constexpr int kTogether = 4, kRows = 4;
#else
constexpr int kTogether = 1, kRows = 2;
#endif
constexpr int64_t kTile = 1024;  // columns of a row that stay in the nearest cache for all rows of the basis
constexpr int64_t kAhead =
    512;  // elements, where arithmetic leaves processors no time to look ahead themselves

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The products of x[0, count) with R rows of the basis, which lie `stride` apart, onto the lanes of each.
// What x is, `read(i)` says for whole vectors, and `rest(i, count)` for the last few elements.
template <int R, typename Read, typename Rest>
GCK_INLINE void add_products(int64_t count, const float* basis, int64_t stride, float* lanes, Read read,
                             Rest rest) {
  Vec sum[R][kDotVecs];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kDotVecs; ++v) sum[r][v] = load(lanes + r * kDotLanes + v * kLanes);
  }
  int64_t c = 0;
  for (; c + kDotLanes <= count; c += kDotLanes) {
    for (int v = 0; v < kDotVecs; ++v) {
      const Vec a = read(c + v * kLanes);
      for (int r = 0; r < R; ++r)
        sum[r][v] = add(sum[r][v], mul(a, load(basis + r * stride + c + v * kLanes)));
    }
  }
  for (int v = 0; v < kDotVecs; ++v) {
    const int64_t at = c + v * kLanes, left = count - at;
    if (left <= 0) break;  // a lane is never -0, so that zeros would change nothing
    const Vec a = left < kLanes ? rest(at, static_cast<int>(left)) : read(at);
    for (int r = 0; r < R; ++r) sum[r][v] = add(sum[r][v], mul(a, load(basis + r * stride + at)));
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kDotVecs; ++v) store(lanes + r * kDotLanes + v * kLanes, sum[r][v]);
  }
}

// The same of acc = grad + err, every NaN the one. acc may be err.
template <int R, Dtype D, bool PastCaches>
void add_accumulated(const void* grad, int64_t at, const float* err, float* acc, int64_t count,
                     const float* basis, int64_t stride, float* lanes) {
  add_products<R>(
      count, basis, stride, lanes,
      [&](int64_t i) {
        if (i % kPageEntries == 0) ask_for_pages<D>(grad, at + i, err + i);
        if constexpr (R > 1) {
          constexpr int64_t size = D == Dtype::fp32 ? 4 : 2;
          __builtin_prefetch(static_cast<const char*>(grad) + (at + i + kAhead) * size, 0, 3);
          __builtin_prefetch(err + i + kAhead, 1, 3);
        }
        const Vec x = canonical(add(load_as<D>(grad, at + i), load(err + i)));
        PastCaches ? store_past_caches(acc + i, x) : store(acc + i, x);
        return x;
      },
      [&](int64_t i, int rest) {
        const Vec x = canonical(add(load_part<D>(grad, at + i, rest), load_part<Dtype::fp32>(err, i, rest)));
        store_part(acc + i, x, rest);
        return x;
      });
}

// And of acc when it is there.
template <int R>
void add_read(const float* acc, int64_t count, const float* basis, int64_t stride, float* lanes) {
  add_products<R>(
      count, basis, stride, lanes, [&](int64_t i) { return load(acc + i); },
      [&](int64_t i, int rest) { return load_part<Dtype::fp32>(acc, i, rest); });
}

float lanes_sum(const float* lanes) {
  Vec x[kDotVecs];
  for (int v = 0; v < kDotVecs; ++v) x[v] = load(lanes + v * kLanes);
  for (int half = kDotVecs / 2; half >= 1; half /= 2) {
    for (int v = 0; v < half; ++v) x[v] = add(x[v], x[v + half]);
  }
  return halved(x[0]);
}

float one_nan(float x) { return x == x ? x : float_of(kNanKey); }

template <Dtype D, bool PastCaches>
void project(const LowRankProject& job, int64_t begin, int64_t end) {
  const int64_t stride = (job.columns + kDotLanes - 1) / kDotLanes * kDotLanes;
  alignas(64) float lanes[kMostRank * kDotLanes];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t l = 0; l < job.rank * kDotLanes; ++l) lanes[l] = 0.0f;
    for (int64_t c = 0; c < job.columns; c += kTile) {
      const int64_t at = row * job.columns + c;
      const int64_t count = least(least(kTile, job.columns - c), job.numel - at);
      if (count <= 0) break;
      const float* err = job.err + at;
      float* acc = job.acc + at;
      if (!job.reading.is_plain()) {
        if (acc != err) std::memcpy(acc, err, sizeof(float) * static_cast<size_t>(count));
        residual_read(acc, count, job.reading);
        err = acc;
      }
      const float* basis = job.basis + c;
      int64_t j = job.rank < kTogether ? 1 : kTogether;
      if (j == 1)
        add_accumulated<1, D, PastCaches>(job.grad, at, err, acc, count, basis, stride, lanes);
      else
        add_accumulated<kTogether, D, PastCaches>(job.grad, at, err, acc, count, basis, stride, lanes);
      for (; j + kTogether <= job.rank; j += kTogether)
        add_read<kTogether>(acc, count, basis + j * stride, stride, lanes + j * kDotLanes);
      for (; j < job.rank; ++j) add_read<1>(acc, count, basis + j * stride, stride, lanes + j * kDotLanes);
    }
    for (int64_t j = 0; j < job.rank; ++j)
      job.left[j * job.rows + row] = one_nan(lanes_sum(lanes + j * kDotLanes));
  }
}

// Of Rows rows and R ranks, sum[r] += row * left[r], one row after the other.
template <int Rows, int R>
GCK_INLINE void add_rows(const float* const* row, const float* left, int64_t stride, int64_t begin,
                         int64_t end, float* sum, int64_t columns) {
  Vec factor[Rows][R];
  for (int i = 0; i < Rows; ++i) {
    for (int r = 0; r < R; ++r) factor[i][r] = in_register(set1(left[r * stride + i]));
  }
  const auto step = [&](auto read, auto sum_of, auto write) {
    Vec x[Rows];
    for (int i = 0; i < Rows; ++i) x[i] = read(row[i]);
    for (int r = 0; r < R; ++r) {
      Vec total = sum_of(r);
      for (int i = 0; i < Rows; ++i) total = add(total, mul(x[i], factor[i][r]));
      write(r, total);
    }
  };
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) {
    step([&](const float* p) { return load(p + c); }, [&](int r) { return load(sum + r * columns + c); },
         [&](int r, Vec total) { store(sum + r * columns + c, total); });
  }
  if (const auto rest = static_cast<int>(end - c); rest > 0) {
    step([&](const float* p) { return load_part<Dtype::fp32>(p, c, rest); },
         [&](int r) { return load_part<Dtype::fp32>(sum + r * columns, c, rest); },
         [&](int r, Vec total) { store_part(sum + r * columns + c, total, rest); });
  }
}

template <int Rows>
void add_rows(const LowRankBack& job, const float* const* row, int64_t first, int64_t begin, int64_t end,
              float* part) {
  int64_t j = 0;
  for (; j + kTogether <= job.rank; j += kTogether)
    add_rows<Rows, kTogether>(row, job.left + j * job.rows + first, job.rows, begin, end,
                              part + j * job.columns, job.columns);
  for (; j < job.rank; ++j)
    add_rows<Rows, 1>(row, job.left + j * job.rows + first, job.rows, begin, end, part + j * job.columns,
                      job.columns);
}

// Rows of the product, as many together: use(row, column, decoded) for vectors, and part(row, column,
// decoded, count) where there are fewer elements left. R: the rank where it is known, or 0.
template <int Rows, int R, typename Use, typename Part>
GCK_INLINE void products(const LowRankProduct& job, int64_t row, int64_t count, Use use, Part part) {
  const int64_t rank = R ? R : job.rank;
  const auto decoded = [&](auto read, Vec* sum) {
    for (int i = 0; i < Rows; ++i) sum[i] = set1(0.0f);
    for (int64_t j = 0; j < rank; ++j) {
      const Vec q = read(job.right + j * job.columns);
      const float* p = job.left + j * job.rows + row;
      for (int i = 0; i < Rows; ++i) sum[i] = add(sum[i], mul(set1(p[i]), q));
    }
  };
  Vec sum[Rows];
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    decoded([&](const float* q) { return load(q + c); }, sum);
    for (int i = 0; i < Rows; ++i) use(row + i, c, sum[i]);
  }
  if (const auto rest = static_cast<int>(count - c); rest > 0) {
    decoded([&](const float* q) { return load_part<Dtype::fp32>(q, c, rest); }, sum);
    for (int i = 0; i < Rows; ++i) part(row + i, c, sum[i], rest);
  }
}

template <int R, typename Use, typename Part>
void all_products(const LowRankProduct& job, int64_t begin, int64_t end, Use use, Part part) {
  const int64_t whole = least(end, job.numel / job.columns);
  int64_t row = begin;
  for (; row + kRows <= whole; row += kRows) products<kRows, R>(job, row, job.columns, use, part);
  for (; row < whole; ++row) products<1, R>(job, row, job.columns, use, part);
  for (; row < end; ++row) products<1, R>(job, row, job.numel - row * job.columns, use, part);
}

template <typename Use, typename Part>
void products_by_rank(const LowRankProduct& job, int64_t begin, int64_t end, Use use, Part part) {
  switch (job.rank) {
    case 1:
      return all_products<1>(job, begin, end, use, part);
    case 2:
      return all_products<2>(job, begin, end, use, part);
    case 4:
      return all_products<4>(job, begin, end, use, part);
    default:
      return all_products<0>(job, begin, end, use, part);
  }
}

// out = what `whole(at, decoded)` makes of vectors, and `part(at, decoded, count)` of the ends of rows.
template <typename Whole, typename Part>
void write_products(const LowRankProduct& job, int64_t begin, int64_t end, Whole whole, Part part) {
  const auto write = [&]<bool PastCaches>() {
    products_by_rank(
        job, begin, end,
        [&](int64_t row, int64_t c, Vec decoded) {
          const int64_t at = row * job.columns + c;
          const Vec x = whole(at, decoded);
          PastCaches ? store_past_caches(job.out + at, x) : store(job.out + at, x);
        },
        [&](int64_t row, int64_t c, Vec decoded, int rest) {
          const int64_t at = row * job.columns + c;
          store_part(job.out + at, part(at, decoded, rest), rest);
        });
  };
  if (!job.past_caches) return write.template operator()<false>();
  write.template operator()<true>();
  order_stores();
}

}  // namespace

void low_rank_basis(uint64_t seed, int64_t first, int64_t count, float* basis) {
  DrawnWords drawn(seed);
  for (int64_t i = 0; i < count; i += 4 * kLanes) {
    const uint64_t* words = drawn.of(first + i);
    const Vec all[4] = {numbers<0>(words), numbers<1>(words), numbers<2>(words), numbers<3>(words)};
    for (int v = 0; v < 4; ++v) {
      const int64_t at = i + v * kLanes, rest = count - at;
      if (rest <= 0) break;
      const Vec x = sub(mul(all[v], set1(0x1p-23f)), set1(1.0f));
      rest < kLanes ? store_part(basis + at, x, static_cast<int>(rest)) : store(basis + at, x);
    }
  }
}

void low_rank_project(const LowRankProject& job, int64_t begin, int64_t end) {
  with_dtype(job.grad_dtype, [&]<Dtype D>() {
    job.past_caches ? project<D, true>(job, begin, end) : project<D, false>(job, begin, end);
  });
  if (job.past_caches) order_stores();
}

void low_rank_gram(const float* x, const float* y, int64_t rows, double* lanes) {
  // Of few rows the lanes behind them are zeros, which change no sum: none is -0.
  int64_t width = kGramLanes;
  while (width / 2 >= rows && width > 1) width /= 2;
  for (int64_t l = 0; l < width; ++l) lanes[l] = 0.0;
  for (int64_t i = 0; i < rows; i += width) {
    const int64_t count = least(width, rows - i);
    for (int64_t l = 0; l < count; ++l)
      lanes[l] += static_cast<double>(x[i + l]) * static_cast<double>(y[i + l]);
  }
  for (int64_t half = width / 2; half >= 1; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
}

void low_rank_solve(const LowRankSolve& job, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 128;
  alignas(64) double x[kMostRank][kColumns];
  for (int64_t at = begin; at < end; at += kColumns) {
    const int64_t count = least(kColumns, end - at);
    for (int64_t j = 0; j < job.rank; ++j) {
      for (int64_t i = 0; i < count; ++i) x[j][i] = static_cast<double>(job.left[j * job.rows + at + i]);
    }
    for (int64_t j = 0; j < job.rank; ++j) {
      const double root = job.roots[j];
      if (root == 0.0) {
        for (int64_t i = 0; i < count; ++i) x[j][i] = 0.0;
        continue;
      }
      for (int64_t i = 0; i < count; ++i) x[j][i] /= root;
      for (int64_t k = j + 1; k < job.rank; ++k) {
        const double factor = job.factors[j * job.rank + k];
        for (int64_t i = 0; i < count; ++i) x[k][i] -= factor * x[j][i];
      }
    }
    for (int64_t j = 0; j < job.rank; ++j) {
      float* left = job.left + j * job.rows + at;
      for (int64_t i = 0; i < count; ++i) left[i] = one_nan(static_cast<float>(x[j][i] + 0.0));
    }
  }
}

void low_rank_back_project(const LowRankBack& job, int64_t block, int64_t begin, int64_t end, float* part) {
  const int64_t first = block * kRowBlock, stop = least(first + kRowBlock, job.rows);
  for (int64_t c = begin; c < end; c += kTile) {
    const int64_t column = least(c + kTile, end);
    for (int64_t j = 0; j < job.rank; ++j) {
      for (int64_t i = c; i < column; ++i) part[j * job.columns + i] = 0.0f;
    }
    const float* row[kRows];
    const auto point = [&](int64_t at, int count) {
      for (int i = 0; i < count; ++i)
        row[i] = at + i + 1 == job.rows ? job.last : job.acc + (at + i) * job.columns;
    };
    int64_t at = first;
    for (; at + kRows <= stop; at += kRows) {
      point(at, kRows);
      add_rows<kRows>(job, row, at, c, column, part);
    }
    for (; at < stop; ++at) {
      point(at, 1);
      add_rows<1>(job, row, at, c, column, part);
    }
  }
}

void low_rank_add(const float* part, int64_t count, float* sum, bool last) {
  for (int64_t i = 0; i < count; ++i) sum[i] += part[i];
  for (int64_t i = 0; last && i < count; ++i) sum[i] = one_nan(sum[i]);
}

// MurmurHash3's finalizer of 32 bits (Appleby, 2011).
static uint32_t mixed(uint32_t h) {
  h = (h ^ h >> 16) * 0x85ebca6bu;
  h = (h ^ h >> 13) * 0xc2b2ae35u;
  return h ^ h >> 16;
}

void low_rank_next_row(const float* basis, const float* right, float* following, int64_t columns,
                       int64_t at) {
  int32_t peak = 0;
  for (int64_t c = 0; c < columns; ++c) {
    const auto key = static_cast<int32_t>(bits_of(right[c]) & 0x7fffffffu);
    peak = key > peak ? key : peak;
  }
  if (peak >= kInfKey) {
    std::memcpy(following, basis, sizeof(float) * static_cast<size_t>(columns));
    return;
  }
  const int32_t exponent = 253 - (peak >> 23);
  const float scale = float_of(static_cast<uint32_t>(exponent > 1 ? exponent : 1) << 23);
  for (int64_t c = 0; c < columns; ++c) {
    const uint32_t hash = mixed(bits_of(basis[c]) ^ static_cast<uint32_t>(at + c) * 0x9e3779b9u);
    const float number = static_cast<float>(static_cast<int32_t>(hash >> 8)) * 0x1p-23f - 1.0f;
    following[c] = right[c] * scale + number * 0x1p-12f;
  }
}

int64_t low_rank_settle(const LowRankProduct& job, int64_t begin, int64_t end) {
  int64_t cleared = 0;
  const auto residual = [&](Vec acc, Vec decoded) {
    const Vec left = sub(acc, decoded);
    const Mask bad = key_ge(left, kInfKey);
    if (bad == 0) return left;
    cleared += __builtin_popcount(bad);
    return select(bad, set1(0.0f), left);
  };
  write_products(
      job, begin, end, [&](int64_t at, Vec decoded) { return residual(load(job.acc + at), decoded); },
      [&](int64_t at, Vec decoded, int rest) {
        // Behind the last element there are zeros, whose residual may not be finite: they do not count.
        const Vec left = sub(load_part<Dtype::fp32>(job.acc, at, rest), decoded);
        const Mask bad = key_ge(left, kInfKey) & ((Mask{1} << rest) - 1);
        cleared += __builtin_popcount(bad);
        return select(bad, set1(0.0f), left);
      });
  return cleared;
}

void low_rank_decompress(const LowRankProduct& job, int64_t begin, int64_t end) {
  const Vec alpha = set1(job.alpha);
  const auto value = [&](Vec decoded) { return job.alpha == 1.0f ? decoded : mul(alpha, decoded); };
  write_products(
      job, begin, end,
      [&](int64_t at, Vec decoded) {
        return job.add ? add(load(job.out + at), value(decoded)) : value(decoded);
      },
      [&](int64_t at, Vec decoded, int rest) {
        const Vec x = value(decoded);
        return job.add ? add(load_part<Dtype::fp32>(job.out, at, rest), x) : x;
      });
}

}  // namespace gck::GCK_ISA
