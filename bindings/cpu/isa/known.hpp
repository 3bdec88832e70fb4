// Numbers that are known when code is compiled, in the place of an int64_t.
#pragma once

#include <cstdint>

namespace gck::GCK_ISA {

template <int64_t Number>
struct Known {
  static constexpr int64_t number = Number;
  constexpr operator int64_t() const { return Number; }
};

template <typename T>
constexpr bool is_known = false;
template <int64_t Number>
constexpr bool is_known<Known<Number>> = true;

}  // namespace gck::GCK_ISA
