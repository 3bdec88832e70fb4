#include "cpu/copy.hpp"

#include <cstring>

#include "cpu/threads.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace gck {
namespace {

constexpr int64_t kLine = 64;

#if defined(__SSE2__)
void copy_past_caches(char* to, const char* from, int64_t nbytes) {
  const auto off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kLine);
  const int64_t head = off == 0 ? 0 : kLine - off;
  std::memcpy(to, from, static_cast<size_t>(head));
  int64_t at = head;
  for (; at + kLine <= nbytes; at += kLine) {
    const auto* source = reinterpret_cast<const __m128i*>(from + at);
    auto* place = reinterpret_cast<__m128i*>(to + at);
    const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(place, a);
    _mm_stream_si128(place + 1, b);
    _mm_stream_si128(place + 2, c);
    _mm_stream_si128(place + 3, d);
  }
  std::memcpy(to + at, from + at, static_cast<size_t>(nbytes - at));
  _mm_sfence();
}
#else
void copy_past_caches(char* to, const char* from, int64_t nbytes) {
  std::memcpy(to, from, static_cast<size_t>(nbytes));
}
#endif

}  // namespace

void copy_large(void* to, const void* from, int64_t nbytes, int threads) {
  const int parts = parts_for(nbytes / 4, threads);
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(nbytes, parts, t, kLine);
    char* place = static_cast<char*>(to) + begin;
    const char* source = static_cast<const char*>(from) + begin;
    if (is_past_caches(nbytes / 4, threads)) return copy_past_caches(place, source, end - begin);
    std::memcpy(place, source, static_cast<size_t>(end - begin));
  });
}

}  // namespace gck
