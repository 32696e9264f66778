// What runs over the rows once besides the kernels of their classes: sums of losses and weights in double, in an order
// that depends on the sizes alone, and the search for a class out of range.
#include <algorithm>

#include "group.cuh"
#include "launch.h"
#include "sums.cuh"

namespace softmax_ext {
namespace cuda {

// Not without a name: nvcc would name it after the folder, and the library would have other bytes in another.
inline namespace sums_cu {

constexpr int kThreads = 512;
constexpr int64_t kElementsEach = 16;  // that a thread adds before more blocks, and a second kernel, pay
constexpr int kAtOnce = 8;             // elements that are loaded before the first is added

// ---- sums --------------------------------------------------------------------------------------------------------

// Losses and weights are summed together, so that a mean takes one kernel. Either may be 0 throughout.
struct Totals {
  double loss = 0, weight = 0;
  __device__ __forceinline__ void merge(const Totals& other) {
    loss += other.loss;
    weight += other.weight;
  }
};
static_assert(sizeof(Totals) * kMostShares == sizeof(double) * kSumScratch, "what the sums ask their caller for");

// What is summed, as functions of the element's number.

template <typename T>
struct Weights {
  const T* weight;
  __device__ Totals operator()(int64_t c) const { return {0, static_cast<double>(weight[c])}; }
};

// weight[target], 1 without weights or with probabilities; 0 of a class out of range, whose row is NaN anyway.
template <typename T>
struct TargetWeights {
  const int64_t* index;
  const uint8_t* index_u8;
  const T* weight;
  int64_t classes, ignore_index;

  explicit TargetWeights(const CrossEntropyParams<T>& params, int64_t classes)
      : index(params.index),
        index_u8(params.index_u8),
        weight(params.weight),
        classes(classes),
        ignore_index(params.options.ignore_index) {}

  __device__ Totals operator()(int64_t row) const {
    if (!index && !index_u8) return {0, classes > 0 ? 1.0 : 0.0};
    const int64_t y = index ? index[row] : index_u8[row];
    if (y == ignore_index || static_cast<uint64_t>(y) >= static_cast<uint64_t>(classes)) return {};
    return {0, weight ? static_cast<double>(weight[y]) : 1};
  }
};

template <typename T>
struct Losses {
  const T* loss;
  __device__ Totals operator()(int64_t row) const { return {static_cast<double>(loss[row]), 0}; }
};

template <typename T>
struct LossesAndTargetWeights {
  const T* loss;
  TargetWeights<T> weights;
  __device__ Totals operator()(int64_t row) const { return {static_cast<double>(loss[row]), weights(row).weight}; }
};

struct Shares {
  const Totals* shares;
  __device__ Totals operator()(int64_t i) const { return shares[i]; }
};

// Where the totals go: *weight, unless that is null, and the loss, unless that is null, divided by *divisor or, where
// `divides` says so, by the weight.
struct Results {
  double* weight = nullptr;
  void* loss = nullptr;
  DType loss_type = DType::kFloat64;
  const double* divisor = nullptr;
  bool divides = false;

  __device__ void take(const Totals& totals) const {
    if (weight) *weight = totals.weight;
    if (loss) store_value(totals.loss / (divisor ? *divisor : divides ? totals.weight : 1), loss, loss_type, 0);
  }
};

// The sum of value(first), value(first + step), ..., over a block's threads. The elements are loaded a few at a time,
// and past the end the last one again: a branch for each would make each load wait for the one before.
template <typename Value>
__device__ __forceinline__ Totals sum_strided(const Value& value, int64_t first, int64_t step, int64_t n) {
  Totals totals;
  for (int64_t i = first; i < n; i += kAtOnce * step) {
    Totals each[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) each[k] = value(min(i + k * step, n - 1));
#pragma unroll
    for (int k = 0; k < kAtOnce; k++)
      if (i + k * step < n) totals.merge(each[k]);
  }
  reduce_block(totals, shared_memory<Totals>());
  return totals;
}

// shares[block] = the sum over the block's share.
template <typename Value>
__global__ void __launch_bounds__(kThreads, 1) sum_shares(const Value value, int64_t n, Totals* shares) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const Totals totals = sum_strided(value, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, step, n);
  if (threadIdx.x == 0) shares[blockIdx.x] = totals;
}

// The whole sum, by one block.
template <typename Value>
__global__ void __launch_bounds__(kThreads, 1) sum_all(const Value value, int64_t n, const Results results) {
  const Totals totals = sum_strided(value, threadIdx.x, kThreads, n);
  if (threadIdx.x == 0) results.take(totals);
}

template <typename Value>
void sum(const char* name, const Value& value, int64_t n, const Results& results, double* scratch,
         cudaStream_t stream) {
  constexpr int kShared = shared_bytes<Totals>(Scope::kBlock);
  const Grid one{1, kThreads, 1, kShared};
  if (n <= kThreads * kElementsEach) return launch(name, sum_all<Value>, one, stream, value, n, results);
  const int64_t blocks = std::min(n / (kThreads * kElementsEach), kMostShares);
  Totals* const shares = reinterpret_cast<Totals*>(scratch);
  launch(name, sum_shares<Value>, {blocks, kThreads, 1, kShared}, stream, value, n, shares);
  launch(name, sum_all<Shares>, one, stream, Shares{shares}, blocks, results);
}

// ---- classes out of range ------------------------------------------------------------------------------------------

__global__ void set_first(int64_t* first, int64_t rows) { *first = rows; }

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
  Results results;
  results.weight = total;
  sum("sum_weights", Weights<T>{weight}, n, results, scratch, stream);
}

template <typename T>
void sum_targets(const CrossEntropyParams<T>& params, int64_t classes, double* total, double* scratch, Stream stream) {
  Results results;
  results.weight = total;
  sum("sum_targets", TargetWeights<T>(params, classes), params.rows, results, scratch, stream);
}

template <typename T>
void sum_losses(const CrossEntropyParams<T>& params, int64_t classes, const LossSum& to, double* scratch,
                Stream stream) {
  const Losses<T> losses{static_cast<const T*>(params.loss)};
  Results results;
  results.loss = to.loss;
  results.loss_type = to.loss_type;
  if (to.mean && !to.has_denominator) {
    results.weight = to.denominator;
    results.divides = true;
    return sum("sum_losses", LossesAndTargetWeights<T>{losses.loss, TargetWeights<T>(params, classes)}, params.rows,
               results, scratch, stream);
  }
  if (to.mean) results.divisor = to.denominator;
  sum("sum_losses", losses, params.rows, results, scratch, stream);
}

template <typename T>
void find_bad_class(const CrossEntropyParams<T>& params, int64_t classes, int64_t* first, Stream stream) {
  launch("set_first", set_first, {1, 1}, stream, first, params.rows);
  if (params.rows == 0) return;
  launch("find_first", find_first, {(params.rows + kThreads - 1) / kThreads, kThreads}, stream, params.index,
         params.index_u8, params.rows, classes, params.options.ignore_index, first);
}

#define SOFTMAX_EXT_SUMS_OF(T)                                                                      \
  template void sum_weights(const T*, int64_t, double*, double*, Stream);                           \
  template void sum_targets(const CrossEntropyParams<T>&, int64_t, double*, double*, Stream);       \
  template void sum_losses(const CrossEntropyParams<T>&, int64_t, const LossSum&, double*, Stream); \
  template void find_bad_class(const CrossEntropyParams<T>&, int64_t, int64_t*, Stream);

SOFTMAX_EXT_SUMS_OF(float)
SOFTMAX_EXT_SUMS_OF(double)

const char* compiled_architectures() { return SOFTMAX_EXT_CUDA_ARCHITECTURES; }

}  // namespace cuda
}  // namespace softmax_ext
