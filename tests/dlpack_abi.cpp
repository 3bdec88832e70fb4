// Compares bindings/dlpack.hpp with the header that torch brings. Compiled by tests/test_direct.py.
#include <ATen/dlpack.h>

#include <cstddef>
#include <type_traits>

#include "dlpack.hpp"

namespace ours = gck::dlpack;

#define SAME_PLACE(mine, field, theirs, other)                                       \
  static_assert(offsetof(mine, field) == offsetof(theirs, other), #mine "." #field); \
  static_assert(sizeof(mine::field) == sizeof(theirs::other), "size of " #mine "." #field)

static_assert(ours::kMajor == DLPACK_MAJOR_VERSION);
static_assert(ours::kCpu == kDLCPU);
static_assert(int{ours::Int} == int{kDLInt} && int{ours::UInt} == int{kDLUInt});
static_assert(int{ours::Float} == int{kDLFloat} && int{ours::Bfloat} == int{kDLBfloat});

SAME_PLACE(ours::Version, major, DLPackVersion, major);
SAME_PLACE(ours::Version, minor, DLPackVersion, minor);
SAME_PLACE(ours::Device, type, DLDevice, device_type);
SAME_PLACE(ours::Device, id, DLDevice, device_id);
SAME_PLACE(ours::DataType, code, DLDataType, code);
SAME_PLACE(ours::DataType, bits, DLDataType, bits);
SAME_PLACE(ours::DataType, lanes, DLDataType, lanes);
SAME_PLACE(ours::Tensor, data, DLTensor, data);
SAME_PLACE(ours::Tensor, device, DLTensor, device);
SAME_PLACE(ours::Tensor, ndim, DLTensor, ndim);
SAME_PLACE(ours::Tensor, dtype, DLTensor, dtype);
SAME_PLACE(ours::Tensor, shape, DLTensor, shape);
SAME_PLACE(ours::Tensor, strides, DLTensor, strides);
SAME_PLACE(ours::Tensor, byte_offset, DLTensor, byte_offset);
SAME_PLACE(ours::ManagedTensor, version, DLManagedTensorVersioned, version);
SAME_PLACE(ours::ManagedTensor, manager_ctx, DLManagedTensorVersioned, manager_ctx);
SAME_PLACE(ours::ManagedTensor, deleter, DLManagedTensorVersioned, deleter);
SAME_PLACE(ours::ManagedTensor, flags, DLManagedTensorVersioned, flags);
SAME_PLACE(ours::ManagedTensor, tensor, DLManagedTensorVersioned, dl_tensor);
static_assert(sizeof(ours::Tensor) == sizeof(DLTensor));
static_assert(sizeof(ours::ManagedTensor) == sizeof(DLManagedTensorVersioned));

static_assert(offsetof(ours::ExchangeApi, version) == offsetof(DLPackExchangeAPIHeader, version));
static_assert(offsetof(ours::ExchangeApi, prev_api) == offsetof(DLPackExchangeAPIHeader, prev_api));
SAME_PLACE(ours::ExchangeApi, managed_tensor_allocator, DLPackExchangeAPI, managed_tensor_allocator);
SAME_PLACE(ours::ExchangeApi, managed_tensor_from_py_object_no_sync, DLPackExchangeAPI,
           managed_tensor_from_py_object_no_sync);
SAME_PLACE(ours::ExchangeApi, managed_tensor_to_py_object_no_sync, DLPackExchangeAPI,
           managed_tensor_to_py_object_no_sync);
SAME_PLACE(ours::ExchangeApi, dltensor_from_py_object_no_sync, DLPackExchangeAPI,
           dltensor_from_py_object_no_sync);
