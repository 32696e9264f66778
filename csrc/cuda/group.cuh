// The threads that work on one row: part of a warp, a block, the blocks of a cluster, or the same lane of all warps of
// a block; and the reduction that leaves the same bits in all of them.
#pragma once

#include <cooperative_groups.h>

#include "numbers.cuh"

namespace softmax_ext {
namespace cuda {

// From 9.0 on, and on the host, which only names the kernels. Elsewhere a cluster is one block.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SOFTMAX_EXT_CLUSTERS 1
#else
#define SOFTMAX_EXT_CLUSTERS 0
#endif

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

// The dynamic shared memory of the block; there is no other.
#ifdef __CUDACC__
template <typename V>
DEVICE V* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<V*>(bytes);
}
#endif

// ---- values that merge ---------------------------------------------------------------------------------------------
//
// V() is neutral, and two values merge to the same bits both ways round.

template <typename T>
struct Largest {
  T value = lowest<T>();
  DEVICE void merge(const Largest& other) { value = larger(value, other.value); }
};

template <typename T>
struct Sum {
  T value = 0;
  DEVICE void merge(const Sum& other) { value += other.value; }
};

struct First {
  int64_t value = INT64_MAX;
  DEVICE void merge(const First& other) { value = min(value, other.value); }
};

// ---- reductions ----------------------------------------------------------------------------------------------------

// Of any trivially copyable type of whole words.
template <typename V>
DEVICE V shuffle_xor(const V& value, int lane_mask) {
  static_assert(sizeof(V) % 4 == 0, "whole words");
  unsigned words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (unsigned i = 0; i < sizeof(V) / 4; i++) words[i] = __shfl_xor_sync(kAllLanes, words[i], lane_mask);
  V other;
  memcpy(&other, words, sizeof(V));
  return other;
}

// Merges the values of each `width` adjacent lanes.
template <typename V>
DEVICE void reduce_lanes(V& value, int width) {
#pragma unroll 1
  for (int lane_mask = width / 2; lane_mask > 0; lane_mask /= 2) value.merge(shuffle_xor(value, lane_mask));
}
// The same of a whole warp, unrolled.
template <typename V>
DEVICE void reduce_warp(V& value) {
#pragma unroll
  for (int lane_mask = kWarp / 2; lane_mask > 0; lane_mask /= 2) value.merge(shuffle_xor(value, lane_mask));
}

// Merges the values of a block, through `shared` of one value for each warp, which is not to be used again before all
// threads have passed another barrier.
template <typename V>
DEVICE void reduce_block(V& value, V* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  reduce_warp(value);
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = lane < warps ? shared[lane] : V();
  reduce_warp(value);
}

// ---- groups --------------------------------------------------------------------------------------------------------

// kWarp: 8, 16 or 32 lanes of a warp. kCluster: one block or more. kLanes: the threads of a block that have the same lane
// number.
enum class Scope { kWarp, kBlock, kCluster, kLanes };

// The reductions of one row have a slot of shared memory each: none has to wait until all threads have read another's.
enum Slot { kMaxSlot, kSumSlot, kRestSlot, kPredictionSlot, kSlots };

// Bytes of a slot, for values of at most sizeof(V): one of each warp and one of the block, or one of each thread.
template <typename V>
__host__ __device__ constexpr int slot_bytes(Scope scope, int threads) {
  const int values = scope == Scope::kWarp ? 0 : scope == Scope::kLanes ? threads : kWarp + 1;
  return values * static_cast<int>(sizeof(V) < 8 ? 8 : sizeof(V));
}

// `row` is the number of the group's row in the grid, `thread` its own number among the `size` threads of the group.
template <Scope kScope>
struct Group {
  int size, thread;
  unsigned row;

  DEVICE explicit Group(int lanes) {
    if constexpr (kScope == Scope::kWarp) {
      size = lanes;  // a power of two
      thread = threadIdx.x & (lanes - 1);
      row = (blockIdx.x * blockDim.x + threadIdx.x) >> (__ffs(lanes) - 1);
    } else if constexpr (kScope == Scope::kBlock) {
      size = blockDim.x;
      thread = threadIdx.x;
      row = blockIdx.x;
    } else if constexpr (kScope == Scope::kLanes) {
      size = blockDim.x / kWarp;
      thread = threadIdx.x / kWarp;
      row = blockIdx.x * kWarp + threadIdx.x % kWarp;
    } else {
      const int blocks = cluster_blocks();  // a power of two
      size = blocks * blockDim.x;
      thread = (blockIdx.x & (blocks - 1)) * blockDim.x + threadIdx.x;
      row = blockIdx.x >> (__ffs(blocks) - 1);
    }
  }

  // Merges the values of the group. Biggest: of all values that the kernel reduces, the largest type.
  template <typename Biggest, typename V>
  DEVICE void reduce(V& value, Slot slot) const {
    static_assert(sizeof(V) <= sizeof(Biggest) || sizeof(V) <= 8, "the slot is of Biggest");
    if constexpr (kScope == Scope::kWarp) {
      reduce_lanes(value, size);
      return;
    } else {
      V* const shared = reinterpret_cast<V*>(shared_memory<char>() + slot * slot_bytes<Biggest>(kScope, blockDim.x));
      if constexpr (kScope == Scope::kLanes) {
        reduce_columns(value, shared);
      } else {
        reduce_block(value, shared);
        if (kScope == Scope::kCluster && cluster_blocks() > 1) reduce_cluster(value, shared);
      }
    }
  }

  // The lanes of this warp that are in this thread's group.
  DEVICE unsigned lanes() const {
    const int lane = threadIdx.x % kWarp;
    if constexpr (kScope == Scope::kWarp) return kAllLanes >> (kWarp - size) << (lane - thread);
    return kScope == Scope::kLanes ? 1u << lane : kAllLanes;
  }

  // The last thing a thread does: a block that has left takes its shared memory, which others may read, with it.
  DEVICE void leave() const {
#if SOFTMAX_EXT_CLUSTERS
    if (kScope == Scope::kCluster && cluster_blocks() > 1) cooperative_groups::this_cluster().sync();
#endif
  }

 private:
  DEVICE static int cluster_blocks() {
#if SOFTMAX_EXT_CLUSTERS
    return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
    return 1;
#endif
  }

  // Values of the cluster's blocks go through the slot's last place.
  template <typename V>
  DEVICE static void reduce_cluster(V& value, V* shared) {
#if SOFTMAX_EXT_CLUSTERS
    const auto cluster = cooperative_groups::this_cluster();
    if (threadIdx.x == 0) shared[kWarp] = value;
    cluster.sync();
    const unsigned lane = threadIdx.x % kWarp;
    value = lane < cluster.num_blocks() ? *cluster.map_shared_rank(shared + kWarp, lane) : V();
    reduce_warp(value);
#endif
  }

  // Merges the values of the warps lane by lane; these are a power of two.
  template <typename V>
  DEVICE static void reduce_columns(V& value, V* shared) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    shared[warp * kWarp + lane] = value;
    __syncthreads();
    for (int half = warps / 2; half > 0; half /= 2) {
      if (warp < half) {
        value.merge(shared[(warp + half) * kWarp + lane]);
        shared[warp * kWarp + lane] = value;
      }
      __syncthreads();
    }
    value = shared[lane];
  }
};

}  // namespace cuda
}  // namespace softmax_ext
