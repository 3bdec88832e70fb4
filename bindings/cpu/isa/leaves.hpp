// The inner loops that are compiled once per instruction set and chosen at run time.
//
// A leaf takes raw pointers and calls no template of the standard library: such code would be emitted
// once for all instruction sets, and the linker might keep the AVX-512 copy for every machine.
#pragma once

#include "cpu/types.hpp"

namespace gck {

// What the stream lists: entries with key >= threshold. With `ties`, it counts those just below, too: where
// very many entries are equal, listing them all would be in vain. `dense`: most vectors hold some to list.
// What reaches `expected`, a key in [threshold, kInfKey] or the threshold, is likely to win.
struct Guess {
  int32_t threshold;
  bool ties, dense;
  int32_t expected;
};

// Entries of a run: acc and position. In err those that were expected to win left what a winner leaves, and
// the others acc.
struct Candidates {
  float* values;
  uint32_t* indices;
  int64_t capacity;  // the arrays have room for 32 more
  int64_t count;
  int64_t ties;
  bool overflow;
};

// Where winners among candidates go; moves along as they are put there.
struct Winners {
  int32_t threshold;  // keys above it win, and the first `quota` of those equal to it
  int32_t expected;   // of the guess that the candidates were listed with
  int64_t quota;
  void* values;  // room for `left`
  Dtype value_dtype;
  int32_t* indices;  // room for `left`
  int64_t left;
  bool past_caches;  // the payload is too large to stay in them
};

constexpr int64_t kFewest = 128;  // entries that are counted against each other, without any branch

struct ChunkTopk {
  const void* grad;
  Dtype grad_dtype;
  float* err;
  int64_t numel, chunk_size, k;
  int value_bits, index_bits;
  char* bodies;  // row s holds chunks [s * chunks_per_row, ...): values, then scales and indices at offsets
  int64_t row_stride, chunks_per_row, scales_offset, indices_offset;
};

// What the chunks before suggest: the k-th key of the next one (0: nothing yet), and how far below it
// candidates begin. It never changes a result.
struct ChunkGuess {
  int32_t kth, below;
};

// One thread's working memory: each array has room for chunk_size + kChunkSlack elements.
struct ChunkScratch {
  int32_t* maxima;      // largest key of each group of elements
  uint32_t* positions;  // of the candidates, then of the selected
  float* values;        // acc of these
  float* decoded;       // what a receiver reads of them
  int8_t* codes;        // of the selected
  float* tree;          // sums on their way
  float* err;           // a last chunk that is cut short, padded
  float* grad;
  ChunkGuess* guess;
};
constexpr int64_t kChunkSlack = 64;

struct ChunkTopkDecode {
  const char* const* bodies;  // of each rank: values, and the other fields behind
  int64_t ranks, scales_offset, indices_offset, chunk_size, k;
  int value_bits, index_bits;
  float* out;
  int64_t numel;
  Alphas alpha;
  bool clear;     // out starts from zero
  bool add;       // entries are added to what is there, else written over it
  float divisor;  // of the sums, where `clear`
};

// One thread's working memory for the entries of a rank's chunk: room for k + 32 each.
struct ChunkEntries {
  uint16_t* positions;
  float* values;
};

struct SignChunks {
  const void* grad;
  Dtype grad_dtype;
  float* err;
  int64_t numel, chunk_size;
  char* bodies;  // row s holds chunks [s * chunks_per_row, ...): words, then scales at scales_offset
  int64_t row_stride, chunks_per_row, scales_offset;
};

// Where the sum of several ranks' alpha * decoded goes, rank after rank, one rounding each.
struct DecodeInto {
  float* out;
  int64_t numel;
  Alphas alpha;
  bool clear;        // of what is added to: it starts from zero
  bool add;          // decoded values are added to what is there, else written over it
  bool past_caches;  // out is written, is aligned to a vector of 16 and would not stay in the caches
};

// What of a residual is added: clamp(decay * err, -clip, clip).
struct ResidualReading {
  static constexpr float kNoClip = __builtin_inff();

  float decay = 1.0f, clip = kNoClip;

  bool is_plain() const { return decay == 1.0f && clip == kNoClip; }
};

// What is added to err, as it is read, instead: the sum from zero, divided.
struct MeanInto {
  float* err;
  int64_t numel;
  float divisor;
  ResidualReading reading;
};

struct SignDecode {
  const char* const* bodies;  // of each rank: words, then scales at scales_offset
  int64_t ranks, scales_offset, chunk_size;
  DecodeInto into;
};

struct QuantizeChunks {
  const void* grad;
  Dtype grad_dtype;
  float* err;
  int64_t numel, chunk_size;
  int bits;
  bool two_levels, stochastic;
  uint64_t seed;
  int64_t first;  // index, in the vector that random numbers are counted in, of the first element
  char* bodies;   // row s holds chunks [s * chunks_per_row, ...): codes, then scales at scales_offset
  int64_t row_stride, chunks_per_row, scales_offset;
};

struct QuantizeDecode {
  const char* const* bodies;  // of each rank: codes, then scales at scales_offset
  int64_t ranks, scales_offset, chunk_size;
  int bits;
  bool two_levels;
  DecodeInto into;
};

// Indices as Elias and Fano write them: the lower bits of each, one after the other; and a string of
// high_bits, in which the i-th one is at position (index >> low_bits) + i. Both padded to words of 64 bits.
struct EliasFano {
  int64_t numel, count;
  int low_bits;  // at most 62
  bool wide;     // indices are int64, else int32
  void* indices;
  char *low, *high;
  int64_t low_bytes, high_bits, high_words;
};

constexpr int64_t kDrawn = 16;  // random numbers that are drawn together

// Elements that are summed over few ranks, and then compressed while the nearest cache has them: so few that
// memory goes on with what has been asked for. Of more ranks, see kFewRanks in sums.hpp.
constexpr int64_t kReduceTile = 512;

// Elements whose sums are one number of the statistics of a residual.
constexpr int64_t kBlock = 512;

// Where the sums of consecutive blocks go: of |x|, of x * x, and how many x are not finite.
struct BlockSums {
  double *l1, *sq, *nonfinite;
};

// See cpu/low_rank.hpp. Rows lie one behind the other, `columns` apart; `numel` says where the last one ends.
constexpr int64_t kDotLanes = 64;     // sums that the products of a row are added to in turn
constexpr int64_t kRowBlock = 256;    // rows whose products are added one after the other
constexpr int64_t kGramLanes = 1024;  // the same of products of rows of `left`
constexpr int64_t kMostRank = 64;

struct LowRankProject {
  const void* grad;
  Dtype grad_dtype;
  const float* err;
  float* acc;  // or err
  int64_t numel, columns, rank, rows;
  ResidualReading reading;
  const float* basis;  // rows of `columns`, each with zeros behind it up to a multiple of kDotLanes
  float* left;
  bool past_caches;  // acc would not stay in them, and its rows are aligned to vectors
};

// One division, and multiples of the rows before: what makes orthonormal rows of those of `left`.
struct LowRankSolve {
  float* left;
  int64_t rows, rank;
  const double* roots;    // 0: the row becomes zeros
  const double* factors;  // (rank, rank): row k less factors[j * rank + k] of row j, for j < k
};

struct LowRankBack {
  const float* acc;
  const float* last;  // the last row, with zeros where it is cut short
  int64_t columns, rank, rows;
  const float* left;
};

struct LowRankProduct {
  const float* acc;
  float* out;  // or acc
  int64_t numel, columns, rank, rows;
  const float *left, *right;
  float alpha;
  bool add, past_caches;  // as above, of out
};

struct Leaves {
  const char* name;

  // err[i] += grad[i] for `count` entries (no grad: err as it is). Those with key >= threshold go to the
  // candidates, and of those expected to win only what a winner leaves stays in err: the rounding error of
  // value_dtype, 0 where that is not finite. When the list is full the rest stay as they are, and overflow is
  // set.
  void (*topk_stream)(const void* grad, Dtype dtype, float* err, int64_t count, Guess guess,
                      Dtype value_dtype, Candidates* out);
  // Lists what topk_stream would list, and leaves err as it is. Ties are not counted.
  void (*topk_look)(const void* grad, Dtype dtype, const float* err, int64_t count, Guess guess,
                    Candidates* out);
  // err[i] += grad[i]; maxima[16 * b + lane] becomes the largest magnitude of that lane in the
  // b-th run of `vectors` vectors of 16 entries; every NaN becomes the one that gck lets out.
  void (*topk_maxima)(const void* grad, Dtype dtype, float* err, int64_t count, int64_t vectors,
                      float* maxima);
  // Copies the entries of x with key >= threshold to out, which has room for 16 more; returns how many.
  // `count` is a multiple of 16.
  int64_t (*topk_collect)(const float* x, int64_t count, int32_t threshold, float* out);
  // The sum, over lines of 16 entries, of the squared number of those with key >= threshold.
  int64_t (*topk_squares)(const float* x, int64_t lines, int32_t threshold);
  // Counts the keys of x that are >= high, and lists those in [low, high). `keys` has room for 16 more, and
  // may be x.
  int64_t (*topk_split)(const float* x, int64_t count, int32_t low, int32_t high, int32_t* keys,
                        int64_t* inside);
  // The key of the rank-th largest entry; with a slack, a key that at most so many more than `rank` reach,
  // and at least `rank`. Behind the entries there is room for a vector.
  int32_t (*topk_kth)(const float* x, int64_t count, int64_t rank, int64_t slack);
  // Puts winners out in order, and mends err where it was not to be expected who wins: a run that the
  // candidates come from and whose first entry has index `base`; null: nothing is mended. Returns the number
  // of entries that left what is not finite.
  int64_t (*topk_emit)(const Candidates& list, float* err, int32_t base, Winners* out);
  // x[i] = 0 where x[i] is not finite; returns how many that were.
  int64_t (*topk_clear)(float* x, int64_t count);
  // out[i] = grad[i] + err[i].
  void (*add)(const void* grad, Dtype dtype, const float* err, int64_t count, float* out);
  // Whether each of the int64 (`wide`) or int32 indices [begin, end) is above the one before it; begin > 0.
  bool (*sparse_ascends)(const void* indices, bool wide, int64_t begin, int64_t end);
  // out[0, count) = x / divisor, and x = 0. With `past_caches` for results too large to stay in them; then
  // sparse_settle comes last, before other threads may look at out.
  void (*sparse_move_out)(float* x, float* out, int64_t count, float divisor, bool past_caches);
  void (*sparse_settle)();
  // Chunks [begin, end); returns the number of residuals cleared because not finite.
  int64_t (*sign_compress)(const SignChunks& job, int64_t begin, int64_t end);
  void (*sign_decompress)(const SignDecode& job, int64_t begin, int64_t end);
  // Adds the mean to into.err, and compresses that; from.into, and the gradient and residual of `to`, are of
  // no account.
  int64_t (*sign_reduce)(const SignDecode& from, const MeanInto& into, const SignChunks& to, int64_t begin,
                         int64_t end);
  // Chunks [begin, end); returns the number of residuals cleared because not finite.
  int64_t (*chunk_topk_compress)(const ChunkTopk& job, const ChunkScratch& scratch, int64_t begin,
                                 int64_t end);
  // The same of one chunk, with sums / divisor for its gradient; sums become zeros. Meanwhile memory is asked
  // for the second half of a chunk from `later` on, unless that is null.
  int64_t (*chunk_topk_compress_mean)(const ChunkTopk& job, const ChunkScratch& scratch, float* sums,
                                      float divisor, int64_t chunk, const float* later);
  // Chunks [begin, end); returns the number of residuals cleared because not finite.
  int64_t (*quantize_compress)(const QuantizeChunks& job, int64_t begin, int64_t end);
  void (*quantize_decompress)(const QuantizeDecode& job, int64_t begin, int64_t end);
  int64_t (*quantize_reduce)(const QuantizeDecode& from, const MeanInto& into, const QuantizeChunks& to,
                             int64_t begin, int64_t end);
  // Of chunks [begin, end) of all ranks, the place of an index that is out of range or not above the one
  // before it, as chunk_topk.hpp counts places, or -1.
  int64_t (*chunk_topk_first_bad)(const ChunkTopkDecode& job, const ChunkEntries& scratch, int64_t begin,
                                  int64_t end);
  // All ranks' entries of a chunk to or onto `out`, the chunk's place, rank after rank. Meanwhile memory is
  // asked for the first half of a chunk from `later` on, unless that is null.
  void (*chunk_topk_put)(const ChunkTopkDecode& job, const ChunkEntries& scratch, int64_t chunk, float* out,
                         const float* later);
  // Random numbers of 64 bits with counters [first, first + count), first at a multiple of kDrawn; `out` has
  // room for a multiple, too.
  void (*random_k_draw)(uint64_t seed, uint64_t first, int64_t count, uint64_t* out);
  // What is chosen in strata [first, first + count), `first` at a multiple of kDrawn and its stratum at
  // `begin`; those before stratum `longer` have size + 1 elements, the others `size`. `picks` has room for a
  // multiple of kDrawn.
  void (*random_k_picks)(uint64_t seed, int64_t first, int64_t count, int64_t size, int64_t longer,
                         int64_t begin, int64_t* picks);
  // err[i] += grad[i] for i in [begin, end); returns whether all of them are finite.
  bool (*random_k_add)(const void* grad, Dtype dtype, float* err, int64_t begin, int64_t end);
  // values[at + i] = x[i] * factor, rounded to dtype; x[i] becomes what that leaves, or 0 where it is not
  // finite. Returns how many that are. x has room for 16 more.
  int64_t (*random_k_send)(float* x, int64_t count, float factor, void* values, Dtype dtype, int64_t at);
  // The lower bits of `entries`, which begin at a multiple of 64.
  void (*elias_fano_low)(const EliasFano& job, Range entries);
  // Writes the words [words.begin, words.end) of the high bits, of which `entries` have all but `bits`, which
  // are for the first of them. Returns those bits of entries that belong to the word at words.end.
  uint64_t (*elias_fano_high)(const EliasFano& job, Range entries, Range words, uint64_t bits);
  // Ones in these words of the high bits.
  int64_t (*elias_fano_count)(const EliasFano& job, Range words);
  // The indices whose ones are in these words, from entry `rank` on; as many as there are ones must have
  // room. Returns whether they ascend below numel.
  bool (*elias_fano_select)(const EliasFano& job, Range words, int64_t rank);
  // The lower 16 bits of `count` indices; and base + them, with whether they ascend.
  void (*block16_split)(const void* indices, bool wide, int64_t count, uint16_t* locals);
  bool (*block16_join)(const uint16_t* locals, int64_t count, int64_t base, void* indices, bool wide);
  // err[i] = clamp(decay * err[i], -clip, clip), where NaN stays; clip >= 0.
  void (*residual_read)(float* err, int64_t count, const ResidualReading& reading);
  // Of grad + err; or of err alone where there is no grad, and then of squares alone. What is not finite
  // counts as 0.
  void (*residual_sums)(const void* grad, Dtype dtype, const float* err, int64_t count, const BlockSums& out);
  // basis[i] = number `first` + i of those in [-1, 1); first at a multiple of kDotLanes, count any.
  void (*low_rank_basis)(uint64_t seed, int64_t first, int64_t count, float* basis);
  // Rows [begin, end).
  void (*low_rank_project)(const LowRankProject& job, int64_t begin, int64_t end);
  // lanes[0] = the sum of x[i] * y[i]; lanes[kGramLanes].
  void (*low_rank_gram)(const float* x, const float* y, int64_t rows, double* lanes);
  // Columns [begin, end) of left.
  void (*low_rank_solve)(const LowRankSolve& job, int64_t begin, int64_t end);
  // Columns [begin, end) of the part that a block of rows has in `right`: (rank, columns), written.
  void (*low_rank_back_project)(const LowRankBack& job, int64_t block, int64_t begin, int64_t end,
                                float* part);
  // sum[i] += part[i]; the last time every NaN becomes the one.
  void (*low_rank_add)(const float* part, int64_t count, float* sum, bool last);
  // A row of `low_rank_next_basis`, whose first element has place `at`.
  void (*low_rank_next_row)(const float* basis, const float* right, float* following, int64_t columns,
                            int64_t at);
  // Rows [begin, end); returns the number of residuals cleared because not finite.
  int64_t (*low_rank_settle)(const LowRankProduct& job, int64_t begin, int64_t end);
  void (*low_rank_decompress)(const LowRankProduct& job, int64_t begin, int64_t end);
};

#if defined(GCK_X86)
namespace avx512 {
const Leaves& leaves();
}
namespace avx2 {
const Leaves& leaves();
}
#elif defined(GCK_ARM)
namespace neon {
const Leaves& leaves();
}
#endif
namespace portable {
const Leaves& leaves();
}

// The best set that this machine has, or the one that GCK_ISA names.
const Leaves& leaves();

}  // namespace gck
