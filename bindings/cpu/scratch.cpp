#include "cpu/scratch.hpp"

#include <sys/mman.h>

#include <atomic>
#include <memory>
#include <new>

namespace gck {
namespace {

using Run = std::pair<void*, size_t>;

// One slot: whoever takes the run out owns it until it is put back.
std::atomic<Run*> kept{nullptr};

void unmap(const Run& run) { ::munmap(run.first, run.second); }

}  // namespace

Scratch::Scratch(size_t bytes) {
  if (const std::unique_ptr<Run> run{kept.exchange(nullptr)}) {
    if (run->second >= bytes) {
      run_ = *run;
      return;
    }
    unmap(*run);
  }
  bytes = padded(bytes + kPage);
  void* base =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  run_ = {base, bytes};
}

Scratch::~Scratch() {
  for (const auto& [offset, bytes] : regions_) {
    if (bytes > kKept) {
      ::madvise(static_cast<char*>(run_.first) + offset + kKept, bytes - kKept, MADV_DONTNEED);
    }
  }
  auto* mine = new (std::nothrow) Run(run_);
  if (mine == nullptr) {
    unmap(run_);
    return;
  }
  if (const std::unique_ptr<Run> other{kept.exchange(mine)}) unmap(*other);
}

void* Scratch::region(size_t bytes) {
  bytes = padded(bytes);
  regions_.emplace_back(used_, bytes);
  void* start = static_cast<char*>(run_.first) + used_;
  used_ += bytes;
  return start;
}

}  // namespace gck
