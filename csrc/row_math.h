// The algebra of a row, once for all devices (derivations: docs/math.md): the logits' transformation, the loss and the
// statistics from the row's sums, the coefficients of the gradient, and the gradient of one class. What runs over the
// classes, and in which order it is summed, is the kernels' own.
//
// Everything is written over a type Math of static functions:
//
//   Value                            one number, or a vector of numbers with a row or a class in each lane
//   select(condition, yes, no)       by lane; conditions are what == of Values gives
//   multiply_or_zero(b, d)           b * d, and 0 where b is 0: a class without mass has no part, be its logit -inf
//   multiply_add(a, b, c)            a * b + c, and
//   multiply_subtract(a, b, c)       a * b - c, rounded once where the processor can
//   divide(a, b), abs(x), log1p(x), tanh(x)
//   exp(x)                           of x <= 0; perhaps 0 where that is no normal number
//
// and numbers that are the same for all rows are of a type Number that Value can be made from.
#pragma once

#include <cmath>

#include "params.h"

namespace softmax_ext {

// ---- logits ---------------------------------------------------------------------------------------------------------

// z = logit_scale * x, or softcap * tanh(logit_scale * x / softcap).
template <typename Number>
struct LogitTransform {
  Number scale;            // logit_scale
  Number cap;              // softcap; 0: none, and the next three are not used
  Number inner_scale;      // scale / cap
  Number size, size_lost;  // |inner_scale|, and what rounding took from it

  SOFTMAX_EXT_INLINE explicit LogitTransform(const OptionsOf<Number>& options)
      : scale(options.logit_scale), cap(options.softcap), inner_scale(scale / cap) {
    size = scale < 0 ? -inner_scale : inner_scale;
    size_lost = std::fma(-size, cap, scale < 0 ? -scale : scale) / cap;
  }
  LogitTransform() = default;

  SOFTMAX_EXT_INLINE bool is_capped() const { return cap != 0; }
  SOFTMAX_EXT_INLINE bool is_identity() const { return cap == 0 && scale == 1; }
};

template <typename Math, typename Value = typename Math::Value>
SOFTMAX_EXT_KERNEL_INLINE Value capped_logit(const Value& x, const Value& inner_scale, const Value& cap) {
  return cap * Math::tanh(x * inner_scale);
}

// dz/dx / logit_scale = 1 - tanh^2(u) of a capped logit, u = logit_scale * x / softcap. The difference would cancel where
// |u| is large, so it is 4 e / (1 + e)^2 with e = exp(-2 |u|). What rounding takes from |u|, `lost`, is a factor
// 1 - 2 lost of e, which counts where |u| is large.
template <typename Math, typename Value = typename Math::Value>
SOFTMAX_EXT_KERNEL_INLINE Value capped_slope(const Value& x, const Value& size, const Value& size_lost) {
  const Value zero(0), minus_two(-2), x_size = Math::abs(x), u = x_size * size;
  const Value lost = Math::multiply_add(x_size, size_lost, Math::multiply_subtract(x_size, size, u));
  const Value rounded = Math::exp(minus_two * u), e = Math::multiply_add(rounded, minus_two * lost, rounded);
  const Value sum = Value(1) + e;
  return Math::select(rounded == zero, zero, Math::divide(Value(4) * e, sum * sum));  // of an infinite x `lost` is NaN
}

// ---- what the rows of a call have in common -------------------------------------------------------------------------

template <typename Number>
struct RowRules {
  bool has_probabilities;  // the target, otherwise class indices
  bool has_weight;
  bool weighs_rows;
  bool has_entropy_gradient;
  bool writes_second;  // the gradient of the probabilities
  bool is_capped;
  Number eps, share;  // label_smoothing, and that divided by the number of classes
  Number z_loss;      // with its factor
  Number scale;       // logit_scale
};

// The factor of z_loss in a mean whose denominator is a sum of class weights, so that the z terms are divided by the same
// sum without them, `of_rows`. Where no row counts it is 0, which makes no NaN.
SOFTMAX_EXT_INLINE double z_factor_of(double of_weights, double of_rows) {
  return of_weights == 0 && of_rows == 0 ? 0 : of_weights / of_rows;
}

// ---- loss and statistics --------------------------------------------------------------------------------------------

// mass * log_sum - dot; without mass -dot, whatever the logarithm.
template <typename Math, typename Value = typename Math::Value>
SOFTMAX_EXT_KERNEL_INLINE Value cost(const Value& mass, const Value& log_sum, const Value& dot) {
  const Value zero(0);
  return Math::select(mass == zero, zero - dot, Math::multiply_subtract(mass, log_sum, dot));
}

template <typename Value>
struct RowLoss {
  Value log_sum;  // log-sum-exp less the maximum
  Value lse, nll, loss;
};

// p of the target class, from exp(z - max) of its logit: the row weight by probability.
template <typename Math, typename Value = typename Math::Value>
SOFTMAX_EXT_KERNEL_INLINE Value target_probability(const Value& exp_d, const Value& rest) {
  return Math::divide(exp_d, Value(1) + rest);
}

// The loss of a row that is not ignored. Of the row it asks, where its rules need it:
//
//   max(), rest()                            the state (params.h)
//   log_sum()                                log1p(rest)
//   z(), weight()                            of the target class
//   row_weight()                             the factor of the loss; 0 where the row is ignored
//   dot()                                    sum b_c (z_c - max); with class indices the part of smoothing alone,
//                                            sum w_c (z_c - max)
//   weight_sum()                             sum w_c
//   b_sum(), q_sum(), q_dot()                sum b_c, sum q_c, sum q_c (z_c - max)
template <typename Math, typename Number, typename Row>
SOFTMAX_EXT_KERNEL_INLINE RowLoss<typename Math::Value> row_loss(const RowRules<Number>& rules, const Row& row) {
  using Value = typename Math::Value;
  const Value max = row.max(), log_sum = row.log_sum(), lse = max + log_sum;
  RowLoss<Value> of{log_sum, lse, Value(0), Value(0)};
  if (rules.has_probabilities) {
    of.nll = cost<Math>(row.q_sum(), log_sum, row.q_dot());
    of.loss = cost<Math>(row.b_sum(), log_sum, row.dot());
  } else {
    of.nll = log_sum - (row.z() - max);
    of.loss = Math::multiply_or_zero(Value(1 - rules.eps) * row.weight(), of.nll);
    if (rules.eps != 0)
      of.loss = of.loss + Value(rules.share) * cost<Math>(Value(row.weight_sum()), log_sum, row.dot());
  }
  if (rules.z_loss != 0) of.loss = of.loss + Value(rules.z_loss) * lse * lse;
  if (rules.weighs_rows) of.loss = Math::multiply_or_zero(row.row_weight(), of.loss);
  return of;
}

// weighted: sum exp(z_c - max) (z_c - max).
template <typename Math, typename Value = typename Math::Value>
SOFTMAX_EXT_KERNEL_INLINE Value row_entropy(const Value& log_sum, const Value& weighted, const Value& rest) {
  return log_sum - Math::divide(weighted, Value(1) + rest);
}

// ---- gradient -------------------------------------------------------------------------------------------------------

// With d_c = z_c - max:
//
//   dL/dx_c = slope_c [ exp(d_c) (alpha + beta d_c) - uniform - smooth w_c - scale q_c (q_coef w_c + nll_coef) ]
//
// slope_c is capped_slope, or 1; scale is logit_scale, which is in alpha, beta, uniform and smooth.
template <typename Value>
struct GradientCoefficients {
  Value alpha, beta, uniform, smooth, q_coef, nll_coef;
  Value log_sum;    // 0 unless something needs it
  Value at_target;  // the whole gradient of the target class, if the row has one
};

// The gradient of a class is p_c (p_coef + y_coef), and y_coef less for the target class. There that difference would
// cancel where p_y is near 1: at_target is y_coef (p_y - 1) + p_coef p_y, with p_y - 1 from the state.
//
// Of the row it asks, besides the above:
//
//   g_loss(), g_lse(), g_nll(), g_entropy()  upstream gradients, 0 without; those of loss and nll are 0 where the row is
//                                            ignored
//   entropy()                                the statistic
//   has_target()                             whether at_target is wanted, and there is a target class. On CUDA only the
//                                            thread that writes it has z(): another may have overwritten that logit
//   exp_at_target(z - max)                   exp of that, in the type of the arithmetic
//   slope_at_target()                        capped_slope
template <typename Math, typename Number, typename Row>
SOFTMAX_EXT_KERNEL_INLINE GradientCoefficients<typename Math::Value> gradient_coefficients(
    const RowRules<Number>& rules, const Row& row) {
  using Value = typename Math::Value;
  const Value zero(0), one(1), scale(rules.scale), max = row.max(), rest = row.rest();
  const Value g_loss = rules.weighs_rows ? row.g_loss() * row.row_weight() : row.g_loss();
  const Value g_nll = row.g_nll(), g_entropy = row.g_entropy();
  const bool needs_log = rules.z_loss != 0 || rules.has_entropy_gradient || rules.writes_second;
  GradientCoefficients<Value> k{zero, zero, zero, zero, zero, g_nll, zero, zero};
  if (needs_log) k.log_sum = row.log_sum();
  Value p_coef = row.g_lse(), y_coef = zero;
  if (rules.z_loss != 0) p_coef = p_coef + g_loss * Value(2 * rules.z_loss) * (max + k.log_sum);
  if (rules.has_entropy_gradient) p_coef = p_coef + g_entropy * (k.log_sum - row.entropy());  // sum p_c (z_c - max)
  if (rules.has_probabilities) {
    p_coef = p_coef + g_loss * row.b_sum() + g_nll * row.q_sum();
    k.q_coef = g_loss * Value(1 - rules.eps);
  } else {
    y_coef = g_loss * Value(1 - rules.eps) * row.weight() + g_nll;
    p_coef = p_coef + g_loss * Value(rules.share * row.weight_sum());
  }
  const Value uniform = g_loss * Value(rules.share), inverse_sum = Math::divide(one, one + rest);
  if (rules.has_weight)
    k.smooth = uniform * scale;
  else
    k.uniform = uniform * scale;
  k.alpha = (y_coef + p_coef) * inverse_sum * scale;
  if (rules.has_entropy_gradient) k.beta = zero - g_entropy * inverse_sum * scale;
  if (!row.has_target()) return k;
  const Value z = row.z(), d = z - max, p = row.exp_at_target(d) * inverse_sum;
  // Of a maximal class by its complement, which does not cancel; any other p is at most 1/2.
  const Value p_less_one = Math::select(d == zero, zero - rest * inverse_sum, p - one);
  Value at_target = y_coef * p_less_one + Math::multiply_or_zero(p, p_coef - g_entropy * d);
  if (rules.eps != 0) at_target = at_target - (rules.has_weight ? uniform * row.weight() : uniform);
  if (rules.is_capped) at_target = at_target * row.slope_at_target();
  k.at_target = at_target * scale;
  return k;
}

// Which terms the gradient of a class has beyond exp * alpha - uniform.
struct GradientTerms {
  bool entropy, smooth, probabilities, capped;

  SOFTMAX_EXT_INLINE bool any() const { return entropy || smooth || probabilities || capped; }
};

// Coefficients: of GradientCoefficients, those that the terms need. e = exp(z - max), or, with its own alpha, of any
// other shift.
template <typename Math, typename Coefficients, typename Value = typename Math::Value>
SOFTMAX_EXT_KERNEL_INLINE Value plain_gradient(const Coefficients& k, const Value& e) {
  return Math::multiply_subtract(e, k.alpha, k.uniform);
}

// All terms but those that need the logit itself.
template <typename Math, typename Coefficients, typename Value = typename Math::Value>
SOFTMAX_EXT_KERNEL_INLINE Value gradient_without_logit(const GradientTerms& has, const Coefficients& k, const Value& e,
                                                       const Value& q, const Value& w, const Value& scale) {
  Value gradient = plain_gradient<Math>(k, e);
  if (has.smooth) gradient = gradient - k.smooth * w;
  if (has.probabilities) gradient = gradient - q * Math::multiply_add(k.q_coef, w, k.nll_coef) * scale;
  return gradient;
}

// All terms but the slope, of d = z - max.
template <typename Math, typename Coefficients, typename Value = typename Math::Value>
SOFTMAX_EXT_KERNEL_INLINE Value gradient_without_slope(const GradientTerms& has, const Coefficients& k, const Value& d,
                                                       const Value& e, const Value& q, const Value& w,
                                                       const Value& scale) {
  const Value gradient = gradient_without_logit<Math>(has, k, e, q, w, scale);
  return has.entropy ? gradient + Math::multiply_or_zero(e, k.beta * d) : gradient;
}

// dL/dq_c = (q_coef w_c + nll_coef) (lse - z_c), of d = z_c - max.
template <typename Math, typename Coefficients, typename Value = typename Math::Value>
SOFTMAX_EXT_KERNEL_INLINE Value probability_gradient(const Coefficients& k, const Value& d, const Value& w) {
  return Math::multiply_or_zero(Math::multiply_add(k.q_coef, w, k.nll_coef), k.log_sum - d);
}

}  // namespace softmax_ext
