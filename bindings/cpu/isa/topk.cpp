#include "cpu/isa/topk.hpp"

#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {
namespace {

// Appends the lanes in `m`; false where the list is full.
inline bool append(Candidates& out, Mask m, Vec acc, int64_t at) {
  if (out.count + kLanes > out.capacity) {
    out.overflow = true;
    return false;
  }
  compress(out.values + out.count, m, select(is_nan(acc), set1(float_of(kNanKey)), acc));
  compress_index(out.indices + out.count, m, static_cast<uint32_t>(at));
  out.count += __builtin_popcount(m);
  return true;
}

template <Dtype D>
void stream(const void* grad, float* err, int64_t count, int32_t threshold, Candidates& out) {
  const Vec zero = set1(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vec acc = add(load_as<D>(grad, i), load(err + i));
    const Mask m = key_ge(acc, threshold);
    if (m && append(out, m, acc, i)) acc = select(m, zero, acc);
    store(err + i, acc);
  }
  if (const int rest = static_cast<int>(count - i)) {
    Vec acc = add(load_part<D>(grad, i, rest), load_part<Dtype::fp32>(err, i, rest));
    const Mask m = key_ge(acc, threshold) & ((1u << rest) - 1);
    if (m && append(out, m, acc, i)) acc = select(m, zero, acc);
    store_part(err + i, acc, rest);
  }
}

template <Dtype D>
void add_all(const void* grad, const float* err, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, add(load_as<D>(grad, i), load(err + i)));
  if (const int rest = static_cast<int>(count - i)) {
    store_part(out + i, add(load_part<D>(grad, i, rest), load_part<Dtype::fp32>(err, i, rest)), rest);
  }
}

}  // namespace

void topk_stream(const void* grad, Dtype dtype, float* err, int64_t count, int32_t threshold,
                 Candidates* out) {
  with_dtype(dtype, [&]<Dtype D>() { stream<D>(grad, err, count, threshold, *out); });
}

void topk_collect(const float* x, int64_t count, int32_t threshold, Candidates* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec acc = load(x + i);
    if (const Mask m = key_ge(acc, threshold)) append(*out, m, acc, i);
  }
  if (const int rest = static_cast<int>(count - i)) {
    const Vec acc = load_part<Dtype::fp32>(x, i, rest);
    if (const Mask m = key_ge(acc, threshold) & ((1u << rest) - 1)) append(*out, m, acc, i);
  }
}

int64_t topk_emit(const Candidates& list, const Winners& out) {
  int64_t quota = out.quota, put = 0, nonfinite = 0;
  for (int64_t j = 0; j < list.count; j += kLanes) {
    const Mask live = list.count - j >= kLanes ? 0xffffu : (1u << (list.count - j)) - 1;
    const Vec acc = load(list.values + j);
    const Mask reach = key_ge(acc, out.threshold) & live;
    Mask wins = key_ge(acc, out.threshold + 1) & live;
    for (Mask ties = reach & ~wins; ties && quota; ties &= ties - 1, --quota) wins |= ties & -ties;
    const Mask wild = key_ge(acc, kInfKey) & live;
    nonfinite += __builtin_popcount(wild);
    for (Mask lose = live & ~wins & ~wild; lose; lose &= lose - 1) {
      const int lane = __builtin_ctz(lose);
      out.err[list.indices[j + lane]] = list.values[j + lane];
    }
    const int taken = __builtin_popcount(wins);
    auto* indices = reinterpret_cast<uint32_t*>(out.indices);
    const auto base = static_cast<uint32_t>(out.base);
    if (out.count - put >= kLanes) {
      compress(out.values + put, wins, acc);
      compress_words(indices + put, wins, list.indices + j, base);
    } else if (taken) {
      // Near the end of this part's room: the next part's thread writes behind it.
      alignas(64) float values[2 * kLanes];
      alignas(64) uint32_t words[2 * kLanes];
      compress(values, wins, acc);
      compress_words(words, wins, list.indices + j, base);
      std::memcpy(out.values + put, values, sizeof(float) * static_cast<size_t>(taken));
      std::memcpy(indices + put, words, sizeof(uint32_t) * static_cast<size_t>(taken));
    }
    put += taken;
  }
  return nonfinite;
}

void add_to(const void* grad, Dtype dtype, const float* err, int64_t count, float* out) {
  with_dtype(dtype, [&]<Dtype D>() { add_all<D>(grad, err, count, out); });
}

}  // namespace gck::GCK_ISA
