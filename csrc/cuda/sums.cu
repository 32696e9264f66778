// What runs over the rows once besides the kernels of their classes: sums of losses and weights in double, in an order that
// depends on the sizes alone, and the search for a class out of range.
#include <algorithm>
#include <type_traits>

#include "group.cuh"
#include "launch.h"
#include "sums.cuh"

namespace softmax_ext {
namespace cuda {

namespace {

constexpr int kThreads = 512;
constexpr int64_t kElementsEach = 16;  // that a thread adds before more blocks, and a second kernel, pay

// ---- sums --------------------------------------------------------------------------------------------------------

struct TypedArray {
  const void* data;
  DType type;
  __device__ double operator()(int64_t i) const { return load_value<double>(data, type, i); }
};

template <typename T>
struct TargetWeights {
  const int64_t* index;
  const uint8_t* index_u8;
  const T* weight;
  int64_t classes, ignore_index;
  // 0 for a class out of range, whose row is NaN anyway.
  __device__ double operator()(int64_t row) const {
    const int64_t y = index ? index[row] : index_u8[row];
    if (y == ignore_index || static_cast<uint64_t>(y) >= static_cast<uint64_t>(classes)) return 0;
    return weight ? static_cast<double>(weight[y]) : 1;
  }
};

// partial[block] = sum of value(i) over the block's share.
template <typename Value>
__global__ void __launch_bounds__(kThreads) sum_shares(Value value, int64_t n, double* partial) {
  Sum<double> sum;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) sum.total += value(i);
  reduce_block(sum, shared_memory<Sum<double>>());
  if (threadIdx.x == 0) partial[blockIdx.x] = sum.total;
}

// *out = sum of value(i) / *divisor, by one block.
template <typename Value>
__global__ void __launch_bounds__(kThreads)
    sum_all(Value value, int64_t n, const double* divisor, void* out, DType out_type) {
  Sum<double> sum;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum.total += value(i);
  reduce_block(sum, shared_memory<Sum<double>>());
  if (threadIdx.x == 0) store_value(divisor ? sum.total / *divisor : sum.total, out, out_type, 0);
}

template <typename Value>
void sum(const char* name, const Value& value, int64_t n, const double* divisor, void* out, DType out_type,
         double* scratch, cudaStream_t stream) {
  constexpr int kShared = shared_bytes<Sum<double>>(Scope::kBlock);
  const Grid one{1, kThreads, 1, kShared};
  if (n <= kThreads * kElementsEach) return launch(name, sum_all<Value>, one, stream, value, n, divisor, out, out_type);
  const int64_t blocks = std::min(n / (kThreads * kElementsEach), kSumScratch);
  launch(name, sum_shares<Value>, {blocks, kThreads, 1, kShared}, stream, value, n, scratch);
  launch(name, sum_all<TypedArray>, one, stream, TypedArray{scratch, DType::kFloat64}, blocks, divisor, out, out_type);
}

DType arithmetic_type(bool is_double) { return is_double ? DType::kFloat64 : DType::kFloat32; }

template <typename T>
void sum_targets_as(const CrossEntropy& call, int64_t classes, double* total, double* scratch, Stream stream) {
  const TargetWeights<T> weights{call.index, call.index_u8, static_cast<const T*>(call.weight), classes,
                                 call.ignore_index};
  sum("sum_targets", weights, call.rows, nullptr, total, DType::kFloat64, scratch, stream);
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

}  // namespace

void sum_weights(const void* weight, bool is_double, int64_t n, double* total, double* scratch, Stream stream) {
  sum("sum_weights", TypedArray{weight, arithmetic_type(is_double)}, n, nullptr, total, DType::kFloat64, scratch,
      stream);
}

void sum_targets(const CrossEntropy& call, int64_t classes, double* total, double* scratch, Stream stream) {
  if (call.is_double)
    sum_targets_as<double>(call, classes, total, scratch, stream);
  else
    sum_targets_as<float>(call, classes, total, scratch, stream);
}

void sum_losses(const void* losses, bool is_double, int64_t n, const double* divisor, void* out, DType out_type,
                double* scratch, Stream stream) {
  sum("sum_losses", TypedArray{losses, arithmetic_type(is_double)}, n, divisor, out, out_type, scratch, stream);
}

void find_bad_class(const CrossEntropy& call, int64_t classes, int64_t* first, Stream stream) {
  launch("set_first", set_first, {1, 1}, stream, first, call.rows);
  if (call.rows == 0) return;
  launch("find_first", find_first, {(call.rows + kThreads - 1) / kThreads, kThreads}, stream, call.index, call.index_u8,
         call.rows, classes, call.ignore_index, first);
}

const char* compiled_architectures() { return SOFTMAX_EXT_CUDA_ARCHITECTURES; }

}  // namespace cuda
}  // namespace softmax_ext
