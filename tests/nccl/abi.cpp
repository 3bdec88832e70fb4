// Compiled, never run: bindings/nccl_abi.hpp says what the nccl.h that comes first on the include path says.
#include <nccl.h>

#include <cstddef>
#include <type_traits>

#include "nccl_abi.hpp"

namespace abi = gck::nccl::abi;

#define SAME(ours, theirs) static_assert(static_cast<long long>(ours) == static_cast<long long>(theirs))

SAME(sizeof(abi::UniqueId), sizeof(ncclUniqueId));
SAME(alignof(abi::UniqueId), alignof(ncclUniqueId));
SAME(sizeof(abi::Result), sizeof(ncclResult_t));
SAME(sizeof(abi::DataType), sizeof(ncclDataType_t));
SAME(sizeof(abi::RedOp), sizeof(ncclRedOp_t));
SAME(sizeof(abi::Stream), sizeof(cudaStream_t));
SAME(sizeof(abi::CommPtr), sizeof(ncclComm_t));
static_assert(std::is_trivially_copyable_v<abi::UniqueId>, "passed by value, as C does");

SAME(abi::Result::Success, ncclSuccess);
SAME(abi::Result::UnhandledCudaError, ncclUnhandledCudaError);
SAME(abi::Result::SystemError, ncclSystemError);
SAME(abi::Result::InternalError, ncclInternalError);
SAME(abi::Result::InvalidArgument, ncclInvalidArgument);
SAME(abi::Result::InvalidUsage, ncclInvalidUsage);
SAME(abi::Result::RemoteError, ncclRemoteError);
SAME(abi::Result::InProgress, ncclInProgress);
#if NCCL_VERSION_CODE >= 23203
SAME(abi::Result::Timeout, ncclTimeout);
#endif

SAME(abi::DataType::Int8, ncclInt8);
SAME(abi::DataType::Uint8, ncclUint8);
SAME(abi::DataType::Int32, ncclInt32);
SAME(abi::DataType::Uint32, ncclUint32);
SAME(abi::DataType::Int64, ncclInt64);
SAME(abi::DataType::Uint64, ncclUint64);
SAME(abi::DataType::Float16, ncclFloat16);
SAME(abi::DataType::Float32, ncclFloat32);
SAME(abi::DataType::Float64, ncclFloat64);
SAME(abi::DataType::Bfloat16, ncclBfloat16);

SAME(abi::RedOp::Sum, ncclSum);
SAME(abi::RedOp::Prod, ncclProd);
SAME(abi::RedOp::Max, ncclMax);
SAME(abi::RedOp::Min, ncclMin);
SAME(abi::RedOp::Avg, ncclAvg);

SAME(abi::kNoColor, NCCL_SPLIT_NOCOLOR);
SAME(abi::kUndefined, NCCL_CONFIG_UNDEF_INT);

constexpr ncclConfig_t initial = NCCL_CONFIG_INITIALIZER;
constexpr abi::Config ours;
SAME(ours.magic, initial.magic);
SAME(ours.blocking, initial.blocking);
SAME(ours.cga_cluster_size, initial.cgaClusterSize);
SAME(ours.split_share, initial.splitShare);
static_assert(initial.netName == nullptr && ours.net_name == nullptr);
static_assert(sizeof(abi::Config) <= sizeof(ncclConfig_t), "it only grows");
#if NCCL_VERSION_CODE == 21801
SAME(sizeof(abi::Config), sizeof(ncclConfig_t));
SAME(ours.version, initial.version);
#endif
SAME(offsetof(abi::Config, size), offsetof(ncclConfig_t, size));
SAME(offsetof(abi::Config, magic), offsetof(ncclConfig_t, magic));
SAME(offsetof(abi::Config, version), offsetof(ncclConfig_t, version));
SAME(offsetof(abi::Config, blocking), offsetof(ncclConfig_t, blocking));
SAME(offsetof(abi::Config, cga_cluster_size), offsetof(ncclConfig_t, cgaClusterSize));
SAME(offsetof(abi::Config, min_ctas), offsetof(ncclConfig_t, minCTAs));
SAME(offsetof(abi::Config, max_ctas), offsetof(ncclConfig_t, maxCTAs));
SAME(offsetof(abi::Config, net_name), offsetof(ncclConfig_t, netName));
SAME(offsetof(abi::Config, split_share), offsetof(ncclConfig_t, splitShare));

// Parameter by parameter: same size, and a pointer, an integer or a struct on both sides.
template <typename Ours, typename Theirs>
constexpr bool like = sizeof(Ours) == sizeof(Theirs) && std::is_class_v<Ours> == std::is_class_v<Theirs> &&
                      std::is_pointer_v<Ours> == std::is_pointer_v<Theirs>;
template <typename Ours, typename Theirs>
constexpr bool matches = false;
template <typename R, typename... Ours, typename S, typename... Theirs>
constexpr bool matches<R(Ours...), S(Theirs...)> = [] {
  if constexpr (sizeof...(Ours) != sizeof...(Theirs))
    return false;
  else
    return like<R, S> && (like<Ours, Theirs> && ...);
}();

#define CHECK(name, optional, parameters) \
  static_assert(matches<abi::Result parameters, decltype(::nccl##name)>, #name);
GCK_NCCL_FUNCTIONS(CHECK)
static_assert(matches<std::remove_pointer_t<abi::GetErrorString>, decltype(::ncclGetErrorString)>);
static_assert(matches<std::remove_pointer_t<abi::GetLastError>, decltype(::ncclGetLastError)>);
