// The gradients of one class, in vectors of classes or of rows, from the coefficients of the rows.
// Included only by units compiled per instruction set.
#pragma once

#include "row_batch.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

// GradientCoefficients and the maximum: of one row in all lanes, or of a row in each.
template <typename T>
struct GradientVectors {
  Vec<T> max, alpha, beta, uniform, smooth, q_coef, nll_coef, log_sum;
};

template <typename T>
GradientVectors<T> broadcast(const RowBatch<T>& b, int64_t r) {
  return {Vec<T>(b.sums.max[r]), Vec<T>(b.alpha[r]),  Vec<T>(b.beta[r]),     Vec<T>(b.uniform[r]),
          Vec<T>(b.smooth[r]),   Vec<T>(b.q_coef[r]), Vec<T>(b.nll_coef[r]), Vec<T>(b.log_sum[r])};
}

template <typename T>
GradientVectors<T> load_rows(const RowBatch<T>& b, int64_t r) {
  const auto load = [&](const T* values) { return Vec<T>::loadu(values + r); };
  return {load(b.sums.max), load(b.alpha),  load(b.beta),     load(b.uniform),
          load(b.smooth),   load(b.q_coef), load(b.nll_coef), load(b.log_sum)};
}

template <typename T>
GradientTerms gradient_terms(const CrossEntropy<T>& p) {
  return {p.grad_entropy.given, p.weight && p.options.label_smoothing != 0, p.has_probabilities,
          LogitTransform(p.options).is_capped()};
}

// `slope` is read where the logits are capped.
template <typename T>
inline Vec<T> full_gradient(const CrossEntropy<T>& p, const GradientTerms& has, const GradientVectors<T>& g,
                            const Vec<T>& z, const Vec<T>& q, const Vec<T>& w, const T* slope) {
  const Vec<T> d = z - g.max;
  const Vec<T> gradient =
      gradient_without_slope<VectorMath<T>>(has, g, d, exp_nonpositive(d), q, w, Vec<T>(p.options.logit_scale));
  return has.capped ? gradient * Vec<T>::loadu(slope) : gradient;
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
