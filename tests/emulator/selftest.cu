// Small kernels, right and wrong, that show what the emulator of this folder finds: test_emulator.py runs them.
//
//   selftest NAME    runs one; exits with 0 if its result is right, 1 if it is wrong, 2 for a name that it does not know
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>

#include <string>
#include <vector>

namespace cg = cooperative_groups;
using softmax_ext::cuda::shared_memory;

namespace {

constexpr unsigned kAll = 0xffffffff;
constexpr int kThreads = 128;

__device__ float warp_sum(float v) {
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(kAll, v, lanes);
  return v;
}

template <bool kFirstBarrier, bool kSecondBarrier>
__global__ void __launch_bounds__(kThreads) block_sums(const float* in, float* out) {
  float* partial = shared_memory<float>();
  // Twice, so that the second round overwrites what the first one reads.
  for (int round = 0; round < 2; round++) {
    const float v = warp_sum(in[(2 * blockIdx.x + round) * kThreads + threadIdx.x]);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    if (kFirstBarrier) __syncthreads();
    float sum = 0;
    for (int w = 0; w < kThreads / 32; w++) sum += partial[w];
    if (kSecondBarrier) __syncthreads();
    if (threadIdx.x == kThreads - 1) out[2 * blockIdx.x + round] = sum;
  }
}

__global__ void cluster_sum(const float* in, float* out, bool last_sync) {
  cg::cluster_group cluster = cg::this_cluster();
  float* partial = shared_memory<float>();
  const float v = warp_sum(in[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x == 0) *partial = v;
  cluster.sync();
  // Block 0 reads the others' sums late.
  if (cluster.block_rank() == 0) {
    for (int i = 0; i < 50; i++) __syncthreads();
    float sum = 0;
    for (unsigned b = 0; b < cluster.num_blocks(); b++) sum += *cluster.map_shared_rank(partial, b);
    if (threadIdx.x == 0) out[blockIdx.x / cluster.num_blocks()] = sum;
  }
  if (last_sync) cluster.sync();
}

// Reads through an address that it got while the other block was alive.
__global__ void cluster_peer_exited(float* out) {
  cg::cluster_group cluster = cg::this_cluster();
  const float* other = cluster.map_shared_rank(shared_memory<float>(), cluster.block_rank() ^ 1);
  *shared_memory<float>() = 1;
  cluster.sync();
  if (cluster.block_rank() == 1) return;
  for (int i = 0; i < 50; i++) __syncthreads();
  *out = *other;
}

__global__ void cluster_peer_not_begun(float* out) {
  cg::cluster_group cluster = cg::this_cluster();
  *cluster.map_shared_rank(shared_memory<float>(), cluster.block_rank() ^ 1) = 1;
  cluster.sync();
  *out = *shared_memory<float>();
  cluster.sync();
}

__global__ void lane_exits() {
  if (threadIdx.x == 7) return;
  __shfl_xor_sync(kAll, 1.0f, 1);
}

__global__ void different_collectives() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_of_some_exited(int* out) {
  if (threadIdx.x % 3 == 0) return;
  const int any = __syncthreads_or(threadIdx.x == 64);
  if (threadIdx.x == 1) *out = any;
}

__global__ void outside_of_mask() { __shfl_sync(kAll >> 16, 1, 16); }

__global__ void lanes(int* out) {
  const int lane = threadIdx.x;
  // The halves of the warp in other collectives than each other, and in another order.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  int v = lane < 16 ? __shfl_down_sync(half, lane, 1, 16) : __shfl_up_sync(half, lane, 1, 16);
  const unsigned odd = __ballot_sync(half, lane & 1);
  v = v * 1000 + __shfl_sync(kAll, lane * 2, 5, 8);
  const bool votes = odd == (0xaaaaaaaau & half) && __any_sync(kAll, lane == 3) && !__all_sync(kAll, lane == 3);
  const double wide = __shfl_xor_sync(kAll, 1.0 / (lane + 1), 31);
  out[lane] = votes && wide == 1.0 / (32 - lane) ? v : -1;
}

__global__ void overrun(int past, float* out) {
  shared_memory<float>()[threadIdx.x + past] = 1;
  __syncthreads();
  *out = shared_memory<float>()[threadIdx.x];
}

__global__ void global_overrun(float* out) { out[threadIdx.x] = 1; }

__global__ void uninitialised(float* out) {
  const float v = shared_memory<float>()[threadIdx.x];
  shared_memory<float>()[threadIdx.x] = 1;  // what the next block must not see
  out[blockIdx.x * blockDim.x + threadIdx.x] = v;
}

__global__ void vector_load(const float* in, int offset, float* out) {
  const float4 v = __ldcs(reinterpret_cast<const float4*>(in + offset));
  *out = v.x + v.y + v.z + v.w;
}

__global__ void count(unsigned long long* out) { atomicAdd(out, 1ull); }

// ---- the host's side -------------------------------------------------------------------------------------------------

struct Shape {
  unsigned grid = 1, block = 32;
  size_t shared = 0;
  unsigned cluster = 1;
};

template <typename... P, typename... A>
cudaError_t try_run(Shape shape, void (*kernel)(P...), A... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config;
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename... P, typename... A>
void run(Shape shape, void (*kernel)(P...), A... arguments) {
  const cudaError_t error = try_run(shape, kernel, arguments...);
  if (error == cudaSuccess) return;
  fprintf(stderr, "launch failed: %s\n", cudaGetErrorString(error));
  exit(3);
}

std::vector<float> ascending(int n) {
  std::vector<float> values(n);
  for (int i = 0; i < n; i++) values[i] = static_cast<float>(i % 101);
  return values;
}

template <bool kFirstBarrier, bool kSecondBarrier>
bool check_block_sums() {
  constexpr int kBlocks = 6;
  const std::vector<float> in = ascending(2 * kBlocks * kThreads);
  std::vector<float> out(2 * kBlocks);
  run({kBlocks, kThreads, kThreads / 32 * sizeof(float)}, block_sums<kFirstBarrier, kSecondBarrier>, in.data(),
      out.data());
  for (int i = 0; i < 2 * kBlocks; i++) {
    float sum = 0;
    for (int t = 0; t < kThreads; t++) sum += in[i * kThreads + t];
    if (!(out[i] == sum)) return false;
  }
  return true;
}

bool check_cluster_sum(bool last_sync) {
  const std::vector<float> in = ascending(8 * 32);
  std::vector<float> out(2);
  run({8, 32, sizeof(float), 4}, cluster_sum, in.data(), out.data(), last_sync);
  for (int i = 0; i < 2; i++) {
    float sum = 0;
    for (int t = 0; t < 128; t++) sum += in[i * 128 + t];
    if (!(out[i] == sum)) return false;
  }
  return true;
}

bool check_lanes() {
  int out[32];
  run({}, lanes, static_cast<int*>(out));
  for (int lane = 0; lane < 32; lane++) {
    const int neighbour = lane < 15 ? lane + 1 : lane == 15 || lane == 16 ? lane : lane - 1;
    if (out[lane] != neighbour * 1000 + (lane / 8 * 8 + 5) * 2) return false;
  }
  return true;
}

bool check_uninitialised() {
  std::vector<float> out(4 * 32, 0.0f);
  run({4, 32, 32 * sizeof(float)}, uninitialised, out.data());
  for (const float v : out)
    if (!isnan(v)) return false;
  return true;
}

bool check_vector_load(int offset) {
  alignas(16) const float in[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  float out = 0;
  run({1, 1}, vector_load, static_cast<const float*>(in), offset, &out);
  return out == 10 + 4 * static_cast<float>(offset);
}

bool check_count() {
  unsigned long long out = 0;
  run({5, 96}, count, &out);
  return out == 480;
}

// Every launch that the card refuses, and one beside each that it does not.
bool check_limits() {
  float out;
  int wrong = 0;
  const auto expect = [&](cudaError_t error, Shape shape) {
    const cudaError_t got = try_run(shape, uninitialised, static_cast<float*>(nullptr));
    wrong += got != error || cudaPeekAtLastError() != error || cudaGetLastError() != error;
    wrong += cudaGetLastError() != cudaSuccess;
  };
  const auto allowed = [&](Shape shape) {
    return try_run(shape, overrun, 0, &out) == cudaSuccess && cudaGetLastError() == cudaSuccess;
  };
  expect(cudaErrorInvalidConfiguration, {0, 32});
  expect(cudaErrorInvalidConfiguration, {1u << 31, 32});
  expect(cudaErrorInvalidConfiguration, {1, 0});
  expect(cudaErrorInvalidConfiguration, {1, 1025});
  wrong += !allowed({1, 1024, 48 << 10});
  expect(cudaErrorInvalidValue, {1, 32, (48 << 10) + 1});
  wrong += cudaFuncSetAttribute(overrun, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10) != cudaSuccess;
  wrong += !allowed({1, 32, 227 << 10});
  wrong += cudaFuncSetAttribute(overrun, cudaFuncAttributeMaxDynamicSharedMemorySize, (227 << 10) + 1) == cudaSuccess;
  cudaGetLastError();

  expect(cudaErrorInvalidClusterSize, {16, 32, 0, 16});
  expect(cudaErrorInvalidClusterSize, {9, 32, 0, 8});
  wrong += !allowed({16, 32, 128, 8});
  wrong += cudaFuncSetAttribute(overrun, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess;
  wrong += !allowed({16, 32, 128, 16});

  int major = 0, shared = 0;
  setenv("SOFTMAX_EXT_EMULATED_CAPABILITY", "86", 1);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  wrong += major != 8 || shared != 99 << 10;
  expect(cudaErrorNotSupported, {16, 32, 0, 8});
  return wrong == 0;
}

// Conversions of every 16-bit pattern there and back, and of what lies half way between two of them.
bool check_halves() {
  int wrong = 0;
  for (unsigned bits = 0; bits < 0xffff; bits++) {
    const unsigned short low = static_cast<unsigned short>(bits);
    const float h = __half2float(__ushort_as_half(low)), b = __bfloat162float(__ushort_as_bfloat16(low));
    const double exact = (bits & 0x7c00) == 0 ? ldexp(bits & 0x3ff, -24)
                                              : ldexp(1024 + (bits & 0x3ff), static_cast<int>(bits >> 10 & 31) - 25);
    if ((bits & 0x7c00) != 0x7c00) wrong += h != (bits >> 15 ? -exact : exact);
    wrong += !isnan(h) && __half_as_ushort(__float2half_rn(h)) != bits;
    wrong += !isnan(b) && __bfloat16_as_ushort(__float2bfloat16(b)) != bits;
    if (bits >= 0x7bff) continue;
    const float next = __half2float(__ushort_as_half(low + 1)), middle = (h + next) / 2;
    const unsigned even = bits + (bits & 1);
    wrong += __half_as_ushort(__float2half_rn(middle)) != even;
    wrong += __half_as_ushort(__float2half_rn(nextafterf(middle, h))) != bits;
    wrong += __half_as_ushort(__float2half_rn(nextafterf(middle, next))) != bits + 1;
    const float half_way = __uint_as_float(bits << 16 | 0x8000);
    wrong += __bfloat16_as_ushort(__float2bfloat16(half_way)) != even;
    wrong += __bfloat16_as_ushort(__float2bfloat16(__uint_as_float(bits << 16 | 0x7fff))) != bits;
    wrong += __bfloat16_as_ushort(__float2bfloat16(__uint_as_float(bits << 16 | 0x8001))) != bits + 1;
  }
  wrong += __half_as_ushort(__float2half_rn(65519.996f)) != 0x7bff;
  wrong += __half_as_ushort(__float2half_rn(65520.0f)) != 0x7c00;
  wrong += __half_as_ushort(__float2half_rn(-1e30f)) != 0xfc00;
  wrong += !isnan(__half2float(__float2half_rn(NAN))) || !isnan(__bfloat162float(__float2bfloat16(NAN)));
  return wrong == 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc == 2 ? argv[1] : "";
  std::vector<float> out(32);
  int integer = 0;
  bool right = true;
  if (name == "block_sums") {
    right = check_block_sums<true, true>();
  } else if (name == "block_sums_without_first_barrier") {
    right = check_block_sums<false, true>();
  } else if (name == "block_sums_without_second_barrier") {
    right = check_block_sums<true, false>();
  } else if (name == "cluster_sum") {
    right = check_cluster_sum(true);
  } else if (name == "cluster_sum_without_last_sync") {
    right = check_cluster_sum(false);
  } else if (name == "cluster_peer_exited") {
    run({2, 32, 4, 2}, cluster_peer_exited, out.data());
  } else if (name == "cluster_peer_not_begun") {
    run({2, 32, 4, 2}, cluster_peer_not_begun, out.data());
  } else if (name == "lane_exits") {
    run({}, lane_exits);
  } else if (name == "different_collectives") {
    run({2}, different_collectives);
  } else if (name == "barrier_of_some_exited") {
    run({1, 96}, barrier_of_some_exited, &integer);
    right = integer == 1;
  } else if (name == "outside_of_mask") {
    run({1, 16}, outside_of_mask);
  } else if (name == "lanes") {
    right = check_lanes();
  } else if (name == "overrun") {
    run({1, 32, 128}, overrun, 1, out.data());
  } else if (name == "within_bounds") {
    run({1, 32, 128}, overrun, 0, out.data());
  } else if (name == "global_overrun") {
    run({1, 33}, global_overrun, out.data());
  } else if (name == "uninitialised") {
    right = check_uninitialised();
  } else if (name == "vector_load") {
    right = check_vector_load(4);
  } else if (name == "misaligned_vector_load") {
    right = check_vector_load(2);
  } else if (name == "count") {
    right = check_count();
  } else if (name == "limits") {
    right = check_limits();
  } else if (name == "halves") {
    right = check_halves();
  } else {
    return 2;
  }
  return right ? 0 : 1;
}
