// The reduction every kernel shares: the maximum of a row and the sum of the other exponentials, block by block.
//
//   sum_c exp(z_c) = exp(max) (1 + rest),  rest = sum over all classes but one of largest logit of exp(z_c - max)
//
// (max, rest) merges like any such pair; with the 1 kept out of the sum, log1p(rest) keeps its full relative
// precision when one class has nearly all the probability. Blocks are summed in T in whole vectors and merged in double.
// Included only by units compiled per instruction set.
#pragma once

#include "vector.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
struct LogSumExp {
  T max = -kInfinity<T>;
  double rest = 0;
  double weighted = 0;  // sum of exp(z_c - max) (z_c - max), where it is asked for
  int64_t argmax = 0;   // first class of largest logit; of the first NaN if there is one

  // A row without a finite maximum has no distribution: NaN, as in torch.
  bool finite() const { return max > -kInfinity<T> && max < kInfinity<T>; }
  double log_sum() const { return finite() ? std::log1p(rest) : std::numeric_limits<double>::quiet_NaN(); }
  double sum() const { return finite() ? 1 + rest : std::numeric_limits<double>::quiet_NaN(); }
  // mean of z - max under the distribution
  double mean_shifted() const { return weighted / sum(); }

  // Rescales the sums to a larger maximum; the old maximum's own exponential joins `rest`.
  void raise(T larger) {
    if (max == -kInfinity<T>) {
      rest = weighted = 0;
    } else {
      const double step = static_cast<double>(max) - larger;
      const double scale = std::exp(step);
      weighted = (weighted + step * (1 + rest)) * scale;
      rest = (1 + rest) * scale;
    }
    max = larger;
  }
};

// ---- rows: lanes along the classes; blocks padded with -inf to whole vectors ---------------------------------

template <typename T>
inline T max_of_run(const T* z, int64_t padded) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> best[4] = {Vec<T>(-kInfinity<T>), Vec<T>(-kInfinity<T>), Vec<T>(-kInfinity<T>), Vec<T>(-kInfinity<T>)};
  int64_t i = 0;
  for (; i + 4 * L <= padded; i += 4 * L)
    for (int k = 0; k < 4; k++) best[k] = at::vec::maximum(best[k], Vec<T>::loadu(z + i + k * L));
  for (; i < padded; i += L) best[0] = at::vec::maximum(best[0], Vec<T>::loadu(z + i));
  return max_lanes(at::vec::maximum(at::vec::maximum(best[0], best[1]), at::vec::maximum(best[2], best[3])));
}

// The first class that equals `value` or is NaN; there is one.
template <typename T>
inline int64_t first_of_run(const T* z, int64_t padded, T value) {
  constexpr int64_t L = kLanes<T>;
  constexpr int kNoLane = (1 << L) - 1;
  const Vec<T> wanted(value);
  for (int64_t i = 0; i < padded; i += L) {
    const Vec<T> x = Vec<T>::loadu(z + i);
    const int missed = ((x == wanted) | (x != x)).zero_mask();
    if (missed != kNoLane) return i + __builtin_ctz(~missed);
  }
  return 0;
}

// Adds exp(z - max) over [0, padded) to `rest`; with `Weighted` also exp(z - max) (z - max) to `weighted`.
template <bool Weighted, typename T>
inline void add_run(LogSumExp<T>& row, const T* z, int64_t padded) {
  constexpr int64_t L = kLanes<T>;
  const Vec<T> max(row.max);
  Vec<T> sum[4] = {Vec<T>(0), Vec<T>(0), Vec<T>(0), Vec<T>(0)};
  Vec<T> weighted[4] = {Vec<T>(0), Vec<T>(0), Vec<T>(0), Vec<T>(0)};
  const auto add = [&](int k, int64_t i) {
    const Vec<T> d = Vec<T>::loadu(z + i) - max;
    const Vec<T> e = exp_nonpositive(d);
    sum[k] = sum[k] + e;
    if constexpr (Weighted) weighted[k] = weighted[k] + multiply_or_zero(e, d);
  };
  int64_t i = 0;
  for (; i + 4 * L <= padded; i += 4 * L)
    for (int k = 0; k < 4; k++) add(k, i + k * L);
  for (; i < padded; i += L) add(0, i);
  row.rest += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if constexpr (Weighted) row.weighted += sum_lanes((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
}

// Merges classes [first, first + padded) of a row.
template <bool Weighted, typename T>
inline void add_block(LogSumExp<T>& row, const T* z, int64_t padded, int64_t first) {
  constexpr int64_t L = kLanes<T>;
  if (std::isnan(row.max)) return;
  const T block_max = max_of_run(z, padded);
  if (block_max == -kInfinity<T>) return;
  if (block_max <= row.max) {
    add_run<Weighted>(row, z, padded);
    return;
  }
  const int64_t k = first_of_run(z, padded, block_max);
  row.raise(block_max);
  row.argmax = first + k;
  // Around the vector of the maximum, whose own exponential is the 1 outside `rest`.
  const int64_t v = k / L * L;
  alignas(64) T others[kLanes<T>];
  std::memcpy(others, z + v, sizeof(others));
  others[k - v] = -kInfinity<T>;
  add_run<Weighted>(row, z, v);
  add_run<Weighted>(row, others, L);
  add_run<Weighted>(row, z + v + L, padded - v - L);
}

// ---- columns: a tile [classes, stride] with one row per lane ---------------------------------------------------

// One vector of rows, rows[0, lanes): merges `classes` classes, each at z + c * stride.
template <bool Weighted, typename T>
inline void add_column_vector(LogSumExp<T>* rows, const T* z, int64_t stride, int64_t classes, int64_t first) {
  constexpr int64_t L = kLanes<T>;
  alignas(64) T old_max[L], new_max[L], sum[L], weighted[L], ties[L], where[L];
  for (int64_t r = 0; r < L; r++) old_max[r] = rows[r].max;
  const Vec<T> previous = Vec<T>::loadu(old_max);
  const Vec<T> infinity(kInfinity<T>), zero(0), one(1);

  Vec<T> max = previous, at(-1);
  for (int64_t c = 0; c < classes; c++) {
    const Vec<T> x = Vec<T>::loadu(z + c * stride);
    if constexpr (Weighted) {  // the statistics want the class too: x > max, or x NaN and max not yet
      const Vec<T> later = (x > max) | ((x != x) & (max == max));
      at = Vec<T>::blendv(at, Vec<T>(static_cast<T>(c)), later);
    }
    max = at::vec::maximum(max, x);
  }
  const Vec<T> shift = Vec<T>::blendv(max, zero, max == zero - infinity);  // a row of -inf so far: exp(-inf) = 0
  Vec<T> s(0), w(0), n(0);
  for (int64_t c = 0; c < classes; c++) {
    const Vec<T> x = Vec<T>::loadu(z + c * stride);
    const Vec<T> d = x - shift;
    const Vec<T> tie = x == max;
    const Vec<T> e = exp_nonpositive(d);
    s = s + Vec<T>::blendv(e, zero, tie);
    n = n + Vec<T>::blendv(zero, one, tie);
    if constexpr (Weighted) w = w + multiply_or_zero(e, d);
  }
  max.store(new_max);
  s.store(sum);
  w.store(weighted);
  n.store(ties);
  at.store(where);
  for (int64_t r = 0; r < L; r++) {
    LogSumExp<T>& row = rows[r];
    double count = ties[r];
    if (!(new_max[r] == old_max[r])) {
      row.raise(new_max[r]);
      count -= 1;
    }
    row.rest += sum[r] + count;
    if constexpr (Weighted) {
      row.weighted += weighted[r];
      if (where[r] >= 0) row.argmax = first + static_cast<int64_t>(where[r]);
    }
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
