// What runs over the rows once besides the kernels of their classes: sums of weights in double, in an order that depends
// on the sizes alone, and the search for a class out of range.
#include <algorithm>

#include "group.cuh"
#include "launch.h"

namespace softmax_ext {
namespace cuda {

// Not without a name: nvcc would name it after the folder, and the library would have other bytes in another.
inline namespace sums_cu {

constexpr int kThreads = 512;
constexpr int64_t kElementsEach = 16;  // that a thread adds before more blocks, and a second kernel, pay
constexpr int kAtOnce = 8;             // elements that are loaded before the first is added

template <typename T>
struct Weights {
  const T* weight;
  __device__ double operator()(int64_t c) const { return static_cast<double>(weight[c]); }
};

// weight[target], 1 without weights or with probabilities, times the row's own weight; 0 of a class out of range, whose
// row is NaN anyway.
template <typename T>
struct TargetWeights {
  const int64_t* index;
  const uint8_t* index_u8;
  const T* weight;
  int64_t classes, ignore_index;
  const T* row_weight;

  __device__ double own(int64_t row) const { return row_weight ? static_cast<double>(row_weight[row]) : 1; }
  __device__ double operator()(int64_t row) const {
    if (!index && !index_u8) return classes > 0 ? own(row) : 0;
    const int64_t y = index ? index[row] : index_u8[row];
    if (y == ignore_index || static_cast<uint64_t>(y) >= static_cast<uint64_t>(classes)) return 0;
    return own(row) * (weight ? static_cast<double>(weight[y]) : 1);
  }
};

// to[block] = the sum over the block's share. The elements are loaded a few at a time, and past the end the last one
// again: a branch for each would make each load wait for the one before.
template <typename Value>
__global__ void __launch_bounds__(kThreads, 1) sum_shares(const Value value, int64_t n, double* to) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  Sum<double> total;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += kAtOnce * step) {
    double each[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) each[k] = value(min(i + k * step, n - 1));
#pragma unroll
    for (int k = 0; k < kAtOnce; k++)
      if (i + k * step < n) total.value += each[k];
  }
  reduce_block(total, shared_memory<Sum<double>>());
  if (threadIdx.x == 0) to[blockIdx.x] = total.value;
}

template <typename Value>
void sum(const char* name, const Value& value, int64_t n, double* to, double* scratch, cudaStream_t stream) {
  constexpr int kShared = sizeof(Sum<double>) * kWarp;
  const int64_t blocks = std::clamp<int64_t>(n / (kThreads * kElementsEach), 1, kMostShares);
  launch(name, sum_shares<Value>, {blocks, kThreads, 1, kShared}, stream, value, n, blocks == 1 ? to : scratch);
  if (blocks > 1)
    launch(name, sum_shares<Weights<double>>, {1, kThreads, 1, kShared}, stream, Weights<double>{scratch}, blocks, to);
}

__global__ void divide_sums(double* total) { total[1] = z_factor_of(total[0], total[1]); }

__global__ void write_empty_sum(const LossSum to) {
  store_value(0 / (to.mean ? *to.denominator : 1), to.loss, to.loss_type, 0);
}

// ---- classes out of range ------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) find_first(const int64_t* index, const uint8_t* index_u8, int64_t rows,
                                                       int64_t classes, int64_t ignore_index, int64_t* first) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  const int64_t y = index ? index[row] : index_u8[row];
  if (y != ignore_index && static_cast<uint64_t>(y) >= static_cast<uint64_t>(classes))
    atomicMin(reinterpret_cast<long long*>(first), static_cast<long long>(row));
}

}  // namespace sums_cu

template <typename T>
void sum_weights(const T* weight, int64_t n, double* total, double* scratch, Stream stream) {
  sum("sum_weights", Weights<T>{weight}, n, total, scratch, stream);
}

template <typename T>
void sum_targets(const CrossEntropyParams<T>& params, int64_t classes, double* total, double* scratch, Stream stream) {
  const TargetWeights<T> weights{params.index,     params.index_u8, params.weight, classes, params.options.ignore_index,
                                 params.row_weight};
  sum("sum_targets", weights, params.rows, total, scratch, stream);
}

void set_z_factor(double* total, Stream stream) { launch("divide_sums", divide_sums, {1, 1}, stream, total); }

void sum_no_losses(const LossSum& to, Stream stream) { launch("write_empty_sum", write_empty_sum, {1, 1}, stream, to); }

template <typename T>
void find_bad_class(const CrossEntropyParams<T>& params, int64_t classes, int64_t* first, Stream stream) {
  check(cudaMemsetAsync(first, 0x7f, sizeof *first, stream), "cudaMemsetAsync");
  if (params.rows == 0) return;
  launch("find_first", find_first, {(params.rows + kThreads - 1) / kThreads, kThreads}, stream, params.index,
         params.index_u8, params.rows, classes, params.options.ignore_index, first);
}

#define SOFTMAX_EXT_SUMS_OF(T)                                                                \
  template void sum_weights(const T*, int64_t, double*, double*, Stream);                     \
  template void sum_targets(const CrossEntropyParams<T>&, int64_t, double*, double*, Stream); \
  template void find_bad_class(const CrossEntropyParams<T>&, int64_t, int64_t*, Stream);

SOFTMAX_EXT_SUMS_OF(float)
SOFTMAX_EXT_SUMS_OF(double)

const char* compiled_architectures() { return SOFTMAX_EXT_CUDA_ARCHITECTURES; }

}  // namespace cuda
}  // namespace softmax_ext
