// Functions of headers that several devices or instruction sets share are always inlined. Otherwise the linker would keep
// one copy for all units, perhaps with instructions that this processor lacks.
#pragma once

#ifdef __CUDACC__
// For host and device; what it calls may be for either.
#define SOFTMAX_EXT_INLINE __host__ __device__ __forceinline__
#define SOFTMAX_EXT_CALLS_EITHER _Pragma("nv_exec_check_disable")
// In kernels alone.
#define SOFTMAX_EXT_KERNEL_INLINE __device__ __forceinline__
// In kernels, and not inlined: what few threads do at the end, whose registers the others are not to hold.
#define SOFTMAX_EXT_KERNEL_CALL __device__ __noinline__
#else
#define SOFTMAX_EXT_INLINE inline __attribute__((always_inline))
#define SOFTMAX_EXT_CALLS_EITHER
#define SOFTMAX_EXT_KERNEL_INLINE inline __attribute__((always_inline))
#define SOFTMAX_EXT_KERNEL_CALL inline __attribute__((noinline))
#endif
