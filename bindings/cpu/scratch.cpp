#include "cpu/scratch.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

namespace gck {
namespace {

using Run = Scratch::Run;

// Whoever takes a run out of its slot owns it until it is put into one.
std::array<std::atomic<Run*>, 8> kept{};

std::unique_ptr<Run> take() {
  for (auto& slot : kept) {
    if (auto* run = slot.exchange(nullptr)) return std::unique_ptr<Run>(run);
  }
  return nullptr;
}

size_t page() {
  static const auto bytes = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

constexpr int64_t kFreshPays = 1 << 20;  // entries

void unmap(const Run& run) { ::munmap(run.start, run.bytes); }

void put_pages([[maybe_unused]] void* start, [[maybe_unused]] size_t bytes, [[maybe_unused]] bool large) {
#if defined(MADV_POPULATE_WRITE)
  const auto begin = (reinterpret_cast<uintptr_t>(start) + page() - 1) / page() * page();
  const auto end = (reinterpret_cast<uintptr_t>(start) + bytes) / page() * page();
  if (begin >= end) return;
  if (large) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
#endif
}

bool is_fresh([[maybe_unused]] const void* start, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  const auto middle = (reinterpret_cast<uintptr_t>(start) + bytes / 2) / page() * page();
  unsigned char present = 1;
  return ::mincore(reinterpret_cast<void*>(middle), 1, &present) == 0 && !(present & 1);
#else
  return false;
#endif
}

}  // namespace

size_t Scratch::padded(size_t bytes) { return (bytes + page() - 1) / page() * page(); }

Scratch::Scratch(size_t bytes) {
  regions_.reserve(8);
  if (const auto run = take()) {
    if (run->bytes >= bytes) {
      run_ = *run;
      return;
    }
    unmap(*run);
  }
  bytes = padded(bytes + page());
  void* start =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  run_ = {start, bytes, 0};
}

Scratch::~Scratch() {
  auto* start = static_cast<char*>(run_.start);
  const size_t share = padded(kKept / std::max<size_t>(regions_.size(), 1));
  for (const auto& [offset, bytes] : regions_) {
    if (bytes > share) ::madvise(start + offset + share, bytes - share, MADV_DONTNEED);
  }
  // What earlier users left behind what this one used stays too: small jobs come between large ones, and
  // most of them have nothing to ask of the system.
  const size_t stays = std::max(used_, kKept);
  run_.touched = std::max(run_.touched, used_);
  if (stays < run_.touched) {
    ::madvise(start + stays, run_.touched - stays, MADV_DONTNEED);
    run_.touched = stays;
  }
  if (auto* mine = new (std::nothrow) Run(run_)) {
    for (auto& slot : kept) {
      Run* none = nullptr;
      if (slot.compare_exchange_strong(none, mine)) return;
    }
    delete mine;
  }
  unmap(run_);
}

void* Scratch::region(size_t bytes) {
  bytes = padded(bytes);
  regions_.emplace_back(used_, bytes);
  void* start = static_cast<char*>(run_.start) + used_;
  used_ += bytes;
  return start;
}

void populate(void* start, size_t bytes) {
  if (is_fresh(start, bytes)) put_pages(start, bytes, false);
}

void populate_fresh(float* out, int64_t begin, int64_t end) {
  if (end - begin < kFreshPays) return;
  const size_t bytes = sizeof(float) * static_cast<size_t>(end - begin);
  if (is_fresh(out + begin, bytes)) put_pages(out + begin, bytes, true);
}

void populate_fresh_codes(char* start, size_t bytes) {
  if (bytes >= sizeof(float) * kFreshPays) populate(start, bytes);
}

}  // namespace gck
