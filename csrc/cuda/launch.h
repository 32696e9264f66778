// Launches a kernel on a stream and checks it, and what the current device can do. Host code.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace softmax_ext {
namespace cuda {

// The shape of a launch; blocks is a multiple of cluster.
struct Grid {
  int64_t blocks;
  int threads;
  int cluster = 1;       // blocks of a cluster
  int shared_bytes = 0;  // of each block
};

constexpr int kPortableCluster = 8;  // blocks of a cluster that every device with clusters can run
constexpr int kLargeCluster = 16;    // that some can

struct Device {
  int capability;  // 90 for 9.0
  int multiprocessors;
  int cluster_blocks;  // most of a cluster
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
  answer.cluster_blocks = kLargeCluster;  // unless fits() says otherwise of a kernel
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&answer.multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  answer.capability = 10 * major + minor;
  return answer;
}

// The compute capability that the code of a kernel was written for, which is less than the device's where the driver
// made it from older PTX: kernels for clusters are empty there.
template <typename... Parameters>
int capability_of_code(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

// A launch as the runtime takes it. Not to be copied: it points into itself.
class LaunchConfig {
 public:
  LaunchConfig(const Grid& grid, cudaStream_t stream) {
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim.x = grid.cluster;
    cluster_.val.clusterDim.y = cluster_.val.clusterDim.z = 1;
    config_.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config_.blockDim = dim3(grid.threads);
    config_.dynamicSmemBytes = grid.shared_bytes;
    config_.stream = stream;
    config_.attrs = &cluster_;
    config_.numAttrs = grid.cluster > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttribute cluster_{};
  cudaLaunchConfig_t config_{};
};

// Allows a kernel what a launch needs beyond what every kernel may have.
template <typename... Parameters>
cudaError_t allow(void (*kernel)(Parameters...), const Grid& grid) {
  constexpr int kDefaultSharedBytes = 48 << 10;
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (grid.shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  return grid.cluster > kPortableCluster
             ? cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)
             : cudaSuccess;
}

// Whether the current device can run such clusters of the kernel.
template <typename... Parameters>
bool fits(void (*kernel)(Parameters...), const Grid& grid) {
  int clusters = 0;
  const LaunchConfig config(grid, nullptr);
  const bool answered = allow(kernel, grid) == cudaSuccess &&
                        cudaOccupancyMaxActiveClusters(&clusters, kernel, config.get()) == cudaSuccess;
  if (!answered) cudaGetLastError();  // a no, which nobody else is to take for an error
  return answered && clusters > 0;
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
            const Arguments&... arguments) {
  constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
  if (grid.blocks > kMostBlocks) throw_launch_error(name, grid, cudaErrorInvalidConfiguration);
  cudaError_t error = allow(kernel, grid);
  const LaunchConfig config(grid, stream);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(config.get(), kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) throw_launch_error(name, grid, error);
}

}  // namespace cuda
}  // namespace softmax_ext
