// What the CPU kernels share: element types, float keys, splitting work over threads.
//
// Functions are `static`, not merely inline: this header is compiled for several instruction sets, and
// the linker must not merge their copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace gck {

// Numbered as in kernels/common/native.py. none: of a gradient that has been added to its residual already.
enum class Dtype : int { fp32 = 0, bf16 = 1, fp16 = 2, none = 3 };

constexpr int32_t kInfKey = 0x7f800000;
constexpr int32_t kNanKey = 0x7fc00000;  // the one NaN that gck lets out

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Orders floats by magnitude: NaN > Inf > finite. The result of an addition is never a signalling NaN, so
// every NaN has a key of at least kNanKey.
static inline int32_t key_of(float x) {
  const auto key = static_cast<int32_t>(bits_of(x) & 0x7fffffffu);
  return key < kNanKey ? key : kNanKey;
}

// floor(number * length / 2^64): a number of 64 random bits as one below length.
static inline int64_t scaled(uint64_t number, int64_t length) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<int64_t>(static_cast<Wide>(number) * static_cast<uint64_t>(length) >> 64);
}

struct Range {
  int64_t begin, end;
};

// The t-th of `parts` runs of [0, n), cut at multiples of `unit`.
static inline Range part_of(int64_t n, int parts, int t, int64_t unit) {
  const int64_t units = (n + unit - 1) / unit;
  const auto cut = [&](int i) {
    const int64_t at = units / parts * i + (units % parts) * i / parts;
    return at * unit < n ? at * unit : n;
  };
  return {cut(t), t + 1 == parts ? n : cut(t + 1)};
}

// What decoded values are multiplied with: one number of all ranks, or one each. Always inlined, so that
// there is nothing to merge.
class Alphas {
 public:
  [[gnu::always_inline]] Alphas(float all = 1.0f) : all_(all) {}
  [[gnu::always_inline]] explicit Alphas(const float* each) : each_(each) {}

  [[gnu::always_inline]] float of(int64_t rank) const { return each_ == nullptr ? all_ : each_[rank]; }
  [[gnu::always_inline]] bool is_one() const { return each_ == nullptr && all_ == 1.0f; }

 private:
  float all_ = 1.0f;
  const float* each_ = nullptr;
};

}  // namespace gck
