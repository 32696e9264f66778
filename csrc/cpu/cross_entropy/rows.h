// Cross entropy of rows whose classes are adjacent: SIMD lanes run along the classes.
// Included only by units compiled per instruction set.
#pragma once

#include "../row_visit.h"
#include "gradient.h"
#include "loss_terms.h"
#include "targets.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

// Rows are taken together up to this many elements and rows, so that what is computed once per row fills vectors.
constexpr int64_t kBatchElements = 8192, kBatchRows = 16;

template <typename T>
RowExps<T> exps_of_row(const CrossEntropy<T>& p, const Position& at, const ExpBuffers<T>& exp_buffers, int64_t r) {
  return exp_buffers.row(r, p.grad_logits, at.offset[kGradLogits]);
}

// The sums over the classes of row r of the batch.
template <typename T>
void reduce_row(const CrossEntropy<T>& p, const Position& at, RowBatch<T>& batch, int64_t r,
                const ExpBuffers<T>& exp_buffers) {
  BlockBuffer<T> q_block;
  RowTerms<T> terms;
  const int64_t first = at.offset[kLogits];
  const auto load = [&](int64_t c, int64_t n, T* buffer) {
    return load_row_block<T>(p, first + c, n, buffer, nullptr);
  };
  const auto add_terms = [&](T max, const T* z, int64_t c, int64_t n) {
    if (!has_terms(p)) return;
    terms.move_to(max);
    add_row_terms(terms, p, at, z, n, c, q_block.data);
  };
  const RowExps<T> exps = exps_of_row(p, at, exp_buffers, r);
  const int64_t classes = p.layout.classes;
  const bool direct = needs_no_copy(p);
  batch.sums.set(r, p.stats
                        ? reduce_row<true>(classes, direct, exps, p.logits, p.logits_type, first, load, add_terms)
                        : reduce_row<false>(classes, direct, exps, p.logits, p.logits_type, first, load, add_terms));
  set_terms(batch, r, terms);
}

// The gradient of row r from its exponentials.
template <typename T>
void write_gradient_from_exps(const CrossEntropy<T>& p, const Position& at, const RowBatch<T>& batch, int64_t r,
                              const RowExps<T>& exps) {
  BlockBuffer<T> q_block;
  const bool direct = needs_no_copy(p);
  const Store store = exps.in_result ? Store::kCached : store_of(p);
  const GradientTerms has = gradient_terms(p);
  GradientVectors<T> g = broadcast(batch, r);
  const double alpha = batch.alpha[r], max = batch.sums.max[r];
  for (int64_t c = 0, n, block = 0; c < p.layout.classes; c += n, block++) {
    n = next_block<T>(p.layout.classes - c, p.layout.classes, direct);
    const double shift = exps.shifts[block];
    g.alpha = Vec<T>(static_cast<T>(shift == max ? alpha : alpha * std::exp(shift - max)));
    const T* const e = exps.data + c;
    const auto write = [&](const auto& value) {
      write_run<T>(p.grad_logits, p.logits_type, at.offset[kGradLogits] + c, n, store, value);
    };
    if (!has.any()) {
      write([g, e](int64_t i, int64_t count) {
        return plain_gradient<VectorMath<T>>(g, load_converted<T>(e + i, count));
      });
    } else if (!has.probabilities) {
      write([g, e, w = p.weight + c](int64_t i, int64_t count) {
        return plain_gradient<VectorMath<T>>(g, load_converted<T>(e + i, count)) - g.smooth * Vec<T>::loadu(w + i);
      });
    } else {
      const T* const q = load_probabilities(p, at.offset[kProbabilities] + c, n, q_block.data);
      if (mass_is_probability(p) && p.options.logit_scale == 1)  // nll_coef is 0: no gradient of nll comes with forward
        write([g, e, q](int64_t i, int64_t count) {
          return plain_gradient<VectorMath<T>>(g, load_converted<T>(e + i, count)) -
                 load_converted<T>(q + i, count) * g.q_coef;
        });
      else
        write([&p, g, has, e, c, q](int64_t i, int64_t count) {
          return gradient_without_logit<VectorMath<T>>(has, g, load_converted<T>(e + i, count),
                                                       load_converted<T>(q + i, count), load_weight(p, c + i),
                                                       Vec<T>(p.options.logit_scale));
        });
    }
  }
}

// The gradients of row r from its logits.
template <typename T>
void write_gradient_from_logits(const CrossEntropy<T>& p, const Position& at, const RowBatch<T>& batch, int64_t r) {
  constexpr int64_t L = kLanes<T>;
  BlockBuffer<T> z_block, q_block, slope_block;
  T* const slope = needs_slopes(p) ? slope_block.data : nullptr;
  const Store store = store_of(p);
  const GradientVectors<T> g = broadcast(batch, r);
  const GradientTerms has = gradient_terms(p);
  const bool direct = needs_no_copy(p) && !has.any() && !p.grad_probabilities;
  for (int64_t c = 0, n; c < p.layout.classes; c += n) {
    n = std::min(kBlock<T>, p.layout.classes - c);
    const int64_t from = at.offset[kLogits] + c;
    const Ahead ahead = ahead_of<T>(p.logits, p.logits_type, from + n);
    const T* const z =
        direct ? static_cast<const T*>(p.logits) + from : load_row_block(p, from, n, z_block.data, slope);
    if (!has.any() && p.grad_logits)
      write_run<T>(p.grad_logits, p.logits_type, at.offset[kGradLogits] + c, n, store,
                   [g, z, ahead](int64_t i, int64_t count) {
                     ahead.fetch(i / L);
                     return plain_gradient<VectorMath<T>>(g, exp_nonpositive(load_converted<T>(z + i, count) - g.max));
                   });
    if (p.has_probabilities) {
      load_run(p.probabilities, p.probabilities_type, at.offset[kProbabilities] + c, n, q_block.data);
      std::fill(q_block.data + n, q_block.data + round_up(n, L), T(0));
    }
    if (p.grad_probabilities)
      write_run<T>(p.grad_probabilities, p.probabilities_type, at.offset[kGradProbabilities] + c, n, store,
                   [&p, g, z, c](int64_t i, int64_t count) {
                     return probability_gradient<VectorMath<T>>(g, load_converted<T>(z + i, count) - g.max,
                                                                load_weight(p, c + i));
                   });
    if (has.any() && p.grad_logits)
      write_run<T>(p.grad_logits, p.logits_type, at.offset[kGradLogits] + c, n, store,
                   [&p, has, g, z, c, ahead, slope, q = q_block.data](int64_t i, int64_t count) {
                     ahead.fetch(i / L);
                     const Vec<T> qi = p.has_probabilities ? Vec<T>::loadu(q + i) : Vec<T>(0);
                     return full_gradient(p, has, g, load_converted<T>(z + i, count), qi, load_weight(p, c + i),
                                          slope + i);
                   });
  }
}

// The rows [first, first + rows) of the layout.
template <typename T>
double visit_rows(const CrossEntropy<T>& p, int64_t first, int64_t rows, const ExpBuffers<T>& exp_buffers) {
  RowBatch<T> batch;
  Position at[kBatchRows];
  int64_t logits_at[kBatchRows], gradient_at[kBatchRows];
  batch.rows = rows;
  for (int64_t r = 0; r < rows; r++) {
    at[r] = locate(p.layout, first + r);
    logits_at[r] = at[r].offset[kLogits];
    gradient_at[r] = at[r].offset[kGradLogits];
    batch.number[r] = at[r].offset[kRow];
    batch.consecutive = batch.consecutive && batch.number[r] == batch.number[0] + r;
  }
  load_targets(p, batch);
  load_row_weights(p, batch);
  load_target_logits(p, batch, logits_at);
  const bool skips = ignored_needs_no_logits(p);
  const auto skipped = [&](int64_t r) { return skips && batch.live[r] == 0; };
  double loss = 0;
  close_batch(batch);
  if (p.forward) {
    for (int64_t r = 0; r < rows; r++) {
      if (skipped(r)) {
        LogSumExp<T> none;
        none.max = 0;
        batch.sums.set(r, none);
        set_terms(batch, r, {});
      } else {
        reduce_row(p, at[r], batch, r, exp_buffers);
      }
    }
    loss = finish_rows(p, batch);
  } else {
    load_state(p, batch);
  }
  if (!p.grad_logits && !p.grad_probabilities) return loss;
  prepare_gradients(p, batch);
  for (int64_t r = 0; r < rows; r++) {
    if (batch.live[r] == 0 && ignored_has_no_gradient(p)) {
      std::memset(address(p.grad_logits, p.logits_type, gradient_at[r]), 0, p.layout.classes * size_of(p.logits_type));
    } else if (exp_buffers.active()) {
      write_gradient_from_exps(p, at[r], batch, r, exps_of_row(p, at[r], exp_buffers, r));
    } else {
      write_gradient_from_logits(p, at[r], batch, r);
    }
  }
  if (p.grad_logits) write_at_targets(p, batch, gradient_at);
  return loss;
}

// Rows that are visited together.
template <typename T>
int64_t batch_rows(const CrossEntropy<T>& p) {
  return std::clamp<int64_t>(kBatchElements / std::max<int64_t>(p.layout.classes, 1), 1, kBatchRows);
}

template <typename T>
ExpBuffers<T> exp_buffers_of(const CrossEntropy<T>& p, Scratch& scratch) {
  const bool stores_exps = p.forward && p.grad_logits && !LogitTransform(p.options).is_capped();
  return {stores_exps, needs_no_copy(p), p.layout.classes, batch_rows(p), scratch};
}

template <typename T>
double visit_all_rows(const CrossEntropy<T>& p, int64_t begin, int64_t end, Scratch& scratch) {
  const int64_t batch = batch_rows(p);
  const ExpBuffers<T> exp_buffers = exp_buffers_of(p, scratch);
  LongSum<double> loss;
  for (int64_t first = begin; first < end; first += batch)
    loss.add(visit_rows(p, first, std::min(batch, end - first), exp_buffers));
  fence_non_temporal();
  return loss.value();
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
