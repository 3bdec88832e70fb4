// What a winner leaves in err.
#pragma once

#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {

inline Vec left_by(Vec acc, Dtype value_dtype) {
  if (value_dtype == Dtype::fp32) return set1(0.0f);
  const Vec rest = sub(acc, rounded(acc, value_dtype));
  return select(key_ge(rest, kInfKey), set1(0.0f), rest);
}

inline float left_by(float acc, Dtype value_dtype) {
  if (value_dtype == Dtype::fp32) return 0.0f;
  uint16_t sent;
  const float rest = acc - store_rounded(&sent, value_dtype, 0, acc);
  return key_of(rest) < kInfKey ? rest : 0.0f;
}

}  // namespace gck::GCK_ISA
