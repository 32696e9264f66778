// Launches a kernel on a stream and checks it, and what the current device can do. Host code.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace softmax_ext {
namespace cuda {

// The shape of a launch; blocks is a multiple of cluster, which is 8 at most, as every device with clusters can run.
struct Grid {
  int64_t blocks;
  int threads;
  int cluster = 1;       // blocks of a cluster
  int shared_bytes = 0;  // of each block, 48 KiB at most, which every kernel may have
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Device {
  int capability;  // 90 for 9.0
  int multiprocessors;
};

[[noreturn]] inline void throw_launch_error(const char* kernel, const Grid& grid, cudaError_t error) {
  throw std::runtime_error("softmax_ext: kernel " + std::string(kernel) + " with " + std::to_string(grid.blocks) +
                           " blocks of " + std::to_string(grid.threads) + " threads, clusters of " +
                           std::to_string(grid.cluster) + ", " + std::to_string(grid.shared_bytes) +
                           " bytes of shared memory: " + cudaGetErrorString(error));
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("softmax_ext: ") + what + ": " + cudaGetErrorString(error));
}

inline Device current_device() {
  int device, major, minor;
  Device answer;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&answer.multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  answer.capability = 10 * major + minor;
  return answer;
}

// The compute capability that the code of a kernel was written for, which is less than the device's where the driver
// made it from older PTX: a cluster is one block there.
template <typename... Parameters>
int capability_of_code(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
            const Arguments&... arguments) {
  constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
  if (grid.blocks > kMostBlocks) throw_launch_error(name, grid, cudaErrorInvalidConfiguration);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) throw_launch_error(name, grid, error);
}

}  // namespace cuda
}  // namespace softmax_ext
