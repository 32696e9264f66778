// What cross entropy computes once per row, from row_math.h: the loss, and the coefficients of the gradient. A batch of
// rows at a time, in vectors of double, one row per lane. Included only by units compiled per instruction set.
#pragma once

#include "../../row_math.h"
#include "../../row_part.h"
#include "../kernel_table.h"
#include "../logsumexp.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

// Up to kTile rows. Arrays are filled for whole vectors: a lane beyond the last row is a row that is ignored.
template <typename T>
struct RowBatch {
  int64_t rows = 0;
  bool consecutive = true;  // their numbers are number[0], number[0] + 1, ...
  bool any_ignored = false;
  int64_t number[kTile];
  int64_t y[kTile];                      // class, of those that the logits have; -1: none, ignored, or in another part
  alignas(64) double live[kTile];        // 0 where ignored, else 1
  alignas(64) T z[kTile];                // logit of class y
  alignas(64) T slope[kTile];            // of that logit, where slopes are needed
  alignas(64) double weight[kTile];      // of class y
  alignas(64) double row_weight[kTile];  // where rows are weighed; 0 where ignored
  BatchSums<T> sums;

  // Sums over the classes, as row_math.h asks for them.
  alignas(64) double dot[kTile];
  alignas(64) double b_sum[kTile];  // sum b_c
  alignas(64) double q_dot[kTile];  // sum q_c (z_c - max)
  alignas(64) double q_sum[kTile];  // sum q_c

  // GradientCoefficients; those that no term of the gradient needs are not set.
  alignas(64) T alpha[kTile];
  alignas(64) T beta[kTile];
  alignas(64) T uniform[kTile];
  alignas(64) T smooth[kTile];
  alignas(64) T q_coef[kTile];
  alignas(64) T nll_coef[kTile];
  alignas(64) T log_sum[kTile];
  alignas(64) double at_target[kTile];  // the whole gradient of class y
};

// ---- options -----------------------------------------------------------------------------------------------------

// Without smoothing and weights b_c = q_c.
template <typename T>
inline bool mass_is_probability(const CrossEntropy<T>& p) {
  return p.options.label_smoothing == 0 && !p.weight;
}

// Whether the loss has terms that run over the classes besides log-sum-exp.
template <typename T>
inline bool has_terms(const CrossEntropy<T>& p) {
  return p.has_probabilities || p.options.label_smoothing != 0;
}

template <typename T>
inline bool weighs_rows(const CrossEntropy<T>& p) {
  return p.row_weight || p.options.weighs_by_probability;
}

template <typename T>
inline RowRules<double> row_rules(const CrossEntropy<T>& p) {
  const OptionsOf<T>& o = p.options;
  RowRules<double> rules;
  rules.has_probabilities = p.has_probabilities;
  rules.has_weight = p.weight;
  rules.weighs_rows = weighs_rows(p);
  rules.has_entropy_gradient = p.grad_entropy.given;
  rules.writes_second = p.grad_probabilities;
  rules.is_capped = LogitTransform(o).is_capped();
  rules.eps = o.label_smoothing;
  rules.share = rules.eps / static_cast<double>(p.all_classes);
  rules.z_loss = p.z_factor ? o.z_loss * *p.z_factor : o.z_loss;
  rules.scale = o.logit_scale;
  return rules;
}

// ---- one value per row, between the batch and memory ---------------------------------------------------------------

// out[number of row] = values[row], for every row.
template <typename T, typename S, typename V>
inline void scatter(const RowBatch<T>& batch, const V* values, S* out) {
  if (batch.consecutive) {
    S* first = out + batch.number[0];
    for (int64_t r = 0; r < batch.rows; r++) first[r] = static_cast<S>(values[r]);
  } else {
    for (int64_t r = 0; r < batch.rows; r++) out[batch.number[r]] = static_cast<S>(values[r]);
  }
}

template <typename T, typename S>
inline void gather(const RowBatch<T>& batch, const S* in, double* values) {
  if (batch.consecutive) {
    const S* first = in + batch.number[0];
    for (int64_t r = 0; r < batch.rows; r++) values[r] = first[r];
  } else {
    for (int64_t r = 0; r < batch.rows; r++) values[r] = in[batch.number[r]];
  }
}

// One value of an upstream gradient for each row.
template <typename T>
inline void gather_upstream(const RowBatch<T>& batch, const RowValues& values, double* out) {
  const int64_t padded = round_up(batch.rows, kLanes<double>);
  const double scale = values.given ? inverse_divisor(values) : 0;
  if (!values.given || !values.data || values.stride == 0) {
    std::fill(out, out + padded, values.given ? scale * load_row_value(values, 0) : 0.0);
    return;
  }
  for (int64_t r = 0; r < batch.rows; r++) out[r] = scale * load_row_value(values, batch.number[r]);
  std::fill(out + batch.rows, out + padded, 0.0);
}

// ---- state -------------------------------------------------------------------------------------------------------

// The state of the rows is described in params.h.
template <typename T>
inline void store_state(const CrossEntropy<T>& p, const RowBatch<T>& batch) {
  if (!p.state) return;
  scatter(batch, batch.sums.max, p.state);
  scatter(batch, batch.sums.rest, p.state + p.rows);
  if (p.options.weighs_by_probability) scatter(batch, batch.row_weight, p.state + 2 * p.rows);
  if (!p.has_probabilities) return;
  scatter(batch, batch.b_sum, p.state + 2 * p.rows);
  scatter(batch, batch.q_sum, p.state + 3 * p.rows);
}

template <typename T>
inline void load_state(const CrossEntropy<T>& p, RowBatch<T>& batch) {
  double max[kTile];
  gather(batch, p.state, max);
  for (int64_t r = 0; r < batch.rows; r++) batch.sums.max[r] = static_cast<T>(max[r]);
  gather(batch, p.state + p.rows, batch.sums.rest);
  if (!p.has_probabilities) return;
  gather(batch, p.state + 2 * p.rows, batch.b_sum);
  gather(batch, p.state + 3 * p.rows, batch.q_sum);
}

// ---- parts -------------------------------------------------------------------------------------------------------

// Of rows whose classes have been summed, but not finished.
template <typename T>
void store_parts(const CrossEntropy<T>& p, const RowBatch<T>& batch) {
  for (int64_t r = 0; r < batch.rows; r++) {
    RowPart of;
    const double max = batch.sums.max[r], rest = batch.sums.rest[r] + batch.sums.lost[r];
    of.max = max;
    of.rest = std::isnan(rest) ? kNaN : max == -kInfinity<double> ? 0 : std::isfinite(max) ? rest : kNaN;
    of.target = batch.y[r] < 0 ? 0 : batch.z[r];
    of.dot = batch.dot[r];
    of.b_sum = batch.b_sum[r];
    of.q_dot = batch.q_dot[r];
    of.q_sum = batch.q_sum[r];
    of.weighted = max == -kInfinity<double> ? 0 : batch.sums.weighted[r];
    const double argmax = static_cast<double>(p.first_class + batch.sums.argmax[r]);
    of.argmax = std::isnan(max) ? -1 - argmax : argmax;
    store_part(p, of, batch.number[r]);
  }
}

// ---- loss --------------------------------------------------------------------------------------------------------

inline DoubleVec zero_where(const DoubleVec& condition, const DoubleVec& v) {
  return DoubleVec::blendv(v, DoubleVec(0), condition);
}

// Whether the losses are summed at once: only their sum is wanted, and log-sum-exp counts the same in all of them.
// With statistics too, so that they do not change the loss's last bit.
template <typename T>
inline bool sums_at_once(const CrossEntropy<T>& p) {
  return !p.loss && !p.has_probabilities && !p.weight && p.options.z_loss == 0 && !weighs_rows(p);
}

inline double sum_of(const DoubleVec& losses) {
  alignas(64) double lanes[kLanes<double>];
  losses.store(lanes);
  LongSum<double> sum;
  for (double loss : lanes) sum.add(loss);
  return sum.value();
}

// The sum of the losses with one logarithm for each lane: sum log1p(rest) = log1p(prod (1 + rest) - 1), the product
// less one being built up as it is, without a loss of small figures. 16 factors of up to 10^19 do not overflow.
template <typename T>
double sum_losses(const CrossEntropy<T>& p, const RowBatch<T>& batch) {
  constexpr int64_t L = kLanes<double>, kFactors = 16;
  const RowRules<double> rules = row_rules(p);
  const DoubleVec zero(0);
  DoubleVec total(0);
  for (int64_t first = 0; first < batch.rows; first += kFactors * L) {
    DoubleVec product_less_one(0), rest_of_loss(0);
    for (int64_t r = first; r < std::min(batch.rows, first + kFactors * L); r += L) {
      const DoubleVec ignored = load_double(batch.live + r) == zero;
      const DoubleVec rest = zero_where(ignored, load_double(batch.sums.rest + r));
      product_less_one = at::vec::fmadd(product_less_one, rest, product_less_one + rest);
      const DoubleVec below_max = load_double(batch.sums.max + r) - load_double(batch.z + r);
      DoubleVec others = multiply_or_zero(DoubleVec(1 - rules.eps), below_max);
      if (rules.eps != 0) others = others - DoubleVec(rules.share) * load_double(batch.dot + r);
      rest_of_loss = rest_of_loss + zero_where(ignored, others);
    }
    total = total + product_less_one.log1p() + rest_of_loss;
  }
  return sum_of(total);
}

// The rows [r, r + lanes) of a batch, as row_math.h asks for them.
template <typename T>
struct RowLanes {
  const CrossEntropy<T>& p;
  const RowBatch<T>& batch;
  int64_t r;

  DoubleVec max() const { return load_double(batch.sums.max + r); }
  DoubleVec rest() const { return load_double(batch.sums.rest + r); }
  DoubleVec log_sum() const { return VectorMath<double>::log1p(rest()); }
  DoubleVec z() const { return load_double(batch.z + r); }
  DoubleVec weight() const { return load_double(batch.weight + r); }
  DoubleVec row_weight() const { return load_double(batch.row_weight + r); }
  DoubleVec dot() const { return load_double(batch.dot + r); }
  DoubleVec b_sum() const { return load_double(batch.b_sum + r); }
  DoubleVec q_dot() const { return load_double(batch.q_dot + r); }
  DoubleVec q_sum() const { return load_double(batch.q_sum + r); }
  // Rounded to T, as the weights are.
  double weight_sum() const { return p.weight_sum ? static_cast<T>(*p.weight_sum) : static_cast<T>(p.all_classes); }
  DoubleVec ignored() const { return load_double(batch.live + r) == DoubleVec(0); }
};

template <typename T>
void weigh_by_probability(RowBatch<T>& batch) {
  constexpr int64_t L = kLanes<double>;
  for (int64_t r = 0; r < batch.rows; r += L) {
    const DoubleVec d = load_double(batch.z + r) - load_double(batch.sums.max + r);
    const DoubleVec p = target_probability<VectorMath<double>>(exp_nonpositive(d), load_double(batch.sums.rest + r));
    zero_where(load_double(batch.live + r) == DoubleVec(0), p).store(batch.row_weight + r);
  }
}

// Writes what forward writes of each row and returns the sum of the losses.
template <typename T>
double finish_rows(const CrossEntropy<T>& p, RowBatch<T>& batch) {
  constexpr int64_t L = kLanes<double>;
  const RowRules<double> rules = row_rules(p);
  if (p.part) {
    store_parts(p, batch);
    return 0;
  }
  alignas(64) double loss[kTile], nll[kTile], lse[kTile], entropy[kTile];
  DoubleVec total(0);
  for (int64_t r = 0; r < batch.rows; r++)
    batch.sums.rest[r] = std::isfinite(batch.sums.max[r]) ? batch.sums.rest[r] + batch.sums.lost[r] : kNaN;
  if (p.options.weighs_by_probability) weigh_by_probability(batch);
  if (sums_at_once(p) && !p.stats) {
    store_state(p, batch);
    return sum_losses(p, batch);
  }
  for (int64_t r = 0; r < batch.rows; r += L) {
    const RowLanes<T> rows{p, batch, r};
    const RowLoss<DoubleVec> of = row_loss<VectorMath<double>>(rules, rows);
    const DoubleVec counted = zero_where(rows.ignored(), of.loss);
    total = total + counted;
    counted.store(loss + r);
    if (!p.stats) continue;
    zero_where(rows.ignored(), of.nll).store(nll + r);
    const DoubleVec no_statistics = p.options.skips_ignored ? rows.ignored() : DoubleVec(0);
    const DoubleVec weighted = load_double(batch.sums.weighted + r);
    zero_where(no_statistics, of.lse).store(lse + r);
    zero_where(no_statistics, row_entropy<VectorMath<double>>(of.log_sum, weighted, rows.rest())).store(entropy + r);
  }
  store_state(p, batch);
  if (p.loss)
    for (int64_t r = 0; r < batch.rows; r++) store_value(loss[r], p.loss, p.loss_type, batch.number[r]);
  if (p.stats) {
    scatter(batch, lse, p.lse);
    scatter(batch, nll, p.nll);
    scatter(batch, entropy, p.entropy);
    if (p.options.skips_ignored)
      for (int64_t r = 0; r < batch.rows; r++)
        if (batch.live[r] == 0) batch.sums.argmax[r] = -1;
    scatter(batch, batch.sums.argmax, p.prediction);
  }
  return sums_at_once(p) ? sum_losses(p, batch) : sum_of(total);
}

// ---- gradient ----------------------------------------------------------------------------------------------------

// What the gradients of a batch need besides its sums: upstream gradients, and more of the target's class.
template <typename T>
struct UpstreamBatch {
  alignas(64) double loss[kTile], lse[kTile], nll[kTile], entropy[kTile];
  alignas(64) double saved_entropy[kTile];
  alignas(64) T exp_at_target[kTile];

  UpstreamBatch(const CrossEntropy<T>& p, const RowBatch<T>& batch) {
    gather_upstream(batch, p.grad_loss, loss);
    if (p.grad_lse.given) gather_upstream(batch, p.grad_lse, lse);
    if (p.grad_nll.given) gather_upstream(batch, p.grad_nll, nll);
    if (p.grad_entropy.given) gather_upstream(batch, p.grad_entropy, entropy);
    if (p.grad_entropy.given) gather(batch, p.entropy, saved_entropy);
    if (p.has_probabilities) return;
    for (int64_t r = 0; r < batch.rows; r += kLanes<T>)
      exp_nonpositive(Vec<T>::loadu(batch.z + r) - Vec<T>::loadu(batch.sums.max + r)).store(exp_at_target + r);
  }
};

template <typename T>
struct GradientLanes : RowLanes<T> {
  const UpstreamBatch<T>& upstream;

  DoubleVec g_loss() const { return zero_where(this->ignored(), load_double(upstream.loss + this->r)); }
  DoubleVec g_lse() const { return this->p.grad_lse.given ? load_double(upstream.lse + this->r) : DoubleVec(0); }
  DoubleVec g_nll() const {
    return this->p.grad_nll.given ? zero_where(this->ignored(), load_double(upstream.nll + this->r)) : DoubleVec(0);
  }
  DoubleVec g_entropy() const {
    return this->p.grad_entropy.given ? load_double(upstream.entropy + this->r) : DoubleVec(0);
  }
  DoubleVec entropy() const { return load_double(upstream.saved_entropy + this->r); }
  bool has_target() const { return !this->p.has_probabilities; }
  DoubleVec exp_at_target(const DoubleVec&) const { return load_double(upstream.exp_at_target + this->r); }
  DoubleVec slope_at_target() const { return load_double(this->batch.slope + this->r); }
};

// Fills the coefficients of the gradient and its value at the target.
template <typename T>
void prepare_gradients(const CrossEntropy<T>& p, RowBatch<T>& batch) {
  constexpr int64_t L = kLanes<double>;
  const RowRules<double> rules = row_rules(p);
  const UpstreamBatch<T> upstream(p, batch);
  for (int64_t r = 0; r < batch.rows; r += L) {
    const GradientLanes<T> rows{{p, batch, r}, upstream};
    const GradientCoefficients<DoubleVec> k = gradient_coefficients<VectorMath<double>>(rules, rows);
    store_double(k.alpha, batch.alpha + r);
    store_double(k.uniform, batch.uniform + r);
    if (rules.has_weight) store_double(k.smooth, batch.smooth + r);
    if (rules.has_entropy_gradient) store_double(k.beta, batch.beta + r);
    if (rules.has_probabilities) {
      store_double(k.q_coef, batch.q_coef + r);
      store_double(k.nll_coef, batch.nll_coef + r);
      store_double(k.log_sum, batch.log_sum + r);
    } else {
      k.at_target.store(batch.at_target + r);
    }
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
