// The CUDA types that nccl.h mentions, for compiling it without a toolkit.
#pragma once
#include <stddef.h>
#define CUDART_VERSION 10000
#define __CUDA_BF16_TYPES_EXIST__ 1
typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
