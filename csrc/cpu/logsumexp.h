// The reduction that every kernel shares: a row's state (params.h), block by block. A block is summed in T in whole
// vectors and merged in double. Its exponentials can be stored on the way. Included only by units compiled per
// instruction set.
#pragma once

#include <array>

#include "tile_io.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <typename T>
struct LogSumExp {
  T max = -kInfinity<T>;
  LongSum<T> rest;      // NaN if any logit so far was
  double weighted = 0;  // sum of exp(z_c - max) (z_c - max), where it is asked for
  int64_t argmax = 0;   // first class of largest logit; where `weighted` is asked for, of the first NaN if there is one

  // A row without a finite maximum has no distribution: NaN, as in torch.
  double rest_or_nan() const { return max > -kInfinity<T> && max < kInfinity<T> ? rest.value() : kNaN; }

  // Rescales the sums to a larger maximum; the old maximum's own exponential joins `rest`.
  void raise(T larger) {
    if (max == -kInfinity<T>) {
      rest = {std::isnan(rest.sum) ? kNaN : 0};
      weighted = 0;
    } else {
      const double step = static_cast<double>(max) - larger;
      const double scale = std::exp(step);
      weighted = (weighted + step * (1 + rest.value())) * scale;
      rest = {(1 + rest.value()) * scale};
    }
    max = larger;
  }
};

// The same of up to kTile rows.
template <typename T>
struct BatchSums {
  alignas(64) T max[kTile];
  alignas(64) double rest[kTile];
  alignas(64) double lost[kTile];
  alignas(64) double weighted[kTile];
  int64_t argmax[kTile];

  LogSumExp<T> get(int64_t r) const { return {max[r], {rest[r], lost[r]}, weighted[r], argmax[r]}; }
  void set(int64_t r, const LogSumExp<T>& row) {
    max[r] = row.max;
    rest[r] = row.rest.sum;
    lost[r] = row.rest.lost;
    weighted[r] = row.weighted;
    argmax[r] = row.argmax;
  }
};

// ---- rows: lanes along the classes; blocks padded with -inf to whole vectors ---------------------------------

// The maximum of a run; with NanWins NaN if there is one, else NaN are passed over.
template <bool NanWins, typename T>
inline T max_of_run(const T* z, int64_t padded) {
  constexpr int64_t L = kLanes<T>;
  const auto greater = [](const Vec<T>& best, const Vec<T>& x) {
    if constexpr (NanWins) return at::vec::maximum(best, x);
    return larger(best, x);
  };
  Vec<T> best[4] = {Vec<T>(-kInfinity<T>), Vec<T>(-kInfinity<T>), Vec<T>(-kInfinity<T>), Vec<T>(-kInfinity<T>)};
  int64_t i = 0;
  for (; i + 4 * L <= padded; i += 4 * L)
    for (int k = 0; k < 4; k++) best[k] = greater(best[k], Vec<T>::loadu(z + i + k * L));
  for (; i < padded; i += L) best[0] = greater(best[0], Vec<T>::loadu(z + i));
  const Vec<T> greatest = greater(greater(best[0], best[1]), greater(best[2], best[3]));
  return NanWins ? max_lanes(greatest) : max_number(greatest);
}

// The first class whose bit is set in lanes(vector); -1 if there is none.
template <typename T, typename Lanes>
inline int64_t first_of_run(const T* z, int64_t padded, const Lanes& lanes) {
  constexpr int64_t L = kLanes<T>;
  const auto lanes_at = [&](int64_t i) { return lanes(Vec<T>::loadu(z + i)); };
  int64_t i = 0;
  for (; i + 4 * L <= padded; i += 4 * L)
    if (lanes_at(i) | lanes_at(i + L) | lanes_at(i + 2 * L) | lanes_at(i + 3 * L)) break;
  for (; i < padded; i += L)
    if (const int found = lanes_at(i)) return i + __builtin_ctz(found);
  return -1;
}

// Brings row.max up to the classes [first, first + padded) of a row. Where they raise it, the position in z of a
// maximal class, whose own exponential is the 1 outside `rest`; -1 elsewhere. With Weighted the first one, or the first
// NaN.
template <bool Weighted, typename T>
inline int64_t follow_max(LogSumExp<T>& row, const T* z, int64_t padded, int64_t first) {
  const auto is_nan = [](const Vec<T>& x) { return nan_lanes(x); };
  if (std::isnan(row.max)) return -1;
  const T block_max = max_of_run<Weighted>(z, padded);
  if (block_max == -kInfinity<T>) {
    if (row.max == block_max && first_of_run(z, padded, is_nan) >= 0) row.rest.sum = kNaN;
    return -1;
  }
  if (block_max <= row.max) return -1;
  const int64_t k = std::isnan(block_max)
                        ? first_of_run(z, padded, is_nan)
                        : first_of_run(z, padded, [&](const Vec<T>& x) { return equal_lanes(x, Vec<T>(block_max)); });
  row.raise(block_max);
  row.argmax = first + k;
  return k;
}

// Adds exp(z - max) over [0, padded) to `rest`; with `Weighted` also exp(z - max) (z - max) to `weighted`; with
// `StoreExps` writes the exponentials to `exps`, which may be z.
template <bool Weighted, bool StoreExps, typename T>
inline void add_run(LogSumExp<T>& row, const T* z, int64_t padded, T* exps, const Ahead& ahead) {
  constexpr int64_t L = kLanes<T>;
  const Vec<T> max(row.max);
  Vec<T> sum[4] = {Vec<T>(0), Vec<T>(0), Vec<T>(0), Vec<T>(0)};
  Vec<T> weighted[4] = {Vec<T>(0), Vec<T>(0), Vec<T>(0), Vec<T>(0)};
  const auto add = [&](int k, int64_t i) {
    ahead.fetch(i / L);
    const Vec<T> d = Vec<T>::loadu(z + i) - max;
    const Vec<T> e = exp_nonpositive(d);
    sum[k] = sum[k] + e;
    if constexpr (Weighted) weighted[k] = weighted[k] + multiply_or_zero(e, d);
    if constexpr (StoreExps) e.store(exps + i);
  };
  int64_t i = 0;
  for (; i + 4 * L <= padded; i += 4 * L)
    for (int k = 0; k < 4; k++) add(k, i + k * L);
  for (; i < padded; i += L) add(0, i);
  row.rest.add(sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])));
  if constexpr (Weighted) row.weighted += sum_lanes((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
}

// Adds the exponentials of a block to the sums, without that of class `excluded` if not -1 (follow_max).
template <bool Weighted, bool StoreExps, typename T>
inline void add_block(LogSumExp<T>& row, const T* z, int64_t padded, int64_t excluded, T* exps, const Ahead& ahead) {
  constexpr int64_t L = kLanes<T>;
  if (row.max == -kInfinity<T>) {
    if constexpr (StoreExps) std::fill(exps, exps + padded, T(0));
    return;
  }
  if (excluded < 0) {
    add_run<Weighted, StoreExps>(row, z, padded, exps, ahead);
    return;
  }
  const int64_t v = excluded / L * L, next = v + L;
  alignas(64) T others[L];
  std::memcpy(others, z + v, sizeof(others));
  others[excluded - v] = -kInfinity<T>;
  add_run<Weighted, StoreExps>(row, z, v, exps, ahead);
  add_run<Weighted, StoreExps>(row, others, L, StoreExps ? exps + v : exps, ahead);
  if constexpr (StoreExps) exps[excluded] = 1;
  add_run<Weighted, StoreExps>(row, z + next, padded - next, StoreExps ? exps + next : exps,
                               Ahead{ahead.at + next / L * ahead.step, ahead.step});
}

// The same for a block that may be written to: one loop instead of three, which counts where rows are short.
template <bool Weighted, bool StoreExps, typename T>
inline void add_buffered_block(LogSumExp<T>& row, T* z, int64_t padded, int64_t excluded, T* exps, const Ahead& ahead) {
  if (excluded < 0) {
    add_block<Weighted, StoreExps>(row, z, padded, excluded, exps, ahead);
    return;
  }
  z[excluded] = -kInfinity<T>;
  add_run<Weighted, StoreExps>(row, z, padded, exps, ahead);
  if constexpr (StoreExps) exps[excluded] = 1;
}

// ---- columns: a tile [classes, kTile] with one row per lane ---------------------------------------------------

// The maximum of a vector of rows over `classes` classes and the maximum so far. With Weighted NaN wins, and the class
// where it was first reached goes to `where` (-1: none raised it).
template <bool Weighted, typename T>
inline Vec<T> max_of_columns(const T* z, int64_t classes, const Vec<T>& previous, Vec<T>& where) {
  Vec<T> max = previous;
  for (int64_t c = 0; c < classes; c++) {
    const Vec<T> x = Vec<T>::loadu(z + c * kTile);
    if constexpr (Weighted) {  // x > max, or x NaN and max not yet
      const Vec<T> later = (x > max) | ((x != x) & (max == max));
      where = Vec<T>::blendv(where, Vec<T>(static_cast<T>(c)), later);
      max = at::vec::maximum(max, x);
    } else {
      max = larger(max, x);
    }
  }
  return max;
}

// Classes that are summed in T before they join the sum in double: few, as a rounding is relative to the sum so far.
constexpr int64_t kSummedClasses = 8;

// Merges into row r the sums of a block, whose `maximal` classes that reach the new maximum are not in `rest`.
template <typename T>
inline void merge(BatchSums<T>& sums, int64_t r, T max, double rest, double lost, double maximal, double weighted) {
  LogSumExp<T> row = sums.get(r);
  if (!(max == row.max)) {
    row.raise(max);
    maximal -= 1;
  }
  if (max == -kInfinity<T>) maximal = weighted = 0;
  row.rest.add(rest + maximal);
  row.rest.lost += lost;
  row.weighted += weighted;
  sums.set(r, row);
}

// N vectors of rows, sums' [r, r + N lanes): merges the classes [first, first + classes) of the tile at z. With
// StoreExps the exponentials go to `exps`, which may be z; then all classes of the rows must come in one call. `ahead`
// has one for each vector.
template <bool Weighted, bool StoreExps, int N, typename T>
inline void add_columns(BatchSums<T>& sums, int64_t r, const T* z, int64_t classes, int64_t first, T* exps,
                        const std::array<Ahead, N>& ahead) {
  constexpr int64_t L = kLanes<T>;
  const bool begins = first == 0;
  Vec<T> max[N], where[N];
  for (int k = 0; k < N; k++) {
    where[k] = Vec<T>(-1);
    max[k] = begins ? Vec<T>(-kInfinity<T>) : Vec<T>::loadu(sums.max + r + k * L);
    max[k] = max_of_columns<Weighted>(z + r + k * L, classes, max[k], where[k]);
  }
  alignas(64) double rest[N * L], lost[N * L] = {}, weighted_sum[N * L], weighted_lost[N * L] = {};
  Vec<T> maximal[N];
  for (int k = 0; k < N; k++) maximal[k] = Vec<T>(0);
  const auto sum_from = [&](int64_t begin, bool is_first) {
    Vec<T> s[N], w[N];
    for (int k = 0; k < N; k++) s[k] = w[k] = Vec<T>(0);
    for (int64_t c = begin; c < std::min(classes, begin + kSummedClasses); c++) {
      for (int k = 0; k < N; k++) {
        ahead[k].fetch(c);
        const int64_t at = c * kTile + r + k * L;
        const Vec<T> x = Vec<T>::loadu(z + at);
        const Vec<T> d = x - max[k];
        const Vec<T> e = exp_nonpositive(d);
        add_apart(s[k], maximal[k], e, x, max[k]);
        if constexpr (Weighted) w[k] = w[k] + multiply_or_zero(e, d);
        if constexpr (StoreExps) e.store(exps + at);
      }
    }
    for (int k = 0; k < N; k++) {
      add_to(rest + k * L, lost + k * L, s[k], is_first);
      if constexpr (Weighted) add_to(weighted_sum + k * L, weighted_lost + k * L, w[k], is_first);
    }
  };
  sum_from(0, true);
  for (int64_t begin = kSummedClasses; begin < classes; begin += kSummedClasses) sum_from(begin, false);
  if constexpr (Weighted)
    for (int64_t i = 0; i < N * L; i++) weighted_sum[i] += weighted_lost[i];
  for (int k = 0; k < N; k++) {
    const int64_t from = r + k * L, lane = k * L;
    alignas(64) T ties[L];  // a count, exact: a block has less than 2^24 classes
    maximal[k].store(ties);
    if (begins) {
      max[k].store(sums.max + from);
      for (int64_t i = 0; i < L; i += kLanes<double>) {
        const DoubleVec further = load_double(ties + i) - DoubleVec(1);
        (load_double(rest + lane + i) + further).store(sums.rest + from + i);
      }
      std::copy(lost + lane, lost + lane + L, sums.lost + from);
      if constexpr (Weighted) std::copy(weighted_sum + lane, weighted_sum + lane + L, sums.weighted + from);
      if constexpr (Weighted) std::fill(sums.argmax + from, sums.argmax + from + L, int64_t{0});
    } else {
      alignas(64) T new_max[L];
      max[k].store(new_max);
      for (int64_t i = 0; i < L; i++)
        merge(sums, from + i, new_max[i], rest[lane + i], lost[lane + i], ties[i],
              Weighted ? weighted_sum[lane + i] : 0);
    }
    if constexpr (Weighted) {
      alignas(64) T classes_where[L];
      where[k].store(classes_where);
      for (int64_t i = 0; i < L; i++)
        if (classes_where[i] >= 0) sums.argmax[from + i] = first + static_cast<int64_t>(classes_where[i]);
    }
  }
}

// The same for all rows of a tile, two vectors at a time: the exponentials of one alone would wait for each other.
// ahead_of(r) is what to fetch with the vector of rows r.
template <bool Weighted, bool StoreExps, typename T, typename AheadOf>
inline void add_tile(BatchSums<T>& sums, int64_t rows, const T* z, int64_t classes, int64_t first, T* exps,
                     const AheadOf& ahead_of) {
  constexpr int64_t L = kLanes<T>;
  int64_t r = 0;
  for (; r + L < rows; r += 2 * L)
    add_columns<Weighted, StoreExps, 2>(sums, r, z, classes, first, exps, {ahead_of(r), ahead_of(r + L)});
  if (r < rows) add_columns<Weighted, StoreExps, 1>(sums, r, z, classes, first, exps, {ahead_of(r)});
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
