// What cross entropy computes once per row: the loss from the sums over the classes, and the coefficients of the gradient.
// A batch of rows at a time, in vectors of double, one row per lane (formulas: docs/math.md).
// Included only by units compiled per instruction set.
#pragma once

#include "kernels.h"
#include "logsumexp.h"

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
  int64_t y[kTile];                  // class; -1 with probabilities and where ignored
  alignas(64) double live[kTile];    // 0 where ignored, else 1
  alignas(64) T z[kTile];            // logit of class y
  alignas(64) double weight[kTile];  // of class y
  RowSums<T> sums;

  // Sums b_c (z_c - max) with b_c = w_c ((1 - eps) q_c + eps / C), and so on. Class indices need the smoothing's part alone,
  // sum w_c (z_c - max), in `dot`.
  alignas(64) double dot[kTile];
  alignas(64) double b_sum[kTile];  // sum b_c
  alignas(64) double q_dot[kTile];  // sum q_c (z_c - max)
  alignas(64) double q_sum[kTile];  // sum q_c

  // dL/dx_c = slope_c [ exp(z_c - max) (alpha + beta (z_c - max)) - uniform - smooth w_c - scale q_c (kept w_c + nll) ]
  // slope_c is 1 - (z_c / softcap)^2, or 1; scale is logit_scale, which is in alpha, beta, uniform and smooth.
  alignas(64) T alpha[kTile];
  alignas(64) T beta[kTile];
  alignas(64) T uniform[kTile];
  alignas(64) T smooth[kTile];
  alignas(64) T kept[kTile];
  alignas(64) T nll[kTile];
  alignas(64) T log_sum[kTile];
  alignas(64) double at_target[kTile];  // the whole gradient of class y
};

// ---- options -----------------------------------------------------------------------------------------------------

// Without smoothing and weights b_c = q_c.
template <typename T>
inline bool is_plain(const CrossEntropy<T>& p) {
  return p.label_smoothing == 0 && !p.weight;
}

// Whether the loss has terms that run over the classes besides log-sum-exp.
template <typename T>
inline bool has_terms(const CrossEntropy<T>& p) {
  return p.has_probabilities || p.label_smoothing != 0;
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
  if (!values.data || values.stride == 0) {
    std::fill(out, out + padded, values.data ? values.scale * load_value(values.data, values.type, 0) : 0.0);
    return;
  }
  for (int64_t r = 0; r < batch.rows; r++)
    out[r] = values.scale * load_value(values.data, values.type, batch.number[r] * values.stride);
  std::fill(out + batch.rows, out + padded, 0.0);
}

// ---- state -------------------------------------------------------------------------------------------------------

// Saves what backward needs of the rows: (max, rest), with probabilities also (sum of b, sum of q).
template <typename T>
inline void store_state(const CrossEntropy<T>& p, const RowBatch<T>& batch) {
  if (!p.state) return;
  scatter(batch, batch.sums.max, p.state);
  scatter(batch, batch.sums.rest, p.state + p.rows);
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

// ---- loss --------------------------------------------------------------------------------------------------------

inline DoubleVec zero_where(const DoubleVec& condition, const DoubleVec& v) {
  return DoubleVec::blendv(v, DoubleVec(0), condition);
}

// Whether the losses are summed at once: only their sum is wanted, and log-sum-exp counts the same in all of them.
// With statistics too, so that they do not change the loss's last bit.
template <typename T>
inline bool sums_at_once(const CrossEntropy<T>& p) {
  return !p.loss && !p.has_probabilities && !p.weight && p.z_loss == 0;
}

inline double sum_of(const DoubleVec& losses) {
  alignas(64) double lanes[kLanes<double>];
  losses.store(lanes);
  LongSum<double> sum;
  for (double loss : lanes) sum.add(loss);
  return sum.value();
}

// The sum of the losses with one logarithm for each lane: sum log1p(rest) = log1p(prod (1 + rest) - 1), the product less one
// being built up as it is, without a loss of small figures. 16 factors of up to 10^19 do not overflow.
template <typename T>
double sum_losses(const CrossEntropy<T>& p, const RowBatch<T>& batch) {
  constexpr int64_t L = kLanes<double>, kFactors = 16;
  const double eps = p.label_smoothing, share = eps / static_cast<double>(p.layout.classes);
  const DoubleVec zero(0);
  DoubleVec total(0);
  for (int64_t first = 0; first < batch.rows; first += kFactors * L) {
    DoubleVec product_less_one(0), rest_of_loss(0);
    for (int64_t r = first; r < std::min(batch.rows, first + kFactors * L); r += L) {
      const DoubleVec ignored = load_double(batch.live + r) == zero;
      const DoubleVec rest = zero_where(ignored, load_double(batch.sums.rest + r));
      product_less_one = at::vec::fmadd(product_less_one, rest, product_less_one + rest);
      const DoubleVec below_max = load_double(batch.sums.max + r) - load_double(batch.z + r);
      DoubleVec others = multiply_or_zero(DoubleVec(1 - eps), below_max);
      if (eps != 0) others = others - DoubleVec(share) * load_double(batch.dot + r);
      rest_of_loss = rest_of_loss + zero_where(ignored, others);
    }
    total = total + product_less_one.log1p() + rest_of_loss;
  }
  return sum_of(total);
}

// mass * log_sum - dot, rounded once where the processor can; without mass -dot, whatever the logarithm.
inline DoubleVec cost(const DoubleVec& mass, const DoubleVec& log_sum, const DoubleVec& dot) {
  const DoubleVec zero(0);
  return DoubleVec::blendv(at::vec::fmsub(mass, log_sum, dot), zero - dot, mass == zero);
}

// Writes what forward writes of each row and returns the sum of the losses.
template <typename T>
double finish_rows(const CrossEntropy<T>& p, RowBatch<T>& batch) {
  constexpr int64_t L = kLanes<double>;
  const double eps = p.label_smoothing, share = eps / static_cast<double>(p.layout.classes);
  alignas(64) double loss[kTile], nll[kTile], lse[kTile], entropy[kTile];
  DoubleVec total(0);
  for (int64_t r = 0; r < batch.rows; r++)
    batch.sums.rest[r] = std::isfinite(batch.sums.max[r]) ? batch.sums.rest[r] + batch.sums.lost[r] : kNaN;
  if (sums_at_once(p) && !p.stats) {
    store_state(p, batch);
    return sum_losses(p, batch);
  }
  for (int64_t r = 0; r < batch.rows; r += L) {
    const DoubleVec zero(0), max = load_double(batch.sums.max + r), rest = load_double(batch.sums.rest + r);
    const DoubleVec log_sum = rest.log1p(), live = load_double(batch.live + r);
    DoubleVec row_nll, row_loss;
    if (p.has_probabilities) {
      row_nll = cost(load_double(batch.q_sum + r), log_sum, load_double(batch.q_dot + r));
      row_loss = cost(load_double(batch.b_sum + r), log_sum, load_double(batch.dot + r));
    } else {
      row_nll = log_sum - (load_double(batch.z + r) - max);
      row_loss = multiply_or_zero(DoubleVec(1 - eps) * load_double(batch.weight + r), row_nll);
      if (eps != 0) {
        const DoubleVec smoothing = cost(DoubleVec(p.weight_sum), log_sum, load_double(batch.dot + r));
        row_loss = row_loss + DoubleVec(share) * smoothing;
      }
    }
    const DoubleVec row_lse = max + log_sum;
    if (p.z_loss != 0) row_loss = row_loss + DoubleVec(p.z_loss) * row_lse * row_lse;
    row_loss = zero_where(live == zero, row_loss);
    total = total + row_loss;
    row_loss.store(loss + r);
    if (!p.stats) continue;
    zero_where(live == zero, row_nll).store(nll + r);
    row_lse.store(lse + r);
    (log_sum - load_double(batch.sums.weighted + r) / (DoubleVec(1) + rest)).store(entropy + r);
  }
  store_state(p, batch);
  if (p.loss)
    for (int64_t r = 0; r < batch.rows; r++) store_value(loss[r], p.loss, p.loss_type, batch.number[r]);
  if (p.stats) {
    scatter(batch, lse, p.lse);
    scatter(batch, nll, p.nll);
    scatter(batch, entropy, p.entropy);
    scatter(batch, batch.sums.argmax, p.prediction);
  }
  return sums_at_once(p) ? sum_losses(p, batch) : sum_of(total);
}

// ---- gradient ----------------------------------------------------------------------------------------------------

// Fills the coefficients of the gradient and its value at the target.
template <typename T>
void prepare_gradients(const CrossEntropy<T>& p, RowBatch<T>& batch) {
  constexpr int64_t L = kLanes<double>;
  const double eps = p.label_smoothing, share = eps / static_cast<double>(p.layout.classes);
  const DoubleVec scale(p.logit_scale), zero(0), one(1);
  alignas(64) double g[kTile], g_lse[kTile], g_nll[kTile], g_entropy[kTile], entropy[kTile];
  alignas(64) T exp_at_target[kTile];
  gather_upstream(batch, p.grad_loss, g);
  if (p.grad_lse.data) gather_upstream(batch, p.grad_lse, g_lse);
  if (p.grad_nll.data) gather_upstream(batch, p.grad_nll, g_nll);
  if (p.grad_entropy.data) gather_upstream(batch, p.grad_entropy, g_entropy);
  if (p.grad_entropy.data) gather(batch, p.entropy, entropy);
  if (!p.has_probabilities)
    for (int64_t r = 0; r < batch.rows; r += kLanes<T>)
      exp_nonpositive(Vec<T>::loadu(batch.z + r) - Vec<T>::loadu(batch.sums.max + r)).store(exp_at_target + r);
  for (int64_t r = 0; r < batch.rows; r += L) {
    const DoubleVec max = load_double(batch.sums.max + r), rest = load_double(batch.sums.rest + r);
    const DoubleVec ignored = load_double(batch.live + r) == zero;
    const DoubleVec upstream = zero_where(ignored, load_double(g + r));
    const DoubleVec upstream_nll = p.grad_nll.data ? zero_where(ignored, load_double(g_nll + r)) : zero;
    const DoubleVec upstream_entropy = p.grad_entropy.data ? load_double(g_entropy + r) : zero;
    DoubleVec all = p.grad_lse.data ? load_double(g_lse + r) : zero;
    const bool needs_log = p.z_loss != 0 || p.grad_entropy.data || p.grad_probabilities;
    const DoubleVec log_sum = needs_log ? rest.log1p() : zero;
    if (p.z_loss != 0) all = all + upstream * DoubleVec(2.0 * p.z_loss) * (max + log_sum);
    if (p.grad_entropy.data) all = all + upstream_entropy * (log_sum - load_double(entropy + r));  // E - max
    DoubleVec one_hot = zero;
    if (p.has_probabilities) {
      all = all + upstream * load_double(batch.b_sum + r) + upstream_nll * load_double(batch.q_sum + r);
      store_double(upstream * DoubleVec(1 - eps), batch.kept + r);
      store_double(upstream_nll, batch.nll + r);
      store_double(log_sum, batch.log_sum + r);
    } else {
      one_hot = upstream * DoubleVec(1 - eps) * load_double(batch.weight + r) + upstream_nll;
      all = all + upstream * DoubleVec(share * p.weight_sum);
    }
    const DoubleVec uniform = upstream * DoubleVec(share);
    store_double(p.weight ? zero : uniform * scale, batch.uniform + r);
    if (p.weight) store_double(uniform * scale, batch.smooth + r);
    const DoubleVec inverse_sum = one / (one + rest);
    store_double((one_hot + all) * inverse_sum * scale, batch.alpha + r);
    if (p.grad_entropy.data) store_double(zero - upstream_entropy * inverse_sum * scale, batch.beta + r);
    if (p.has_probabilities) continue;
    const DoubleVec z = load_double(batch.z + r), d = z - max;
    const DoubleVec probability = load_double(exp_at_target + r) * inverse_sum;
    // p_y - 1: of a maximal class by its complement, which does not cancel; any other p_y is at most 1/2.
    const DoubleVec less_one = DoubleVec::blendv(probability - one, zero - rest * inverse_sum, d == zero);
    DoubleVec at_target = one_hot * less_one + multiply_or_zero(probability, all - upstream_entropy * d);
    if (eps != 0) at_target = at_target - (p.weight ? uniform * load_double(batch.weight + r) : uniform);
    if (p.softcap != 0) {
      const DoubleVec tanh_z = z / DoubleVec(p.softcap);
      at_target = at_target * (one - tanh_z * tanh_z);
    }
    (at_target * scale).store(batch.at_target + r);
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
