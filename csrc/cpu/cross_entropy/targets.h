// The targets of a batch of rows: their classes, weights and logits, and the gradient at them.
// Included only by units compiled per instruction set.
#pragma once

#include "logits.h"
#include "row_batch.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

// class_of(r) is the target of row r. By values and in loops of one thing each, which the compiler turns into vectors.
template <typename T, typename ClassOf>
void set_classes(const CrossEntropy<T>& p, RowBatch<T>& batch, const ClassOf& class_of) {
  const int64_t rows = batch.rows, ignore_index = p.options.ignore_index;
  int64_t ignored_rows = 0;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t y = class_of(r);
    batch.y[r] = y == ignore_index ? -1 : y;
  }
  for (int64_t r = 0; r < rows; r++) ignored_rows += batch.y[r] < 0;
  for (int64_t r = 0; r < rows; r++) batch.live[r] = batch.y[r] < 0 ? 0.0 : 1.0;
  batch.any_ignored = ignored_rows > 0;
}

// From the classes of the row to those of the logits.
template <typename T>
void move_to_part(const CrossEntropy<T>& p, RowBatch<T>& batch) {
  if (p.layout.classes == p.all_classes) return;
  for (int64_t r = 0; r < batch.rows; r++) {
    const int64_t y = batch.y[r] - p.first_class;
    batch.y[r] = batch.live[r] != 0 && y >= 0 && y < p.layout.classes ? y : -1;
  }
}

template <typename T, typename Index>
void load_classes(const CrossEntropy<T>& p, RowBatch<T>& batch, const Index* index) {
  const Index* const first = index + batch.number[0];
  if (batch.consecutive)
    set_classes(p, batch, [first](int64_t r) { return static_cast<int64_t>(first[r]); });
  else
    set_classes(p, batch, [&](int64_t r) { return static_cast<int64_t>(index[batch.number[r]]); });
}

template <typename T>
void load_row_weights(const CrossEntropy<T>& p, RowBatch<T>& batch) {
  if (!p.row_weight) return;
  for (int64_t r = 0; r < batch.rows; r++) batch.row_weight[r] = batch.live[r] == 0 ? 0 : p.row_weight[batch.number[r]];
}

// The targets of a batch whose `rows` and `number` are set, without their logits.
template <typename T>
void load_targets(const CrossEntropy<T>& p, RowBatch<T>& batch) {
  if (p.has_probabilities) {
    std::fill(batch.y, batch.y + batch.rows, int64_t{-1});
    std::fill(batch.live, batch.live + batch.rows, 1.0);
    return;
  }
  if (p.index)
    load_classes(p, batch, p.index);
  else
    load_classes(p, batch, p.index_u8);
  if (p.weight)
    for (int64_t r = 0; r < batch.rows; r++)
      batch.weight[r] = batch.y[r] < 0 ? 0 : p.weight[batch.y[r] - p.first_class];
  else
    std::fill(batch.weight, batch.weight + batch.rows, 1.0);
  move_to_part(p, batch);
}

// The logits of the targets, and their slopes; class 0 of row r is element first[r].
template <typename T>
void load_target_logits(const CrossEntropy<T>& p, RowBatch<T>& batch, const int64_t* first) {
  if (p.has_probabilities) return;
  const T* const own = needs_no_copy(p) ? static_cast<const T*>(p.logits) : nullptr;
  for (int64_t r = 0; r < batch.rows; r++) {
    const int64_t at = first[r] + batch.y[r] * p.layout.class_stride[kLogits];
    const OneLogit<T> of = batch.y[r] < 0 ? OneLogit<T>{0, 1} : own ? OneLogit<T>{own[at], 1} : load_logit(p, at);
    batch.z[r] = of.z;
    batch.slope[r] = of.slope;
  }
}

// Fills the lanes beyond the last row.
template <typename T>
void close_batch(RowBatch<T>& batch) {
  const int64_t padded = round_up(batch.rows, std::max(kLanes<double>, kLanes<T>));
  for (int64_t r = batch.rows; r < padded; r++) {
    batch.z[r] = batch.slope[r] = batch.sums.max[r] = 0;
    batch.live[r] = batch.weight[r] = batch.row_weight[r] = batch.sums.rest[r] = batch.sums.lost[r] = 0;
    batch.dot[r] = batch.b_sum[r] = batch.q_dot[r] = batch.q_sum[r] = batch.sums.weighted[r] = 0;
  }
}

// Whether the gradient of an ignored row is 0: it has no statistics, or none of them has a gradient.
template <typename T>
bool ignored_has_no_gradient(const CrossEntropy<T>& p) {
  return p.options.skips_ignored || (!p.grad_lse.given && !p.grad_entropy.given);
}

// Whether the logits of an ignored row matter to nothing.
template <typename T>
bool ignored_needs_no_logits(const CrossEntropy<T>& p) {
  return p.options.skips_ignored || (ignored_has_no_gradient(p) && !p.stats);
}

// Writes the gradient of class y of each row, which the loops over the classes leave aside; class 0 of row r is element
// first[r].
template <typename T>
void write_at_targets(const CrossEntropy<T>& p, const RowBatch<T>& batch, const int64_t* first) {
  const int64_t class_stride = p.layout.class_stride[kGradLogits];
  T* const own = is_own<T>(p.logits_type) ? static_cast<T*>(p.grad_logits) : nullptr;
  for (int64_t r = 0; r < batch.rows; r++) {
    if (batch.y[r] < 0) continue;
    const int64_t at = first[r] + batch.y[r] * class_stride;
    if (own)
      own[at] = static_cast<T>(batch.at_target[r]);
    else
      store_value(batch.at_target[r], p.grad_logits, p.logits_type, at);
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
