// A compressor for vectors of one length, whose calls take tensors as they are.
#pragma once

#include <array>
#include <functional>

#include "cpu/dense.hpp"
#include "tensors.hpp"

namespace gck {

using Fields = std::array<const char*, kMostFields>;

struct Direct {
  int64_t numel;
  BodyLayout layout;
  std::function<void(const Inputs&, char* body, int64_t seed, int threads)> compress;
  // False: the payload contradicts itself, and nothing was written.
  std::function<bool(const Fields&, const DecodeInto&, int64_t seed, int threads)> decompress;
};

}  // namespace gck
