// The threads that work on one row: part of a warp, a block, or the blocks of a cluster; their barrier, and the
// reduction that leaves the same bits in all of them.
#pragma once

#include <cooperative_groups.h>

#include "device.cuh"

namespace softmax_ext {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

// Of any trivially copyable type of whole words.
template <typename V>
__device__ __forceinline__ V shuffle_xor(const V& value, int lane_mask) {
  static_assert(sizeof(V) % 4 == 0, "whole words");
  unsigned words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (unsigned i = 0; i < sizeof(V) / 4; i++) words[i] = __shfl_xor_sync(kAllLanes, words[i], lane_mask);
  V other;
  memcpy(&other, words, sizeof(V));
  return other;
}

// Merges the values of each `width` adjacent lanes. V::merge must give the same bits both ways round.
template <typename V>
__device__ __forceinline__ void reduce_lanes(V& value, int width) {
  for (int lane_mask = width / 2; lane_mask > 0; lane_mask /= 2) value.merge(shuffle_xor(value, lane_mask));
}

// Merges the values of a block, through `shared` of one value for each warp; V() is neutral.
template <typename V>
__device__ __forceinline__ void reduce_block(V& value, V* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  reduce_lanes(value, kWarp);
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = lane < warps ? shared[lane] : V();
  reduce_lanes(value, kWarp);
}

enum class Scope { kWarp, kBlock, kCluster };

// `row` is what the group works on, `thread` its number among the `size` threads of the group.
template <Scope kScope>
struct Group;

// 8, 16 or 32 lanes of a warp.
template <>
struct Group<Scope::kWarp> {
  int size, thread;
  unsigned row;

  __device__ __forceinline__ explicit Group(int threads_per_row)
      : size(threads_per_row),
        thread(threadIdx.x % threads_per_row),
        row(blockIdx.x * (blockDim.x / threads_per_row) + threadIdx.x / threads_per_row) {}

  __device__ __forceinline__ void sync() const { __syncwarp(); }
  template <typename V>
  __device__ __forceinline__ void reduce(V& value) const {
    __syncwarp();  // shuffles order no accesses to memory: the leader has read what the output overwrites
    reduce_lanes(value, size);
  }
};

template <>
struct Group<Scope::kBlock> {
  int size, thread;
  unsigned row;

  __device__ __forceinline__ explicit Group(int) : size(blockDim.x), thread(threadIdx.x), row(blockIdx.x) {}

  __device__ __forceinline__ void sync() const { __syncthreads(); }
  template <typename V>
  __device__ __forceinline__ void reduce(V& value) const {
    reduce_block(value, shared_memory<V>());
  }
};

// Values of a cluster's blocks go through slot kWarp of each block's shared memory. The last thing a kernel does with
// the group must be sync(): a block that has left takes its shared memory with it.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <>
struct Group<Scope::kCluster> {
  int size, thread;
  unsigned row;

  __device__ __forceinline__ explicit Group(int) {
    const auto cluster = cooperative_groups::this_cluster();
    const int rank = static_cast<int>(cluster.block_rank()), blocks = static_cast<int>(cluster.num_blocks());
    size = blocks * blockDim.x;
    thread = rank * blockDim.x + threadIdx.x;
    row = blockIdx.x / blocks;
  }

  __device__ __forceinline__ void sync() const { cooperative_groups::this_cluster().sync(); }
  template <typename V>
  __device__ __forceinline__ void reduce(V& value) const {
    const auto cluster = cooperative_groups::this_cluster();
    V* const shared = shared_memory<V>();
    reduce_block(value, shared);
    if (threadIdx.x == 0) shared[kWarp] = value;
    cluster.sync();
    const unsigned lane = threadIdx.x % kWarp;
    value = lane < cluster.num_blocks() ? *cluster.map_shared_rank(shared + kWarp, lane) : V();
    reduce_lanes(value, kWarp);
  }
};
#endif

// Shared memory that a group of the scope needs for values of type V.
template <typename V>
constexpr int shared_bytes(Scope scope) {
  return scope == Scope::kWarp ? 0 : static_cast<int>(sizeof(V)) * (scope == Scope::kCluster ? kWarp + 1 : kWarp);
}

}  // namespace cuda
}  // namespace softmax_ext
