#include "results.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

namespace gck {
namespace {

constexpr size_t kLine = 64, kPage = 4096;

// A ring: what nobody wants is pushed out by what is given back later. Whoever takes a block out of its slot
// owns it until it is put into one; nobody waits for anybody, so that a fork at any time leaves it usable.
std::array<std::atomic<ResultMemory*>, 16> kept{};
std::atomic<size_t> next{0}, kept_bytes{0};

std::unique_ptr<ResultMemory> out_of(size_t slot) {
  std::unique_ptr<ResultMemory> block(kept[slot].exchange(nullptr));
  if (block) kept_bytes -= block->capacity;
  return block;
}

void unmap(std::unique_ptr<ResultMemory> block) {
  if (block) ::munmap(block->data, block->capacity);
}

void into(size_t slot, std::unique_ptr<ResultMemory> block) {
  kept_bytes += block->capacity;
  std::unique_ptr<ResultMemory> before(kept[slot].exchange(block.release()));
  if (before) kept_bytes -= before->capacity;
  unmap(std::move(before));
}

bool fits(const ResultMemory& block, size_t bytes) {
  return block.capacity >= bytes && block.capacity <= 2 * bytes;
}

}  // namespace

ResultMemory take_result(size_t bytes) {
  const size_t rounded = (std::max<size_t>(bytes, 1) + kLine - 1) / kLine * kLine;
  if (rounded < kLargeResult) {  // as give_result will see it
    void* data = std::aligned_alloc(kLine, rounded);
    if (data == nullptr) throw std::bad_alloc();
    return {data, rounded};
  }
  for (size_t slot = 0; slot < kept.size(); ++slot) {
    auto block = out_of(slot);
    if (!block) continue;
    if (fits(*block, bytes)) return *block;
    into(slot, std::move(block));
  }
  const size_t capacity = (bytes + kPage - 1) / kPage * kPage;
  void* data = ::mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  return {data, capacity};
}

void give_result(const ResultMemory& memory) noexcept {
  if (memory.capacity < kLargeResult) {
    std::free(memory.data);
    return;
  }
  std::unique_ptr<ResultMemory> block(new (std::nothrow) ResultMemory(memory));
  if (!block || memory.capacity > kKeptResults) {
    ::munmap(memory.data, memory.capacity);
    return;
  }
  const size_t mine = next++ % kept.size();
  into(mine, std::move(block));
  // The oldest first, and never what has just come.
  for (size_t i = 1; i < kept.size() && kept_bytes > kKeptResults; ++i)
    unmap(out_of((mine + i) % kept.size()));
}

void drop_results() noexcept {
  for (size_t slot = 0; slot < kept.size(); ++slot) unmap(out_of(slot));
}

}  // namespace gck
