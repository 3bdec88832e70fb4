#include "cpu/isa/keys.hpp"
#include "cpu/isa/left.hpp"
#include "cpu/isa/topk.hpp"
#include "cpu/isa/vec.hpp"
#include "cpu/isa/winners.hpp"

namespace gck::GCK_ISA {
namespace {

// Candidates of one stretch of a list that won and were expected to lose, or the other way round. They lie
// far apart in err: memory is asked for all of a stretch, and written to when the next one has been looked
// at.
class Mended {
 public:
  static constexpr int64_t kStretch = 1024 * kLanes;

  // Without a branch: which vectors hold some cannot be foretold.
  GCK_INLINE void note(int64_t vector, Mask mend, Mask wins) {
    vectors_[count_] = {static_cast<uint32_t>(vector), static_cast<uint16_t>(mend),
                        static_cast<uint16_t>(wins)};
    count_ += mend != 0;
  }

  // `positions`: of the stretch.
  void ask(const uint32_t* positions, const float* err) const {
    for (int v = 0; v < count_; ++v) {
      for (Mask mend = vectors_[v].mend; mend; mend &= mend - 1) {
        __builtin_prefetch(err + positions[vectors_[v].at * kLanes + lowest_bit(mend)], 1);
      }
    }
  }

  void write(const Candidates& list, int64_t begin, float* err, Dtype value_dtype) {
    for (int v = 0; v < count_; ++v) {
      for (Mask mend = vectors_[v].mend; mend; mend &= mend - 1) {
        const auto lane = lowest_bit(mend);
        const int64_t j = begin + vectors_[v].at * kLanes + lane;
        const float acc = list.values[j];
        err[list.indices[j]] = vectors_[v].wins >> lane & 1 ? left_by(acc, value_dtype) : acc;
      }
    }
    count_ = 0;
  }

 private:
  struct Vector {
    uint32_t at;  // in the stretch
    uint16_t mend, wins;
  };
  int count_ = 0;
  Vector vectors_[kStretch / kLanes];
};

template <typename Outlet>
GCK_INLINE int64_t emit_to(Outlet& outlet, const Candidates& list, float* err, int32_t base, Winners& out) {
  Winners to = out;
  const Dtype dtype = to.value_dtype;
  int64_t nonfinite = 0, taken = 0;
  Mended mended[2];  // of a stretch, and of the one before
  int64_t before = 0;
  int which = 0;
  for (int64_t begin = 0; begin < list.count; before = begin, begin += Mended::kStretch) {
    const int64_t end = list.count - begin < Mended::kStretch ? list.count : begin + Mended::kStretch;
    for (int64_t j = begin; j < end; j += kLanes) {
      const Mask live = end - j >= kLanes ? 0xffffu : (1u << (end - j)) - 1;
      const Vec acc = load(list.values + j);
      const Mask reach = key_ge(acc, to.threshold) & live;
      Mask wins = key_ge(acc, to.threshold + 1) & live;
      for (Mask ties = reach & ~wins; ties && to.quota; ties &= ties - 1, --to.quota) wins |= ties & -ties;
      const Mask wild = key_ge(acc, kInfKey) & live;
      // Rounding makes some finite winners infinite.
      const Mask grown = dtype == Dtype::fp32 ? wild : (key_ge(rounded(acc, dtype), kInfKey) & wins) | wild;
      nonfinite += __builtin_popcount(grown);
      // Whatever is not finite was expected to win, and leaves 0 in any case.
      const Mask expected = err == nullptr ? wins : key_ge(acc, to.expected) & live;
      mended[which].note((j - begin) / kLanes, (expected ^ wins) & ~wild, wins);
      outlet.put(wins, acc, list.indices + j, base);
      taken += __builtin_popcount(wins);
    }
    mended[which].ask(list.indices + begin, err);
    which ^= 1;
    mended[which].write(list, before, err, dtype);
  }
  mended[which ^ 1].write(list, before, err, dtype);
  outlet.finish();
  const int64_t size = dtype == Dtype::fp32 ? sizeof(float) : sizeof(uint16_t);
  to.values = static_cast<char*>(to.values) + size * taken;
  to.indices += taken;
  to.left -= taken;
  out = to;
  return nonfinite;
}

}  // namespace

int64_t topk_emit(const Candidates& list, float* err, int32_t base, Winners* out) {
#if defined(GCK_AVX512)
  if (out->past_caches && out->value_dtype == Dtype::fp32) {
    PastCaches lines(*out);
    return emit_to(lines, list, err, base, *out);
  }
#endif
  ToMemory memory(*out);
  return emit_to(memory, list, err, base, *out);
}

}  // namespace gck::GCK_ISA
