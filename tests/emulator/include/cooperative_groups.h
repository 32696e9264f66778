// Stands in for CUDA's header of this name: thread blocks and clusters of them. See cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void sync(EMULATOR_HERE) const {
    ::emulator::cluster_arrive(where);
    ::emulator::cluster_wait(where);
  }
  void barrier_arrive(EMULATOR_HERE) const { ::emulator::cluster_arrive(where); }
  void barrier_wait(EMULATOR_HERE) const { ::emulator::cluster_wait(where); }
  unsigned block_rank() const { return ::emulator::cluster_rank(); }
  unsigned num_blocks() const { return ::emulator::cluster_blocks(); }

  template <typename T>
  T* map_shared_rank(T* address, int rank, EMULATOR_HERE) const {
    return static_cast<T*>(::emulator::map_shared_rank(address, static_cast<unsigned>(rank), where));
  }
};
inline cluster_group this_cluster() { return {}; }

struct thread_block {
  void sync(EMULATOR_HERE) const { __syncthreads(where); }
  unsigned thread_rank() const { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }
  unsigned num_threads() const { return blockDim.x * blockDim.y * blockDim.z; }
};
inline thread_block this_thread_block() { return {}; }

}  // namespace cooperative_groups
