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

// Calls f with the size of a chunk, which is known where it is a common short one.
template <typename F>
inline auto with_size(int64_t size, F f) {
  if (size == 256) return f(Known<256>{});
  if (size == 128) return f(Known<128>{});
  if (size == 64) return f(Known<64>{});
  return f(size);
}

}  // namespace gck::GCK_ISA
