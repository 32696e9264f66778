// What a part of a row's classes adds to its loss, and how two parts become one: blocks of the vocabulary one after the
// other, or one on each rank. The same on every device, in double, so that merging rounds nothing that counts.
//
// A part is written as a column of doubles, [fields, rows]:
//
//   0 max, 1 rest        the state (params.h) of these classes; -inf and 0 where all their logits are -inf
//   2 target             the logit of the target class, 0 where it is in another part
//   3 dot, 4 b_sum       with smoothing or probability targets: the sums of row_math.h, of z - max, or of z where max is
//                        not finite
//   5 q_dot, 6 q_sum     with probability targets
//   then, with statistics:
//   weighted             sum exp(z_c - max) (z_c - max)
//   argmax               a first class of largest logit, counted in the whole row; -1 less a first class whose logit is
//                        NaN, if there is one
#pragma once

#include <cmath>

#include "params.h"

namespace softmax_ext {

struct PartFields {
  bool terms, probabilities, stats;

  SOFTMAX_EXT_INLINE int64_t count() const { return 3 + 2 * terms + 2 * probabilities + 2 * stats; }
};

template <typename T>
SOFTMAX_EXT_INLINE PartFields part_fields(const CrossEntropyParams<T>& p) {
  return {p.has_probabilities || p.options.label_smoothing != 0, p.has_probabilities, p.stats};
}

struct RowPart {
  double max = -INFINITY, rest = 0, target = 0;
  double dot = 0, b_sum = 0, q_dot = 0, q_sum = 0;
  double weighted = 0, argmax = 0;

  SOFTMAX_EXT_INLINE static RowPart load(const double* part, const PartFields& has, int64_t rows, int64_t row) {
    Column<const double> column{part + row, rows};
    RowPart of;
    of.max = column.next();
    of.rest = column.next();
    of.target = column.next();
    if (has.terms) of.dot = column.next();
    if (has.terms) of.b_sum = column.next();
    if (has.probabilities) of.q_dot = column.next();
    if (has.probabilities) of.q_sum = column.next();
    if (has.stats) of.weighted = column.next();
    if (has.stats) of.argmax = column.next();
    return of;
  }
  SOFTMAX_EXT_INLINE void store(double* part, const PartFields& has, int64_t rows, int64_t row) const {
    Column<double> column{part + row, rows};
    column.next() = max;
    column.next() = rest;
    column.next() = target;
    if (has.terms) column.next() = dot;
    if (has.terms) column.next() = b_sum;
    if (has.probabilities) column.next() = q_dot;
    if (has.probabilities) column.next() = q_sum;
    if (has.stats) column.next() = weighted;
    if (has.stats) column.next() = argmax;
  }

  // Adds the classes that follow.
  SOFTMAX_EXT_INLINE void merge(const RowPart& next) {
    const bool raises = next.max > max || next.max != next.max;
    const double low_max = raises ? max : next.max, low_rest = raises ? rest : next.rest;
    max = raises ? next.max : max;
    const double step = low_max - max, finite_step = step - step == 0 ? step : 0;
    const double scale = low_max == -INFINITY ? 0 : std::exp(step), low_sum = 1 + low_rest;
    rest = (raises ? next.rest : rest) + scale * low_sum;  // the largest logit of the lower is one of the others now
    target += next.target;
    dot = dot + next.dot + (raises ? b_sum : next.b_sum) * finite_step;
    q_dot = q_dot + next.q_dot + (raises ? q_sum : next.q_sum) * finite_step;
    b_sum += next.b_sum;
    q_sum += next.q_sum;
    const double low_weighted = raises ? weighted : next.weighted;
    weighted = (raises ? next.weighted : weighted) + (scale == 0 ? 0 : scale * (low_weighted + step * low_sum));
    argmax = argmax < 0 || (next.argmax >= 0 && !raises) ? argmax : next.argmax;
  }

 private:
  // A field after the other.
  template <typename Double>
  struct Column {
    Double* at;
    int64_t rows;

    SOFTMAX_EXT_INLINE Double& next() {
      Double& value = *at;
      at += rows;
      return value;
    }
  };
};

// Writes a row of `part`, merged with what the parts before it have.
template <typename T>
SOFTMAX_EXT_INLINE void store_part(const CrossEntropyParams<T>& p, const RowPart& part, int64_t row) {
  const PartFields has = part_fields(p);
  RowPart all = part;
  if (p.parts) {
    all = RowPart::load(p.parts, has, p.rows, row);
    all.merge(part);
  }
  all.store(p.part, has, p.rows, row);
}

// The row of parts [parts, fields, rows].
template <typename T>
SOFTMAX_EXT_INLINE RowPart merged_part(const CrossEntropyParams<T>& p, int64_t row) {
  const PartFields has = part_fields(p);
  RowPart of = RowPart::load(p.parts, has, p.rows, row);
  for (int64_t i = 1; i < p.part_count; i++)
    of.merge(RowPart::load(p.parts + i * has.count() * p.rows, has, p.rows, row));
  return of;
}

}  // namespace softmax_ext
