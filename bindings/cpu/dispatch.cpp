#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/isa/leaves.hpp"

#if defined(GCK_X86)
#define GCK_CHOICES "avx512, avx2 or portable"
#elif defined(GCK_ARM)
#define GCK_CHOICES "neon or portable"
#else
#define GCK_CHOICES "portable"
#endif

namespace gck {
namespace {

const Leaves& choose() {
  const char* wanted = std::getenv("GCK_ISA");
  const auto accepts = [&](const char* name, bool available) {
    if (!wanted || !*wanted) return available;
    if (std::string(wanted) != name) return false;
    if (!available) throw std::runtime_error(std::string("GCK_ISA=") + wanted + ": this machine lacks it");
    return true;
  };
#if defined(GCK_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  if (accepts("avx512", has_avx512)) return avx512::leaves();
  if (accepts("avx2", has_avx2)) return avx2::leaves();
#elif defined(GCK_ARM)
  if (accepts("neon", true)) return neon::leaves();
#endif
  if (accepts("portable", true)) return portable::leaves();
  throw std::runtime_error(std::string("GCK_ISA must be " GCK_CHOICES ", got ") + wanted);
}

}  // namespace

const Leaves& leaves() {
  static const Leaves& chosen = choose();
  return chosen;
}

}  // namespace gck
