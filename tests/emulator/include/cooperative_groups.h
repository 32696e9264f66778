// Stands in for CUDA's header of this name: thread blocks and clusters of them. See cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void sync(CUDA_ON_CPU_HERE) const {
    ::cuda_on_cpu::cluster_arrive(where);
    ::cuda_on_cpu::cluster_wait(where);
  }
  void barrier_arrive(CUDA_ON_CPU_HERE) const { ::cuda_on_cpu::cluster_arrive(where); }
  void barrier_wait(CUDA_ON_CPU_HERE) const { ::cuda_on_cpu::cluster_wait(where); }
  unsigned block_rank() const { return ::cuda_on_cpu::cluster_rank(); }
  unsigned num_blocks() const { return ::cuda_on_cpu::cluster_blocks(); }

  template <typename T>
  T* map_shared_rank(T* address, int rank, CUDA_ON_CPU_HERE) const {
    return static_cast<T*>(::cuda_on_cpu::map_shared_rank(address, static_cast<unsigned>(rank), where));
  }
};
inline cluster_group this_cluster() { return {}; }

struct thread_block {
  void sync(CUDA_ON_CPU_HERE) const { __syncthreads(where); }
  unsigned thread_rank() const { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }
  unsigned num_threads() const { return blockDim.x * blockDim.y * blockDim.z; }
};
inline thread_block this_thread_block() { return {}; }

}  // namespace cooperative_groups
