#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fake.hpp"

namespace fake {

namespace {

struct Bfloat16 {
  uint16_t bits;
  Bfloat16() = default;
  explicit Bfloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    bits = value != value ? 0x7fc0 : static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};

// Wide is what two elements are combined in, before the result is rounded to Element.
template <typename Element, typename Wide = Element>
void reduce_as(char* recv, const std::vector<const char*>& rows, size_t count, ncclRedOp_t op) {
  for (size_t i = 0; i < count; ++i) {
    Element total;
    std::memcpy(&total, rows[0] + i * sizeof total, sizeof total);
    for (size_t row = 1; row < rows.size(); ++row) {
      Element next;
      std::memcpy(&next, rows[row] + i * sizeof next, sizeof next);
      const Wide a = static_cast<Wide>(total), b = static_cast<Wide>(next);
      const Wide both = op == ncclProd  ? a * b
                        : op == ncclMax ? std::max(a, b)
                        : op == ncclMin ? std::min(a, b)
                                        : a + b;
      total = static_cast<Element>(both);
    }
    if (op == ncclAvg)
      total = static_cast<Element>(static_cast<Wide>(total) / static_cast<Wide>(rows.size()));
    std::memcpy(recv + i * sizeof total, &total, sizeof total);
  }
}

}  // namespace

size_t size_of(ncclDataType_t dtype) {
  switch (dtype) {
    case ncclInt8:
    case ncclUint8:
      return 1;
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
      return 4;
    default:
      return 8;
  }
}

void reduce(char* recv, const std::vector<const char*>& rows, size_t count, ncclDataType_t dtype,
            ncclRedOp_t op) {
  switch (dtype) {
    case ncclInt8:
      return reduce_as<int8_t, int>(recv, rows, count, op);
    case ncclUint8:
      return reduce_as<uint8_t, int>(recv, rows, count, op);
    case ncclInt32:
      return reduce_as<int32_t>(recv, rows, count, op);
    case ncclUint32:
      return reduce_as<uint32_t>(recv, rows, count, op);
    case ncclInt64:
      return reduce_as<int64_t>(recv, rows, count, op);
    case ncclUint64:
      return reduce_as<uint64_t>(recv, rows, count, op);
    case ncclFloat16:
      return reduce_as<_Float16, float>(recv, rows, count, op);
    case ncclFloat32:
      return reduce_as<float>(recv, rows, count, op);
    case ncclFloat64:
      return reduce_as<double>(recv, rows, count, op);
    case ncclBfloat16:
      return reduce_as<Bfloat16, float>(recv, rows, count, op);
    default:
      break;
  }
}

}  // namespace fake
