// What the kernels collect over the classes of a row, relative to a maximum, which they hold beside it.
//
// All exponentials are added, that of the largest logit too, which is 1: it costs nothing for each class. So the state's
// `rest` (params.h) is the sum less 1. Where one class has more than two thirds of the mass, that difference would
// cancel: there the kernels add up once more what the thread with the largest logit had, without that logit. So rest
// has its full relative precision wherever it is small.
#pragma once

#include "group.cuh"

namespace softmax_ext {
namespace cuda {

template <typename T>
struct ExpSum {
  T sum = 0;  // of exp(z_c - max); NaN if any logit is NaN or +inf, 0 if all are -inf

  // To a maximum that is larger by -step.
  DEVICE void lower(T step) { sum *= exp_nonpositive(step); }
  DEVICE void merge(const ExpSum& other) { sum += other.sum; }
};

// Whether rest is to be summed without the largest logit. No other class can be as large then.
template <typename T>
DEVICE bool is_peaked(T sum) {
  return sum >= 1 && sum < T(1.5);
}

// NaN for a row without a finite maximum, which has no distribution.
template <typename T>
DEVICE T rest_of(T sum) {
  return sum == 0 ? not_a_number<T>() : sum - 1;
}

// With the sums that statistics, smoothing and probability targets need, all of d = z - max.
template <typename T>
struct RowSums : ExpSum<T> {
  T weighted = 0;  // sum of exp(d) d
  T dot = 0;       // sum of b_c d
  T b_sum = 0;
  T q_dot = 0;  // sum of q_c d
  T q_sum = 0;

  DEVICE void lower(T step) {
    if (step == 0) return;
    const T finite_step = larger(step, lowest<T>()), scale = exp_nonpositive(step);
    weighted = multiply_or_zero(scale, weighted + finite_step * this->sum);
    this->sum *= scale;
    dot += b_sum * finite_step;
    q_dot += q_sum * finite_step;
  }
  DEVICE void merge(const RowSums& other) {
    ExpSum<T>::merge(other);
    weighted += other.weighted;
    dot += other.dot;
    b_sum += other.b_sum;
    q_dot += other.q_dot;
    q_sum += other.q_sum;
  }
};

// Of a row, when all threads have merged theirs.
template <typename T>
struct Outcome {
  T max = 0, rest = 0;
  // Where it is asked for, the first class of largest logit; or -1 less the first whose logit is NaN.
  int64_t prediction = 0;
};

}  // namespace cuda
}  // namespace softmax_ext
