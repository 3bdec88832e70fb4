#include "cpu/isa/random_k.hpp"

#include "cpu/isa/philox.hpp"

namespace gck::GCK_ISA {
namespace {

template <Dtype D>
bool add_all(const void* grad, float* err, int64_t begin, int64_t end) {
  Vec best = set1(0.0f), other = set1(0.0f);
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    const Vec a = add(load_as<D>(grad, i), load(err + i));
    const Vec b = add(load_as<D>(grad, i + kLanes), load(err + i + kLanes));
    store(err + i, a);
    store(err + i + kLanes, b);
    best = max_key(best, a);
    other = max_key(other, b);
  }
  for (; i < end; i += kLanes) {
    const auto rest = static_cast<int>(end - i < kLanes ? end - i : kLanes);
    const Vec a = add(load_part<D>(grad, i, rest), load_part<Dtype::fp32>(err, i, rest));
    store_part(err + i, a, rest);
    best = max_key(best, a);
  }
  return !any_key_ge(best, other, kInfKey);
}

}  // namespace

void random_k_draw(uint64_t seed, uint64_t first, int64_t count, uint64_t* out) {
  const Keys keys{seed};
  // A number is two words: those of elements 2 i and 2 i + 1 in the numbering of philox.hpp.
  for (int64_t i = 0; i < count; i += kDrawn) {
    store_words(out + i, random_words(keys, (first + static_cast<uint64_t>(i)) / 2));
  }
}

bool random_k_add(const void* grad, Dtype dtype, float* err, int64_t begin, int64_t end) {
  return with_dtype(dtype, [&]<Dtype D>() { return add_all<D>(grad, err, begin, end); });
}

}  // namespace gck::GCK_ISA
