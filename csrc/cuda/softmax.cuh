// Softmax, log-softmax and their backward as Ops of the row kernels (formulas: docs/math.md; Op: rows.cuh).
#pragma once

#include "rows.cuh"

namespace softmax_ext {
namespace cuda {

template <typename S, typename O>
struct SoftmaxOp : SimpleOp<std::conditional_t<sizeof(O) == 8, double, float>> {
  using In = S;
  using Out = O;
  using T = std::conditional_t<sizeof(O) == 8, double, float>;
  using Sums = LogSumExp<T>;
  using typename SimpleOp<T>::Context;
  static constexpr int kInputs = 1, kOutputOperand = kSoftmaxOutput;
  static constexpr bool kMaximum = true;
  static constexpr int kTwoPassChunks = sizeof(T) == 8 ? 1 : 4 / kInputs;
  static constexpr ColumnShape kColumns = sizeof(T) == 8 ? ColumnShape{8, 8} : ColumnShape{16, 16};
  static constexpr int kRegisterChunks = sizeof(T) == 8 ? 0 : 8;  // what 64 registers hold

  struct Coefficients {
    T max, log_sum, inverse_sum;
  };

  DeviceLayout layout;
  SoftmaxParams params;

  __device__ __forceinline__ static int input_operand(int) { return kSoftmaxInput; }
  __device__ __forceinline__ const S* input(int, const Position& at) const {
    return static_cast<const S*>(params.input) + at.offset[kSoftmaxInput];
  }
  __device__ __forceinline__ O* output(const Position& at) const {
    return static_cast<O*>(params.output) + at.offset[kSoftmaxOutput];
  }
  __device__ __forceinline__ T logit(const Elements<SoftmaxOp>& x) const { return x.of[0]; }
  __device__ __forceinline__ void add(Sums& sums, const Context&, const Elements<SoftmaxOp>& x, int) const {
    sums.add(x.of[0], exp_nonpositive<O>(x.of[0] - sums.shift()));
  }
  __device__ __forceinline__ Coefficients finish(const Context&, const Sums& sums, bool) const {
    const T rest = sums.rest();
    return {sums.max, params.log ? log1p_of(rest) : rest, divide(T(1), 1 + rest)};
  }
  __device__ __forceinline__ T value(const Context&, const Coefficients& k, const Elements<SoftmaxOp>& x, int) const {
    const T d = x.of[0] - k.max;
    return params.log ? d - k.log_sum : exp_nonpositive<O>(d) * k.inverse_sum;
  }
};

// Inputs: the saved output and its upstream gradient, of type S; O is the type of the gradient written.
template <typename S, typename O>
struct SoftmaxBackwardOp : SimpleOp<std::conditional_t<sizeof(S) == 8, double, float>> {
  using In = S;
  using Out = O;
  using T = std::conditional_t<sizeof(S) == 8, double, float>;
  using Sums = Sum<T>;
  using typename SimpleOp<T>::Context;
  static constexpr int kInputs = 2, kOutputOperand = kSoftmaxInput;
  static constexpr bool kMaximum = false;
  static constexpr int kTwoPassChunks = sizeof(T) == 8 ? 1 : 4 / kInputs;
  static constexpr ColumnShape kColumns = sizeof(T) == 8 ? ColumnShape{4, 8} : ColumnShape{8, 16};
  static constexpr int kRegisterChunks = sizeof(T) == 8 ? 0 : 4;

  struct Coefficients {
    T total;
  };

  DeviceLayout layout;
  SoftmaxBackwardParams params;

  __device__ __forceinline__ static int input_operand(int i) { return i == 0 ? kSoftmaxOutput : kSoftmaxGrad; }
  __device__ __forceinline__ const S* input(int i, const Position& at) const {
    return static_cast<const S*>(i == 0 ? params.output : params.grad_output) + at.offset[input_operand(i)];
  }
  __device__ __forceinline__ O* output(const Position& at) const {
    return static_cast<O*>(params.grad_input) + at.offset[kSoftmaxInput];
  }
  __device__ __forceinline__ void add(Sums& sums, const Context&, const Elements<SoftmaxBackwardOp>& x, int) const {
    sums.total += params.log ? x.of[1] : x.of[1] * x.of[0];
  }
  __device__ __forceinline__ Coefficients finish(const Context&, const Sums& sums, bool) const { return {sums.total}; }
  __device__ __forceinline__ T value(const Context&, const Coefficients& k, const Elements<SoftmaxBackwardOp>& x,
                                     int) const {
    return params.log ? x.of[1] - exp_nonpositive<O>(x.of[0]) * k.total : x.of[0] * (x.of[1] - k.total);
  }
};

}  // namespace cuda
}  // namespace softmax_ext
