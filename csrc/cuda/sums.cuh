// What the reduction over a row's classes collects. The values merge in any grouping to the same mathematics, and two
// of them to the same bits both ways round.
//
//   sum_c exp(z_c) = exp(max) (ties + below)
//
// where `ties` counts the maximal classes. rest = below + (ties - 1) gives the row's state (params.h).
#pragma once

#include "device.cuh"

namespace softmax_ext {
namespace cuda {

template <typename T>
struct LogSumExp {
  T max = -infinity<T>();
  T below = 0;  // sum of exp(z_c - max) over z_c < max; NaN if any logit is
  T ties = 0;   // classes with z_c = max

  // What z is taken relative to: the maximum, or 0 before there is one.
  __device__ __forceinline__ T shift() const { return max == -infinity<T>() ? T(0) : max; }

  // Scales the sums to a maximum that is no smaller; returns the factor.
  __device__ __forceinline__ T raise(T larger_max) {
    if (larger_max == max) return 1;
    const T scale = exp_nonpositive<T>(max - larger_max);
    below = scale * (below + ties);
    ties = 0;
    max = larger_max;
    return scale;
  }

  // z = max + d, e = exp(d).
  __device__ __forceinline__ void add(T z, T e) {
    const bool tie = z == max;
    below += tie ? T(0) : e;
    ties += tie ? T(1) : T(0);
  }

  // The sum over all classes but one; NaN for a row without a finite maximum, which has no distribution.
  __device__ __forceinline__ T rest() const {
    return max > -infinity<T>() && max < infinity<T>() ? below + (ties - 1) : not_a_number<T>();
  }

  // Of the same maximum.
  __device__ __forceinline__ void join(const LogSumExp& other) {
    below += other.below;
    ties += other.ties;
  }

  __device__ __forceinline__ void merge(LogSumExp other) {
    const T common = larger(max, other.max);
    raise(common);
    other.raise(common);
    join(other);
  }
};

// The same with the sums that statistics, smoothing and probability targets need, all of d = z - shift.
template <typename T>
struct RowSums : LogSumExp<T> {
  T weighted = 0;  // sum of exp(d) d
  T dot = 0;       // sum of b_c d
  T b_sum = 0;
  T q_dot = 0;  // sum of q_c d
  T q_sum = 0;
  int argmax = kNowhere;     // first class of largest logit
  int first_nan = kNowhere;  // first class whose logit is NaN

  static constexpr int kNowhere = INT32_MAX;

  __device__ __forceinline__ T raise(T larger_max) {
    if (larger_max == this->max) return 1;
    const bool was_finite = this->max > -infinity<T>();
    const T step = was_finite ? this->max - larger_max : T(0), mass = this->below + this->ties;
    const T scale = LogSumExp<T>::raise(larger_max);
    weighted = was_finite ? multiply_or_zero(scale, weighted + step * mass) : T(0);
    dot += b_sum * step;
    q_dot += q_sum * step;
    argmax = kNowhere;
    return scale;
  }

  // 0 where there is no class.
  __device__ __forceinline__ int prediction() const {
    return first_nan != kNowhere ? first_nan : argmax != kNowhere ? argmax : 0;
  }

  __device__ __forceinline__ void join(const RowSums& other) {
    LogSumExp<T>::join(other);
    weighted += other.weighted;
    dot += other.dot;
    b_sum += other.b_sum;
    q_dot += other.q_dot;
    q_sum += other.q_sum;
    argmax = min(argmax, other.argmax);
    first_nan = min(first_nan, other.first_nan);
  }

  __device__ __forceinline__ void merge(RowSums other) {
    const T common = larger(this->max, other.max);
    raise(common);
    other.raise(common);
    join(other);
  }
};

// One plain sum.
template <typename T>
struct Sum {
  T total = 0;
  __device__ __forceinline__ void join(const Sum& other) { total += other.total; }
  __device__ __forceinline__ void merge(const Sum& other) { join(other); }
};

}  // namespace cuda
}  // namespace softmax_ext
