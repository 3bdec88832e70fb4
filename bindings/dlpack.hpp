// What gck uses of DLPack's C ABI, declared here so that nothing of a framework is needed to be built.
//
// Of major version 1, whose structures only grow at their ends: https://github.com/dmlc/dlpack.
// tests/dlpack_abi.cpp compares every line with the header that torch brings.
#pragma once

#include <cstdint>

namespace gck::dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
enum Code : uint8_t { Int = 0, UInt = 1, Float = 2, Bfloat = 4 };

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* manager_ctx;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

// A framework's table of functions, in a capsule of this name that is an attribute of its tensor type.
constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kCapsule = "dlpack_exchange_api";

struct ExchangeApi {
  Version version;
  ExchangeApi* prev_api;  // one of an older version, or null
  int (*managed_tensor_allocator)(Tensor* prototype, ManagedTensor** out, void* error_ctx,
                                  void (*set_error)(void* error_ctx, const char* kind, const char* message));
  int (*managed_tensor_from_py_object_no_sync)(void* py_object, ManagedTensor** out);
  int (*managed_tensor_to_py_object_no_sync)(ManagedTensor* tensor, void** out_py_object);
  int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);  // may be null
};

}  // namespace gck::dlpack
