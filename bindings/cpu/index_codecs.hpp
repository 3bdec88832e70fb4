// Strictly ascending indices in fewer bytes, and back, on the CPU: see docs/index_codecs.md.
#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck {

// What is wrong with encoded indices, or with those to be encoded.
enum class IndexFault : int {
  none = 0,
  count,    // there are more or fewer than there should be
  padding,  // a bit that no entry has is set
  order,    // not ascending within [0, numel)
};

// job.indices to job.low and job.high. Nothing is written unless the indices ascend within [0, numel).
IndexFault elias_fano_encode(const EliasFano& job, int threads);
// Back. What was written to job.indices before a fault of order was seen is of no meaning.
IndexFault elias_fano_decode(const EliasFano& job, int threads);

// `count` indices as 16 bits each, the position in a block of 2^16 elements, and for each block the number of
// entries up to its end: as wide as an index.
struct Block16 {
  int64_t numel, count;
  bool wide;  // indices and ends are int64, else int32
  void *indices, *ends;
  uint16_t* locals;
};

IndexFault block16_encode(const Block16& job, int threads);
IndexFault block16_decode(const Block16& job, int threads);

}  // namespace gck
