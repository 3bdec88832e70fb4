// Running one function on every thread. Included by the algorithms, never by the leaves.
#pragma once

#include <omp.h>

#include <atomic>
#include <vector>

#include "cpu/types.hpp"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace gck {

// How this thread computes, and what of it turns denormals into zeros: torch.set_flush_denormal does that,
// too.
#if defined(__SSE__)
constexpr uint64_t kFlushes = 0x8040;
inline uint64_t float_mode() { return _mm_getcsr(); }
inline void set_float_mode(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
constexpr uint64_t kFlushes = 1u << 24 | 1u << 19 | 1u;  // FZ, of half precision FZ16, of operands FIZ
inline uint64_t float_mode() {
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode)::"memory");
  return mode;
}
inline void set_float_mode(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode) : "memory"); }
#else
constexpr uint64_t kFlushes = 0;
inline uint64_t float_mode() { return 0; }
inline void set_float_mode(uint64_t) {}
#endif

// Denormals count: switches flush-to-zero off on this thread for the life of the object.
class KeepDenormals {
 public:
  KeepDenormals() : saved_(float_mode()) { set_float_mode(saved_ & ~kFlushes); }
  ~KeepDenormals() { set_float_mode(saved_); }
  KeepDenormals(const KeepDenormals&) = delete;
  KeepDenormals& operator=(const KeepDenormals&) = delete;

 private:
  uint64_t saved_;
};

// Calls f(t) for t in [0, parts), one thread each; without a parallel region where one part is enough.
// f must not throw.
template <typename F>
void for_each_part(int parts, F f) {
  if (parts == 1) {
    const KeepDenormals guard;
    f(0);
    return;
  }
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int t = 0; t < parts; ++t) {
    const KeepDenormals guard;
    f(t);
  }
}

constexpr int64_t kWorthWaiting = 1 << 18;  // entries to look at, for share_parts to wake other threads

// Calls f(t) for t in [0, parts) on `threads` threads. Each has parts that follow each other, the same ones
// in every call, which its caches may still hold; a thread that is done with its own takes those of others:
// one that shares its processor then does fewer. On this thread alone where the entries to look at are few:
// waiting for the others costs little on an idle machine, and milliseconds on a busy one.
template <typename F>
void share_parts(int parts, int threads, int64_t entries, F f) {
  if (parts == 1 || threads == 1 || entries < kWorthWaiting) {
    const KeepDenormals guard;
    for (int t = 0; t < parts; ++t) f(t);
    return;
  }
  std::vector<std::atomic<int>> taken(static_cast<size_t>(threads));
#pragma omp parallel num_threads(threads)
  {
    const KeepDenormals guard;
    const int team = omp_get_num_threads();
    for (int turn = 0; turn < team; ++turn) {
      const int owner = (omp_get_thread_num() + turn) % team;
      const int first = parts * owner / team, end = parts * (owner + 1) / team;
      for (int t; (t = first + taken[static_cast<size_t>(owner)]++) < end;) f(t);
    }
  }
}

// Below this many elements a thread's start costs more than its work.
constexpr int64_t kGrain = 32768;

inline int parts_for(int64_t n, int threads) {
  const int64_t useful = n / kGrain;
  return static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads);
}

}  // namespace gck
