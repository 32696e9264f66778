// The sums over the classes that the loss has besides log-sum-exp, where it is smoothed or the target is probabilities.
// Included only by units compiled per instruction set.
#pragma once

#include "logits.h"
#include "row_batch.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

// The sums of RowBatch for one row, taken of z - shift, with the row's maximum so far as the shift, so that nothing is
// rounded at the magnitude of the logits.
template <typename T>
struct RowTerms {
  double shift = 0;
  LongSum<T> dot, b_sum, q_dot, q_sum;

  // Follows the maximum; before the first finite one nothing finite has been added.
  void move_to(double max) {
    if (!std::isfinite(max) || max == shift) return;
    dot.add(b_sum.value() * (shift - max));
    q_dot.add(q_sum.value() * (shift - max));
    shift = max;
  }
};

// b_c = w_c ((1 - eps) q_c + eps / C), the mass of class c in the loss. Not in row_math.h: as a function of it, it
// costs this loop 13 to 18 percent, since GCC holds the operands in memory.
template <typename T>
struct Smoothing {
  T one_minus_eps, share;

  explicit Smoothing(const CrossEntropy<T>& p)
      : one_minus_eps(1 - p.options.label_smoothing),
        share(p.options.label_smoothing / static_cast<T>(p.all_classes)) {}
};

template <typename T>
struct TermSums {
  Vec<T> dot{0}, b_sum{0}, q_dot{0}, q_sum{0};

  void add(const TermSums& run) {
    dot = dot + run.dot;
    b_sum = b_sum + run.b_sum;
    q_dot = q_dot + run.q_dot;
    q_sum = q_sum + run.q_sum;
  }

  // Class indices: the weights alone. The classes that smoothing shares are 1 / C of these sums.
  void add_smoothing(const Vec<T>& d, const Vec<T>& w) {
    dot = dot + multiply_or_zero(w, d);
    b_sum = b_sum + w;
  }

  void add_plain_probabilities(const Vec<T>& d, const Vec<T>& q) {
    q_dot = q_dot + multiply_or_zero(q, d);
    q_sum = q_sum + q;
  }

  void add_probabilities(const Smoothing<T>& by, const Vec<T>& d, const Vec<T>& q, const Vec<T>& w) {
    const Vec<T> one_minus_eps(by.one_minus_eps), share(by.share);
    const Vec<T> b = w * at::vec::fmadd(q, one_minus_eps, share);
    dot = dot + multiply_or_zero(b, d);
    b_sum = b_sum + b;
    add_plain_probabilities(d, q);
  }
};

template <typename T>
Vec<T> load_weight(const CrossEntropy<T>& p, int64_t c) {
  return p.weight ? Vec<T>::loadu(p.weight + c) : Vec<T>(1);
}

// Calls visit(k, i, count) for the vectors of [begin, end). k goes round from 0 to 3; count is a constant except in the
// last vector.
template <typename T, typename Visit>
inline void each_vector(int64_t begin, int64_t end, const Visit& visit) {
  constexpr int64_t L = kLanes<T>;
  int64_t i = begin;
  for (; i + 4 * L <= end; i += 4 * L)
    for (int k = 0; k < 4; k++) visit(k, i + k * L, L);
  for (; i + L <= end; i += L) visit(0, i, L);
  if (i < end) visit(1, i, end - i);
}

// The terms that a call has: those of b, those of q, or both; without those of b they are the same.
enum class Terms { kOfB, kOfQ, kBoth };

// Adds the terms of n classes, each vector's by add(sums, i, count). They are summed in T in short runs:
// one class can have nearly all the mass, and whatever its lane adds afterwards is rounded at that magnitude, each time
// the same way.
template <Terms terms, typename T, typename Add>
inline void add_runs(RowTerms<T>& row, int64_t n, const Add& add) {
  constexpr int64_t kRun = 16 * kLanes<T>;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    TermSums<T> sums[4];
    each_vector<T>(begin, std::min(n, begin + kRun), [&](int k, int64_t i, int64_t count) { add(sums[k], i, count); });
    const auto total = [&](Vec<T> TermSums<T>::* term) {
      return sum_lanes((sums[0].*term + sums[1].*term) + (sums[2].*term + sums[3].*term));
    };
    const double q_dot = terms == Terms::kOfB ? 0 : total(&TermSums<T>::q_dot);
    const double q_sum = terms == Terms::kOfB ? 0 : total(&TermSums<T>::q_sum);
    row.q_dot.add(q_dot);
    row.q_sum.add(q_sum);
    row.dot.add(terms == Terms::kOfQ ? q_dot : total(&TermSums<T>::dot));
    row.b_sum.add(terms == Terms::kOfQ ? q_sum : total(&TermSums<T>::b_sum));
  }
}

// z is padded to whole vectors.
template <typename T>
void add_row_terms(RowTerms<T>& terms, const CrossEntropy<T>& p, const Position& at, const T* z, int64_t n,
                   int64_t first, T* q_block) {
  const Vec<T> shift(static_cast<T>(terms.shift)), zero(0);
  const auto shifted = [&](int64_t i, int64_t count) {
    const Vec<T> d = Vec<T>::loadu(z + i) - shift;
    return count == kLanes<T> ? d : Vec<T>::set(zero, d, count);
  };
  const auto weight = [&](int64_t i, int64_t count) {
    const Vec<T> w = load_weight(p, first + i);
    return count == kLanes<T> ? w : Vec<T>::set(zero, w, count);
  };
  if (!p.has_probabilities) {
    add_runs<Terms::kOfB, T>(terms, n, [&](TermSums<T>& sums, int64_t i, int64_t count) {
      sums.add_smoothing(shifted(i, count), weight(i, count));
    });
    return;
  }
  const int64_t q_at = at.offset[kProbabilities] + first;
  const T* const q = load_probabilities(p, q_at, n, q_block);
  const Ahead ahead = ahead_of<T>(p.probabilities, p.probabilities_type, q_at + n);
  const auto probabilities = [&](int64_t i, int64_t count) {
    ahead.fetch(i / kLanes<T>);
    return load_converted<T>(q + i, count);
  };
  const Smoothing<T> smoothing(p);
  if (mass_is_probability(p))
    add_runs<Terms::kOfQ, T>(terms, n, [&](TermSums<T>& sums, int64_t i, int64_t count) {
      sums.add_plain_probabilities(shifted(i, count), probabilities(i, count));
    });
  else
    add_runs<Terms::kBoth, T>(terms, n, [&](TermSums<T>& sums, int64_t i, int64_t count) {
      sums.add_probabilities(smoothing, shifted(i, count), probabilities(i, count), weight(i, count));
    });
}

// One vector of rows of a tile, terms' [0, lanes).
template <typename T>
void add_column_terms(RowTerms<T>* terms, const CrossEntropy<T>& p, const T* z, const T* q, int64_t classes,
                      int64_t first) {
  constexpr int64_t L = kLanes<T>, kRunClasses = 8, kSummedRuns = 32;  // short runs: add_runs
  alignas(64) T lanes[4][L];
  for (int64_t r = 0; r < L; r++) lanes[0][r] = static_cast<T>(terms[r].shift);
  const Vec<T> shift = Vec<T>::loadu(lanes[0]);
  const Smoothing<T> smoothing(p);
  for (int64_t begin = 0; begin < classes; begin += kSummedRuns) {
    const int64_t end = std::min(classes, begin + kSummedRuns);
    TermSums<T> sums;
    for (int64_t run = begin; run < end; run += kRunClasses) {
      TermSums<T> of_run;
      for (int64_t c = run; c < std::min(end, run + kRunClasses); c++) {
        const Vec<T> d = Vec<T>::loadu(z + c * kTile) - shift, w(p.weight ? p.weight[first + c] : T(1));
        if (q)
          of_run.add_probabilities(smoothing, d, Vec<T>::loadu(q + c * kTile), w);
        else
          of_run.add_smoothing(d, w);
      }
      sums.add(of_run);
    }
    sums.dot.store(lanes[0]);
    sums.b_sum.store(lanes[1]);
    sums.q_dot.store(lanes[2]);
    sums.q_sum.store(lanes[3]);
    for (int64_t r = 0; r < L; r++) {
      terms[r].dot.add(lanes[0][r]);
      terms[r].b_sum.add(lanes[1][r]);
      terms[r].q_dot.add(lanes[2][r]);
      terms[r].q_sum.add(lanes[3][r]);
    }
  }
}

template <typename T>
void set_terms(RowBatch<T>& batch, int64_t r, const RowTerms<T>& terms) {
  batch.dot[r] = terms.dot.value();
  batch.b_sum[r] = terms.b_sum.value();
  batch.q_dot[r] = terms.q_dot.value();
  batch.q_sum[r] = terms.q_sum.value();
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
