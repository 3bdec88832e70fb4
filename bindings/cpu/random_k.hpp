// Entries at places that a seed says, with error feedback, on the CPU.
#pragma once

#include "cpu/residual.hpp"
#include "cpu/types.hpp"

namespace gck {

// Where the entries are. The vector is a ring: element (p + rotation) mod numel is at position p. k strata
// are runs of positions, the first `longer` of size + 1 and the others of size elements, and one entry is
// chosen in each. `first` of them has the lowest index: their order in the vector is first, first + 1, ..., k
// - 1, 0, ...
struct Strata {
  int64_t numel, k;  // 1 <= k <= numel
  uint64_t seed;
  int64_t size, longer, rotation, first;

  Strata(int64_t numel, int64_t k, uint64_t seed);

  int64_t begin(int64_t i) const { return i * size + (i < longer ? i : longer); }
  int64_t length(int64_t i) const { return size + (i < longer); }
  // The one that position p lies in.
  int64_t of(int64_t p) const {
    const int64_t edge = longer * (size + 1);
    return p < edge ? p / (size + 1) : longer + (p - edge) / size;
  }
  // The element at position p.
  int64_t element(int64_t p) const { return p < numel - rotation ? p + rotation : p - (numel - rotation); }
  // That of stratum i's entry among all indices, ascending.
  int64_t rank(int64_t i) const { return i < first ? i - first + k : i - first; }
};

struct RandomKJob {
  const void* grad;
  Dtype grad_dtype;
  float* err;
  float factor;  // of values
  void* values;  // k
  Dtype value_dtype;
};

// Fills job.values and leaves acc - decoded in err; returns the number of residuals cleared because not
// finite. A stratum that holds something not finite is sent as not finite.
int64_t random_k_compress(const RandomKJob& job, const Strata& strata, const ResidualOptions& options,
                          int threads);

struct RandomKDecode {
  const char* const* values;  // of each rank
  int64_t ranks;
  Dtype value_dtype;
  float* out;
  Alphas alpha;
  bool clear;  // out is set to zeros first
  bool add;    // decoded values are added to what is there, else written over it
};

// Adds or writes alpha * decoded, rank after rank.
void random_k_decompress(const RandomKDecode& job, const Strata& strata, int threads);

// The indices with ranks [begin, end) among the ascending ones.
void random_k_indices(const Strata& strata, int64_t begin, int64_t end, int64_t* out);

}  // namespace gck
