#include "cpu/isa/random_k.hpp"

#include "cpu/isa/codes.hpp"
#include "cpu/isa/philox.hpp"

namespace gck::GCK_ISA {
namespace {

template <Dtype D>
bool add_all(const void* grad, float* err, int64_t begin, int64_t end) {
  Vec best = set1(0.0f), other = set1(0.0f);
  int64_t i = begin;
  const auto part = [&](int64_t count) {
    const auto some = static_cast<int>(count);
    const Vec a = add(load_part<D>(grad, i, some), load_part<Dtype::fp32>(err, i, some));
    store_part(err + i, a, some);
    best = max_key(best, a);
    i += count;
  };
  // Up to where a vector of err starts a line of memory.
  const int64_t head = (kLanes - begin % kLanes) % kLanes;
  if (head) part(head < end - begin ? head : end - begin);
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    const Vec a = add(load_as<D>(grad, i), load(err + i));
    const Vec b = add(load_as<D>(grad, i + kLanes), load(err + i + kLanes));
    store(err + i, a);
    store(err + i + kLanes, b);
    best = max_key(best, a);
    other = max_key(other, b);
  }
  while (i < end) part(end - i < kLanes ? end - i : kLanes);
  return !any_key_ge(best, other, kInfKey);
}

inline void store_values(void* values, int64_t at, Vec v, Dtype dtype) {
  if (dtype == Dtype::fp32) return store(static_cast<float*>(values) + at, v);
  auto* halves = static_cast<uint16_t*>(values) + at;
  dtype == Dtype::bf16 ? store_bf16(halves, v) : store_fp16(halves, v);
}

// picks[i] = begin + i * length + floor(number * length / 2^64), for kDrawn strata of one length below 2^32.
inline void scale_words(int64_t* picks, const RandomWords& words, int64_t begin, int64_t length) {
#if defined(GCK_AVX512) || defined(GCK_AVX2)
  constexpr int64_t kWords = sizeof(Wide) / 8;
  const Wide wide_length = wide(static_cast<uint32_t>(length));
  const Wide ahead = product(lane_numbers(), wide_length);
  for (int64_t i = 0; i < kDrawn; i += kWords) {
    const Wide bits = words_at(words, i / kWords);
    // By halves of the number, so that no product exceeds 64 bits.
    const Wide offset = upper(plus(product(upper(bits), wide_length), upper(product(bits, wide_length))));
    store_wide(picks + i, plus(offset, plus(ahead, wide64(begin + i * length))));
  }
#else
  uint64_t numbers[kDrawn];
  store_words(numbers, words);
  const auto factor = static_cast<uint64_t>(length);
  for (int64_t i = 0; i < kDrawn; ++i, begin += length) {
    const uint64_t low = (numbers[i] & 0xffffffffu) * factor >> 32;
    picks[i] = begin + static_cast<int64_t>(((numbers[i] >> 32) * factor + low) >> 32);
  }
#endif
}

}  // namespace

void random_k_draw(uint64_t seed, uint64_t first, int64_t count, uint64_t* out) {
  Keys keys{seed};
  // A number is two words: 2 i and 2 i + 1 in the numbering of philox.hpp.
  for (int64_t i = 0; i < count; i += kDrawn) {
    store_words(out + i, random_words(keys, (first + static_cast<uint64_t>(i)) / 2));
  }
}

void random_k_picks(uint64_t seed, int64_t first, int64_t count, int64_t size, int64_t longer, int64_t begin,
                    int64_t* picks) {
  Keys keys{seed};
  for (int64_t i = first; i < first + count; i += kDrawn, picks += kDrawn) {
    const RandomWords words = random_words(keys, static_cast<uint64_t>(i) / 2);
    const int64_t length = size + (i < longer);
    if ((i + kDrawn <= longer || i >= longer) && length < int64_t{1} << 32) {
      scale_words(picks, words, begin, length);
      begin += kDrawn * length;
      continue;
    }
    uint64_t numbers[kDrawn];
    store_words(numbers, words);
    for (int64_t j = 0; j < kDrawn && i + j < first + count; ++j) {
      const int64_t own = size + (i + j < longer);
      picks[j] = begin + scaled(numbers[j], own);
      begin += own;
    }
  }
}

bool random_k_add(const void* grad, Dtype dtype, float* err, int64_t begin, int64_t end) {
  return with_dtype(dtype, [&]<Dtype D>() { return add_all<D>(grad, err, begin, end); });
}

int64_t random_k_send(float* x, int64_t count, float factor, void* values, Dtype dtype, int64_t at) {
  const Vec by = set1(factor), zero = set1(0.0f);
  int64_t cleared = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec acc = load(x + i), value = canonical(mul(acc, by));
    const bool whole = count - i >= kLanes;
    if (whole) {
      store_values(values, at + i, value, dtype);
    } else {
      const int64_t width = dtype == Dtype::fp32 ? 4 : 2;
      alignas(64) char some[4 * kLanes];
      store_values(some, 0, value, dtype);
      std::memcpy(static_cast<char*>(values) + (at + i) * width, some,
                  static_cast<size_t>((count - i) * width));
    }
    const Vec rest = sub(acc, rounded(value, dtype));
    const Mask lost = key_ge(rest, kInfKey) & (whole ? 0xffffu : (1u << (count - i)) - 1);
    cleared += __builtin_popcount(lost);
    store(x + i, select(lost, zero, rest));
  }
  return cleared;
}

}  // namespace gck::GCK_ISA
