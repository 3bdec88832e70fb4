// What gck uses of NCCL's C ABI, declared here so that nothing needs NCCL, or CUDA, to be built.
//
// The ABI is stable since 2.18: enum values keep their meaning, and ncclConfig_t only grows at its end, with
// its size and version in front. tests/nccl/abi.cpp compares every line with the real nccl.h.
#pragma once

#include <climits>
#include <cstddef>

namespace gck::nccl::abi {

struct Comm;
using CommPtr = Comm*;
using Stream = void*;  // cudaStream_t

struct UniqueId {
  char internal[128];
};

enum class Result : int {
  Success = 0,
  UnhandledCudaError = 1,
  SystemError = 2,
  InternalError = 3,
  InvalidArgument = 4,
  InvalidUsage = 5,
  RemoteError = 6,
  InProgress = 7,
  Timeout = 8,  // newer than 2.18
};

enum class DataType : int {
  Int8 = 0,
  Uint8 = 1,
  Int32 = 2,
  Uint32 = 3,
  Int64 = 4,
  Uint64 = 5,
  Float16 = 6,
  Float32 = 7,
  Float64 = 8,
  Bfloat16 = 9,
};

enum class RedOp : int { Sum = 0, Prod = 1, Max = 2, Min = 3, Avg = 4 };

constexpr int kNoColor = -1;         // NCCL_SPLIT_NOCOLOR
constexpr int kUndefined = INT_MIN;  // NCCL_CONFIG_UNDEF_INT
constexpr int kOldest = 21801;       // 2.18.1, as ncclGetVersion encodes it

// ncclConfig_t of 2.18: newer libraries take it for what it says it is, and fill in the rest.
struct Config {
  size_t size = sizeof(Config);
  unsigned int magic = 0xcafebeef;
  unsigned int version = kOldest;
  int blocking = kUndefined;
  int cga_cluster_size = kUndefined;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  const char* net_name = nullptr;
  int split_share = kUndefined;
};

// X(name without "nccl", optional, parameters): every function that gck calls. All return a Result.
// Without an optional one the library opens, and only what needs it fails.
#define GCK_NCCL_FUNCTIONS(X)                                                                                \
  X(GetVersion, false, (int*))                                                                               \
  X(GetUniqueId, false, (abi::UniqueId*))                                                                    \
  X(CommInitRankConfig, false, (abi::CommPtr*, int, abi::UniqueId, int, abi::Config*))                       \
  X(CommFinalize, false, (abi::CommPtr))                                                                     \
  X(CommDestroy, false, (abi::CommPtr))                                                                      \
  X(CommAbort, false, (abi::CommPtr))                                                                        \
  X(CommGetAsyncError, false, (abi::CommPtr, abi::Result*))                                                  \
  X(CommCount, false, (abi::CommPtr, int*))                                                                  \
  X(CommUserRank, false, (abi::CommPtr, int*))                                                               \
  X(CommCuDevice, false, (abi::CommPtr, int*))                                                               \
  X(CommSplit, true, (abi::CommPtr, int, int, abi::CommPtr*, abi::Config*))                                  \
  X(GroupStart, false, ())                                                                                   \
  X(GroupEnd, false, ())                                                                                     \
  X(Send, false, (const void*, size_t, abi::DataType, int, abi::CommPtr, abi::Stream))                       \
  X(Recv, false, (void*, size_t, abi::DataType, int, abi::CommPtr, abi::Stream))                             \
  X(AllGather, false, (const void*, void*, size_t, abi::DataType, abi::CommPtr, abi::Stream))                \
  X(AllReduce, false, (const void*, void*, size_t, abi::DataType, abi::RedOp, abi::CommPtr, abi::Stream))    \
  X(ReduceScatter, true, (const void*, void*, size_t, abi::DataType, abi::RedOp, abi::CommPtr, abi::Stream)) \
  X(Broadcast, true, (const void*, void*, size_t, abi::DataType, int, abi::CommPtr, abi::Stream))

using GetErrorString = const char* (*)(abi::Result);
using GetLastError = const char* (*)(abi::CommPtr);

}  // namespace gck::nccl::abi
