// Stands in for CUDA's header of this name, so that a C++ compiler builds the sources of csrc/cuda for the CPU: one
// fiber for each CUDA thread. Only what those sources use, with the semantics of CUDA's programming guide. Test code.
//
// Two rules beside CUDA's: the only shared memory is that of shared_memory<T>() at the end, so that its bounds and what
// it holds at first can be checked; and threads of a warp are never in lockstep between two collectives.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static_assert(false, "take shared memory from shared_memory<T>()");

#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_INF __builtin_inf()
#define CUDART_NAN __builtin_nan("")

// The caller's place: a default argument of the functions below.
#define EMULATOR_HERE ::emulator::Where where = {__builtin_FILE(), __builtin_LINE()}

// ---- vector types ----------------------------------------------------------------------------------------------------

#define EMULATOR_VECTOR2(type, name, alignment) \
  struct alignas(alignment) name {              \
    type x, y;                                  \
  };                                            \
  inline name make_##name(type x, type y) { return {x, y}; }
#define EMULATOR_VECTOR4(type, name, alignment) \
  struct alignas(alignment) name {              \
    type x, y, z, w;                            \
  };                                            \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

EMULATOR_VECTOR2(unsigned short, ushort2, 4)
EMULATOR_VECTOR2(int, int2, 8)
EMULATOR_VECTOR2(unsigned, uint2, 8)
EMULATOR_VECTOR2(float, float2, 8)
EMULATOR_VECTOR2(double, double2, 16)
EMULATOR_VECTOR2(long long, longlong2, 16)
EMULATOR_VECTOR2(unsigned long long, ulonglong2, 16)
EMULATOR_VECTOR4(unsigned short, ushort4, 8)
EMULATOR_VECTOR4(int, int4, 16)
EMULATOR_VECTOR4(unsigned, uint4, 16)
EMULATOR_VECTOR4(float, float4, 16)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- the thread ------------------------------------------------------------------------------------------------------

// Of the running fiber; the emulator sets them whenever it switches.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

inline void __syncthreads(EMULATOR_HERE) { ::emulator::block_barrier(::emulator::Barrier::kSync, 0, where); }
inline int __syncthreads_or(int predicate, EMULATOR_HERE) {
  return ::emulator::block_barrier(::emulator::Barrier::kOr, predicate, where);
}
inline int __syncthreads_and(int predicate, EMULATOR_HERE) {
  return ::emulator::block_barrier(::emulator::Barrier::kAnd, predicate, where);
}
inline int __syncthreads_count(int predicate, EMULATOR_HERE) {
  return ::emulator::block_barrier(::emulator::Barrier::kCount, predicate, where);
}

inline void __syncwarp(unsigned mask = 0xffffffff, EMULATOR_HERE) {
  ::emulator::warp_collective(::emulator::Collective::kSyncWarp, mask, 0, 0, where);
}

// As CUDA's programming guide has them: a lane out of its segment of `width` lanes gives the thread's own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, EMULATOR_HERE) {
  const int first = ::emulator::lane() & ~(width - 1);
  return ::emulator::shuffle(mask, value, first + (source & (width - 1)), where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, EMULATOR_HERE) {
  const int lane = ::emulator::lane(), source = lane ^ lane_mask;
  return ::emulator::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATOR_HERE) {
  const int lane = ::emulator::lane(), source = lane + static_cast<int>(delta);
  return ::emulator::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATOR_HERE) {
  const int lane = ::emulator::lane(), source = lane - static_cast<int>(delta);
  return ::emulator::shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_HERE) {
  const uint64_t vote = predicate != 0;
  return static_cast<unsigned>(::emulator::warp_collective(::emulator::Collective::kVote, mask, vote, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_HERE) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_HERE) {
  return __ballot_sync(mask, predicate, where) == mask;
}
// No lane can rely on another's company, so the least of the right answers.
inline unsigned __activemask() { return 1u << ::emulator::lane(); }

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __trap(EMULATOR_HERE) { ::emulator::fail(where, "__trap()"); }

// ---- memory ----------------------------------------------------------------------------------------------------------

#define EMULATOR_LOAD(name)                  \
  template <typename T>                      \
  T name(const T* address, EMULATOR_HERE) {  \
    return ::emulator::load(address, where); \
  }
#define EMULATOR_STORE(name)                      \
  template <typename T>                           \
  void name(T* address, T value, EMULATOR_HERE) { \
    ::emulator::store(address, value, where);     \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldcv)
EMULATOR_LOAD(__ldlu)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stwt)

// Integers only: floating-point atomics would make the order of threads show in the results.
template <typename T, typename U>
T atomicAdd(T* address, U value, EMULATOR_HERE) {
  static_assert(std::is_integral<T>::value, "no floating-point atomics");
  const T old = ::emulator::load(address, where);
  *address = old + static_cast<T>(value);
  return old;
}
template <typename T, typename U>
T atomicMin(T* address, U value, EMULATOR_HERE) {
  static_assert(std::is_integral<T>::value, "no floating-point atomics");
  const T old = ::emulator::load(address, where);
  if (static_cast<T>(value) < old) *address = static_cast<T>(value);
  return old;
}
template <typename T, typename U>
T atomicMax(T* address, U value, EMULATOR_HERE) {
  static_assert(std::is_integral<T>::value, "no floating-point atomics");
  const T old = ::emulator::load(address, where);
  if (old < static_cast<T>(value)) *address = static_cast<T>(value);
  return old;
}
template <typename T, typename U, typename V>
T atomicCAS(T* address, U compare, V value, EMULATOR_HERE) {
  const T old = ::emulator::load(address, where);
  if (old == static_cast<T>(compare)) *address = static_cast<T>(value);
  return old;
}

// ---- mathematics -----------------------------------------------------------------------------------------------------

template <typename T, typename = std::enable_if_t<std::is_integral<T>::value>>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T, typename = std::enable_if_t<std::is_integral<T>::value>>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline double __hiloint2double(int high, int low) {
  return ::emulator::bits<double>(static_cast<uint64_t>(static_cast<unsigned>(high)) << 32 |
                                  static_cast<unsigned>(low));
}
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0), 1); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }

// glibc declares functions of these names, for itself.
#define __expf(x) exp2f((x) * 1.44269504f)
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __tanhf(x) tanhf(x)

inline float __uint_as_float(unsigned x) { return ::emulator::bits<float>(x); }
inline float __int_as_float(int x) { return ::emulator::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return ::emulator::bits<unsigned>(x); }
inline int __float_as_int(float x) { return ::emulator::bits<int>(x); }
inline double __longlong_as_double(long long x) { return ::emulator::bits<double>(x); }
inline long long __double_as_longlong(double x) { return ::emulator::bits<long long>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
#define __builtin_assume(condition) static_cast<void>(0)

// ---- the host's side -------------------------------------------------------------------------------------------------

struct CUstream_st;
typedef CUstream_st* cudaStream_t;

// CUDA's numbers.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

// The card has the compute capability that SOFTMAX_EXT_EMULATED_CAPABILITY says at the time of each call ("75"; default
// "90"), and as many multiprocessors as SOFTMAX_EXT_EMULATED_MULTIPROCESSORS (default 4).
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrClockRate = 13,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

struct cudaDeviceProp {
  char name[256];
};
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaRuntimeGetVersion(int* version);

// Device memory is the host's.
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* all_bytes);

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaStreamCreate(cudaStream_t* stream);  // the one that there is
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();

// Times of the host's clock.
struct CUevent_st;
typedef CUevent_st* cudaEvent_t;
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end);

// What is captured runs, too. The nodes of the graph are its launches: copies are not counted.
struct CUgraph_st;
typedef CUgraph_st* cudaGraph_t;
struct CUgraphNode_st;
typedef CUgraphNode_st* cudaGraphNode_t;
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed,
};
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};
// The code is for the capability that SOFTMAX_EXT_EMULATED_CODE says; default: the card's.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// How many fit on the card by threads and shared memory; registers are not known here.
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config);
template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Parameters...),
                                           const cudaLaunchConfig_t* config) {
  return cudaOccupancyMaxActiveClusters(clusters, reinterpret_cast<const void*>(kernel), config);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          size_t shared_bytes);
template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Parameters...), int threads,
                                                          size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void*>(kernel), threads,
                                                       shared_bytes);
}

namespace emulator {

// A kernel and its arguments without their types: call(arguments) runs one thread. `signature` is for reports.
struct Kernel {
  const void* function;
  const char* signature;
  void (*call)(const void* arguments);
  const void* arguments;
};
cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& kernel);

}  // namespace emulator

// Runs the whole grid before it returns.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using Copies = std::tuple<void (*)(Parameters...), std::tuple<std::decay_t<Parameters>...>>;
  const Copies copies(kernel, std::tuple<std::decay_t<Parameters>...>(std::forward<Arguments>(arguments)...));
  const auto call = [](const void* opaque) {
    const Copies& copies = *static_cast<const Copies*>(opaque);
    std::apply(std::get<0>(copies), std::get<1>(copies));
  };
  return ::emulator::launch(*config, {reinterpret_cast<const void*>(kernel), __PRETTY_FUNCTION__, call, &copies});
}

// ---- shared memory ---------------------------------------------------------------------------------------------------

namespace softmax_ext {
namespace cuda {

// The block's dynamic shared memory: of the size of the launch to the byte, NaNs before the block begins.
template <typename T>
T* shared_memory() {
  return static_cast<T*>(::emulator::shared_memory());
}

}  // namespace cuda
}  // namespace softmax_ext
