// Codes of 2 bits by means: a sign, and one of two levels.
#pragma once

#include "cpu/isa/codes.hpp"
#include "cpu/isa/keys.hpp"
#include "cpu/isa/quantize_chunk.hpp"
#include "cpu/isa/tree.hpp"

namespace gck::GCK_ISA {

// A chunk by stages, each of which needs sums of the one before, whose last steps take long: of short chunks
// three are under way at a time, one in each stage.
class TwoLevels {
 public:
  Chunk chunk;

  // err becomes acc.
  template <Dtype D>
  void find_mean() {
    const float sum = with_size(
        chunk.size, [&](auto size) { return magnitudes<D>(chunk.grad, chunk.at, chunk.err, size); });
    mean_ = canonical(sum / static_cast<float>(chunk.valid));
  }

  // Levels are the means of the magnitudes below the mean, and of the others.
  void find_levels() {
    // Nothing compares with NaN: then no key may reach this one, which that of a NaN of ones alone does.
    key_ = static_cast<int32_t>(mean_ == mean_ ? bits_of(mean_) : 0x7fffffffu);
    if (mean_ != mean_) {
      for (int64_t i = 0; i < chunk.size; i += kLanes) store(chunk.err + i, canonical(load(chunk.err + i)));
    }
    float high_sum, low_sum;
    int64_t highs = with_size(chunk.size, [&](auto size) { return split(size, high_sum, low_sum); });
    // The zeros behind a short chunk reach a mean of 0, as then do all of its elements.
    if (highs > chunk.valid) highs = chunk.valid;
    const int64_t lows = chunk.valid - highs;
    high_ = highs ? canonical(high_sum / static_cast<float>(highs)) : 0.0f;
    low_ = lows ? canonical(low_sum / static_cast<float>(lows)) : 0.0f;
    if (!highs) high_ = low_;
    if (!lows) low_ = high_;
    chunk.scales[0] = low_;
    chunk.scales[1] = high_;
  }

  // err becomes acc - decoded; returns the number of residuals cleared because not finite.
  int64_t subtract() {
    with_size(chunk.size, [&](auto size) { subtract_all(size); });
    if (chunk.valid < chunk.size) clear_codes(chunk.codes, chunk.valid, chunk.size);
    return is_finite(low_) && is_finite(high_) ? 0 : clear_nonfinite(chunk.err, chunk.valid);
  }

 private:
  template <Dtype D, typename Size>
  static float magnitudes(const void* grad, int64_t at, float* err, Size size) {
    const auto take = [&](int64_t i) {
      const Vec acc = add(load_as<D>(grad, at + i), load(err + i));
      if constexpr (D != Dtype::none) store(err + i, acc);
      return abs(acc);
    };
    if constexpr (is_short<Size>) return upward_sum<Size::number>(take);
    if constexpr (D != Dtype::none) {
      for (int64_t i = 0; i < size; i += kLanes) take(i);
    }
    alignas(64) float tree[kMaxChunk / 2];
    return sum_of_magnitudes(err, size, tree);
  }

  // Sums of the magnitudes below the mean, and of the others; returns how many these are.
  template <typename Size>
  int64_t split(Size size, float& high_sum, float& low_sum) {
    alignas(64) float tree[kMaxChunk / 2], low_tree[kMaxChunk / 2];
    float* const err = chunk.err;  // what is stored might change the chunk, for all that the compiler knows
    char* const codes = chunk.codes;
    const int32_t key = key_;
    const Later later(chunk);
    int64_t highs = 0;
    const auto both = [&](int64_t i) {
      later.ask(i);
      const Vec acc = load(err + i);
      Mask high;
      const Halves x = split_at(acc, key, high);
      if constexpr (kCodesFirst<Size>)
        put_codes(codes, i, high, ge_zero(acc));
      else
        highs += __builtin_popcount(high);
      return x;
    };
    const int64_t width = first_sums(size, both, [&](int64_t i, const Halves& x) {
      store(tree + i, x.high);
      store(low_tree + i, x.low);
    });
    high_sum = tree_sum(tree, width);
    low_sum = tree_sum(low_tree, width);
    for (int64_t i = 0; kCodesFirst<Size> && i < size / 4; i += 8) {
      uint64_t word;
      std::memcpy(&word, codes + i, sizeof word);
      highs += __builtin_popcountll(word & 0x5555555555555555u);
    }
    return highs;
  }

  template <typename Size>
  void subtract_all(Size size) {
    float* const err = chunk.err;
    char* const codes = chunk.codes;
    const int32_t key = key_;
    const Vec far = set1(high_), near = set1(low_);
    for (int64_t i = 0; i < size; i += kLanes) {
      const Vec acc = load(err + i);
      const auto high = key_ge(acc, key), positive = ge_zero(acc);
      store(err + i, sub(acc, signed_like(acc, positive, select(high, far, near))));
      if constexpr (!kCodesFirst<Size>) put_codes(codes, i, high, positive);
    }
  }

  // Whether codes are made with the sums, which they tell the number of, and not with the residual: those of
  // a longer chunk would be written in too many places.
  template <typename Size>
  static constexpr bool kCodesFirst = is_short<Size>;

  static GCK_INLINE void put_codes(char* codes, int64_t i, Mask high, Mask positive) {
    const uint32_t word = interleave(high, positive);
    std::memcpy(codes + i / 4, &word, sizeof word);
  }

  // From element `first` on.
  static void clear_codes(char* codes, int64_t first, int64_t size) {
    std::memset(codes + (first + 3) / 4, 0, static_cast<size_t>(size / 4 - (first + 3) / 4));
    if (first % 4) codes[first / 4] = static_cast<char>(codes[first / 4] & ((1 << 2 * (first % 4)) - 1));
  }

  float mean_, low_, high_;
  int32_t key_;
};

}  // namespace gck::GCK_ISA
