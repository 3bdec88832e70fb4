#include "cpu/isa/sparse.hpp"

#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {
namespace {

template <typename Index>
bool ascends(const Index* indices, int64_t begin, int64_t end) {
  Index bad = 0;  // as wide as an index: compilers then compare whole vectors
  for (int64_t j = begin; j < end; ++j) bad |= indices[j - 1] >= indices[j];
  return bad == 0;
}

template <bool kDivide, typename Store>
void move(float* x, float* out, int64_t count, float divisor, Store store_vec) {
  const Vec zero = set1(0.0f), whole = set1(divisor);
  int64_t i = 0;
  const auto one_by_one = [&](int64_t end) {
    for (; i < end; ++i) {
      out[i] = kDivide ? x[i] / divisor : x[i];
      x[i] = 0.0f;
    }
  };
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % sizeof(Vec) / sizeof(float));
  const int64_t head = past ? kLanes - past : 0;
  one_by_one(head < count ? head : count);
  for (; i + kLanes <= count; i += kLanes) {
    store_vec(out + i, kDivide ? div(load(x + i), whole) : load(x + i));
    store(x + i, zero);
  }
  one_by_one(count);
}

}  // namespace

bool sparse_ascends(const void* indices, bool wide, int64_t begin, int64_t end) {
  return wide ? ascends(static_cast<const int64_t*>(indices), begin, end)
              : ascends(static_cast<const int32_t*>(indices), begin, end);
}

void sparse_move_out(float* x, float* out, int64_t count, float divisor, bool past_caches) {
  const auto run = [&](auto store_vec) {
    divisor == 1.0f ? move<false>(x, out, count, divisor, store_vec)
                    : move<true>(x, out, count, divisor, store_vec);
  };
  past_caches ? run(store_past_caches) : run(store);
}

void sparse_settle() { order_stores(); }

}  // namespace gck::GCK_ISA
