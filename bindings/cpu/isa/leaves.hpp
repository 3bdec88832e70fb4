// The inner loops that are compiled once per instruction set and chosen at run time.
//
// A leaf takes raw pointers and calls no template of the standard library: such code would be emitted
// once for all instruction sets, and the linker might keep the AVX-512 copy for every machine.
#pragma once

#include "cpu/types.hpp"

namespace gck {

// Entries taken out of a run of err: acc and position relative to the run.
struct Candidates {
  float* values;
  uint32_t* indices;
  int64_t capacity;  // a multiple of 16; the arrays have room for 16 more
  int64_t count;
  bool overflow;
};

// Where the winners among a run's candidates go.
struct Winners {
  int32_t threshold;  // keys above it win, and the first `quota` of those equal to it
  int64_t quota;
  float* err;        // of the run: losers go back to it
  float* values;     // room for `count`
  int32_t* indices;  // room for `count`
  int32_t base;      // index of the run's first element
  int64_t count;
};

struct ChunkTopk {
  const void* grad;
  Dtype grad_dtype;
  float* err;
  int64_t numel, chunk_size, k;
  int value_bits, index_bits;
  char* bodies;  // row s holds chunks [s * chunks_per_row, ...): values, then scales and indices at offsets
  int64_t row_stride, chunks_per_row, scales_offset, indices_offset;
};

// One thread's working memory: each array has room for chunk_size + kChunkSlack elements.
struct ChunkScratch {
  int32_t* maxima;      // largest key of each group of elements
  uint32_t* positions;  // of the candidates, then of the selected
  int32_t* keys;        // of the candidates
  float* values;        // of the selected
  float* decoded;       // what a receiver reads of them
  uint32_t* codes;      // of the selected
  float* tree;          // sums on their way
  float* err;           // a last chunk that is cut short, padded
  float* grad;
};
constexpr int64_t kChunkSlack = 64;

struct SignChunks {
  const void* grad;
  Dtype grad_dtype;
  float* err;
  int64_t numel, chunk_size;
  char* bodies;  // row s holds chunks [s * chunks_per_row, ...): words, then scales at scales_offset
  int64_t row_stride, chunks_per_row, scales_offset;
};

struct SignDecode {
  const uint32_t* words;
  const float* scales;
  float* out;
  int64_t numel, chunk_size;
  float alpha;
  bool accumulate;
};

struct Leaves {
  const char* name;

  // err[i] += grad[i] for `count` entries; those with key >= threshold move to the candidates and leave
  // 0 behind. When the list is full the rest stay in err, and overflow is set: acc = err + list, always.
  void (*topk_stream)(const void* grad, Dtype dtype, float* err, int64_t count, int32_t threshold,
                      Candidates* out);
  // Lists the entries of x with key >= threshold; changes nothing. count <= out->capacity.
  void (*topk_collect)(const float* x, int64_t count, int32_t threshold, Candidates* out);
  // Puts winners out in order, and losers that are finite back. err holds 0 where candidates were, which
  // is what winners leave there. Returns the number of entries that were not finite.
  int64_t (*topk_emit)(const Candidates& list, const Winners& out);
  // out[i] = grad[i] + err[i].
  void (*add)(const void* grad, Dtype dtype, const float* err, int64_t count, float* out);
  // Chunks [begin, end); returns the number of residuals cleared because not finite.
  int64_t (*sign_compress)(const SignChunks& job, int64_t begin, int64_t end);
  void (*sign_decompress)(const SignDecode& job, int64_t chunk_begin, int64_t chunk_end);
  // Chunks [begin, end); returns the number of residuals cleared because not finite.
  int64_t (*chunk_topk_compress)(const ChunkTopk& job, const ChunkScratch& scratch, int64_t begin,
                                 int64_t end);
};

#if defined(GCK_X86)
namespace avx512 {
const Leaves& leaves();
}
namespace avx2 {
const Leaves& leaves();
}
#endif
namespace portable {
const Leaves& leaves();
}

// The best set that this machine has, or the one that GCK_ISA names.
const Leaves& leaves();

}  // namespace gck
