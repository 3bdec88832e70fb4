// Where top-k puts its winners, a vector of candidates at a time.
#pragma once

#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {

// Winners to memory as it is: values, narrow ones too, and indices.
class ToMemory {
 public:
  explicit ToMemory(const Winners& to)
      : dtype_(to.value_dtype),
        values_(static_cast<char*>(to.values)),
        indices_(reinterpret_cast<uint32_t*>(to.indices)),
        left_(to.left) {}

  GCK_INLINE void put(Mask wins, Vec acc, const uint32_t* positions, int32_t base) {
    const auto taken = static_cast<size_t>(__builtin_popcount(wins));
    const size_t size = dtype_ == Dtype::fp32 ? sizeof(float) : sizeof(uint16_t);
    const bool room = left_ >= kLanes;
    if (room && dtype_ == Dtype::fp32) {
      compress(reinterpret_cast<float*>(values_), wins, acc);
      compress_words(indices_, wins, positions, static_cast<uint32_t>(base));
    } else if (taken) {
      // Narrow values, or near the end of this part's room: the next part's thread writes behind it.
      alignas(64) float front[2 * kLanes] = {};
      alignas(64) uint32_t words[2 * kLanes];
      alignas(64) uint16_t narrow[kLanes];
      compress(front, wins, acc);
      compress_words(words, wins, positions, static_cast<uint32_t>(base));
      const void* from = front;
      if (dtype_ != Dtype::fp32) {
        dtype_ == Dtype::bf16 ? store_bf16(narrow, load(front)) : store_fp16(narrow, load(front));
        from = narrow;
      }
      // Copies of a fixed size are single instructions.
      if (room) {
        std::memcpy(values_, from, sizeof narrow);
        std::memcpy(indices_, words, sizeof(uint32_t) * kLanes);
      } else {
        std::memcpy(values_, from, size * taken);
        std::memcpy(indices_, words, sizeof(uint32_t) * taken);
      }
    }
    values_ += size * taken;
    indices_ += taken;
    left_ -= static_cast<int64_t>(taken);
  }

  void finish() {}

 private:
  Dtype dtype_;
  char* values_;
  uint32_t* indices_;
  int64_t left_;
};

#if defined(GCK_AVX512)
// Words of four bytes that leave for memory a cache line at a time, so that what is overwritten is not read.
class Lines {
 public:
  explicit Lines(void* to)
      : line_(reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(to) / 64 * 64)),
        first_(static_cast<int>(static_cast<float*>(to) - line_)),
        filled_(first_) {}

  // The first `count` lanes of `words`.
  GCK_INLINE void put(Vec words, int count) {
    const Vec turned = rotated(words, filled_);
    const Vec line = select((1u << filled_) - 1, waiting_, turned);
    filled_ += count;
    if (filled_ < kLanes) {
      waiting_ = line;
      return;
    }
    first_ ? leave(line, kLanes) : store_past_caches(line_, line);
    waiting_ = turned;  // what was too much for the line has come round to its front
    line_ += kLanes;
    filled_ -= kLanes;
    first_ = 0;
  }

  void finish() { leave(waiting_, filled_); }

 private:
  // Lanes up to `end` of a line of which only a part is ours.
  void leave(Vec line, int end) {
    alignas(64) float words[kLanes];
    store(words, line);
    for (int lane = first_; lane < end; ++lane) line_[lane] = words[lane];
  }

  float* line_;
  int first_, filled_;
  Vec waiting_ = set1(0.0f);
};

// The same as ToMemory, of fp32.
class PastCaches {
 public:
  explicit PastCaches(const Winners& to) : values_(to.values), indices_(to.indices) {}

  GCK_INLINE void put(Mask wins, Vec acc, const uint32_t* positions, int32_t base) {
    const int taken = __builtin_popcount(wins);
    values_.put(compressed(wins, acc), taken);
    indices_.put(compressed_words(wins, positions, static_cast<uint32_t>(base)), taken);
  }

  void finish() {
    values_.finish();
    indices_.finish();
    order_stores();
  }

 private:
  Lines values_, indices_;
};
#endif

}  // namespace gck::GCK_ISA
