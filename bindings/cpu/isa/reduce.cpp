#include "cpu/isa/reduce.hpp"

namespace gck::GCK_ISA {

void divide(float* x, int64_t count, float divisor) {
  const bool power_of_two = (bits_of(divisor) & 0x7fffffu) == 0;
  if (power_of_two) {  // the inverse is exact, so that the product rounds as the quotient does, and sooner
    const float inverse = 1.0f / divisor;
    for (int64_t i = 0; i < count; ++i) x[i] *= inverse;
    return;
  }
  for (int64_t i = 0; i < count; ++i) x[i] /= divisor;
}

}  // namespace gck::GCK_ISA
