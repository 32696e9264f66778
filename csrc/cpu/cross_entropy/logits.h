// The logits of a cross entropy as the kernels see them, in the arithmetic's type and transformed; and probabilities.
// Included only by units compiled per instruction set.
#pragma once

#include "../../row_math.h"
#include "../kernel_table.h"
#include "../tile_io.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

// Whether a gradient needs the slopes of the logits (capped_slope).
template <typename T>
bool needs_slopes(const CrossEntropy<T>& p) {
  return p.grad_logits && LogitTransform(p.options).is_capped();
}

// z of the run in place (LogitTransform); and the slopes of its logits, if `slope` is given: they are capped then.
template <typename T>
void transform_run(const CrossEntropy<T>& p, T* z, int64_t padded, T* slope) {
  constexpr int64_t L = kLanes<T>;
  const LogitTransform<T> transform(p.options);
  if (slope) {
    const Vec<T> size(transform.size), size_lost(transform.size_lost);
    for (int64_t i = 0; i < padded; i += L)
      capped_slope<VectorMath<T>>(Vec<T>::loadu(z + i), size, size_lost).store(slope + i);
  }
  if (transform.is_capped()) {
    const Vec<T> inner_scale(transform.inner_scale), cap(transform.cap);
    for (int64_t i = 0; i < padded; i += L)
      capped_logit<VectorMath<T>>(Vec<T>::loadu(z + i), inner_scale, cap).store(z + i);
  } else if (!transform.is_identity()) {
    const Vec<T> scale(transform.scale);
    for (int64_t i = 0; i < padded; i += L) (Vec<T>::loadu(z + i) * scale).store(z + i);
  }
}

template <typename T>
struct OneLogit {
  T z, slope;  // 1 unless it is needed
};

// Of one class, by the same instructions as its whole vector: a target that is the maximum must equal it.
template <typename T>
OneLogit<T> load_logit(const CrossEntropy<T>& p, int64_t at) {
  alignas(64) T z[kLanes<T>] = {static_cast<T>(load_value(p.logits, p.logits_type, at))}, slope[kLanes<T>] = {1};
  transform_run(p, z, kLanes<T>, needs_slopes(p) ? slope : nullptr);
  return {z[0], slope[0]};
}

template <typename T>
bool needs_no_copy(const CrossEntropy<T>& p) {
  return is_own<T>(p.logits_type) && LogitTransform(p.options).is_identity();
}

// z of the classes [at, at + n) of a row, padded with -inf to whole vectors; in `buffer` unless they can be used in
// place. And their slopes, if `slope` is given.
template <typename T>
const T* load_row_block(const CrossEntropy<T>& p, int64_t at, int64_t n, T* buffer, T* slope) {
  const int64_t padded = round_up(n, kLanes<T>);
  if (padded == n && needs_no_copy(p)) return static_cast<const T*>(p.logits) + at;
  load_run(p.logits, p.logits_type, at, n, buffer);
  std::fill(buffer + n, buffer + padded, T(0));
  transform_run(p, buffer, padded, slope);
  std::fill(buffer + n, buffer + padded, -kInfinity<T>);
  return buffer;
}

// z of the classes [first, first + classes) of a tile, and their slopes, if `slope` is given.
template <typename T>
void load_tile_block(const CrossEntropy<T>& p, const Position& at, int64_t first, int64_t classes, T* buffer,
                     T* slope) {
  load_operand_tile(p.layout, kLogits, p.logits, p.logits_type, at, first, classes, buffer);
  if (LogitTransform(p.options).is_identity()) return;
  for (int64_t c = 0; c < classes; c++)
    transform_run(p, buffer + c * kTile, round_up(at.rows, kLanes<T>), slope ? slope + c * kTile : nullptr);
}

// Probabilities [at, at + n); in `buffer` unless they are of type T. Not padded.
template <typename T>
const T* load_probabilities(const CrossEntropy<T>& p, int64_t at, int64_t n, T* buffer) {
  if (is_own<T>(p.probabilities_type)) return static_cast<const T*>(p.probabilities) + at;
  load_run(p.probabilities, p.probabilities_type, at, n, buffer);
  return buffer;
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
