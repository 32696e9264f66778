// Cross entropy of rows from parts of their classes, which other calls have summed (row_part.h).
// Included only by units compiled per instruction set.
#pragma once

#include "targets.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

// The sums over all classes, from the parts.
template <typename T>
void load_parts(const CrossEntropy<T>& p, RowBatch<T>& batch) {
  for (int64_t r = 0; r < batch.rows; r++) {
    const RowPart of = merged_part(p, batch.number[r]);
    batch.z[r] = static_cast<T>(of.target);
    batch.sums.max[r] = static_cast<T>(of.max);
    batch.sums.rest[r] = of.rest;
    batch.sums.lost[r] = 0;
    batch.sums.weighted[r] = of.weighted;
    batch.sums.argmax[r] = static_cast<int64_t>(of.argmax < 0 ? -1 - of.argmax : of.argmax);
    batch.dot[r] = of.dot;
    batch.b_sum[r] = of.b_sum;
    batch.q_dot[r] = of.q_dot;
    batch.q_sum[r] = of.q_sum;
  }
}

// The rows [begin, end).
template <typename T>
double visit_all_parts(const CrossEntropy<T>& p, int64_t begin, int64_t end) {
  LongSum<double> loss;
  for (int64_t first = begin; first < end; first += kTile) {
    RowBatch<T> batch;
    batch.rows = std::min(kTile, end - first);
    for (int64_t r = 0; r < batch.rows; r++) batch.number[r] = first + r;
    load_targets(p, batch);
    load_row_weights(p, batch);
    load_parts(p, batch);
    close_batch(batch);
    loss.add(finish_rows(p, batch));
  }
  return loss.value();
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
