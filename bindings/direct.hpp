// A compressor for vectors of one length, whose calls take tensors as they are.
#pragma once

#include <functional>

#include "cpu/dense.hpp"
#include "tensors.hpp"

namespace gck {

struct Direct {
  int64_t numel;
  BodyLayout layout;
  std::function<void(const Inputs&, char* body, int64_t seed, int threads)> compress;
  // False: a payload contradicts itself, and nothing was written.
  std::function<bool(const Received&, const DecodeInto&, int64_t seed, int threads)> decompress;
};

}  // namespace gck
