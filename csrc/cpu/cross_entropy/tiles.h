// Cross entropy of tiles: the rows lie in the lanes, one row in each.
// Included only by units compiled per instruction set.
#pragma once

#include "gradient.h"
#include "loss_terms.h"
#include "targets.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

// The buffers of a tile: logits or exponentials; probabilities, and their gradient, where there are any; and behind them
// the slopes of the logits, where they are needed.
enum TileBuffer { kZ, kQ, kGradQ };

template <typename T>
int buffers_before_slopes(const CrossEntropy<T>& p) {
  return p.grad_probabilities ? 3 : p.has_probabilities ? 2 : 1;
}

template <typename T>
T* slopes_of(const CrossEntropy<T>& p, const TileBuffers<T>& buffers) {
  return needs_slopes(p) ? buffers.get(buffers_before_slopes(p)) : nullptr;
}

// What the visit of a tile works in.
template <typename T>
struct TileScratch {
  TileBuffers<T> buffers;
  RowTerms<T>* terms;  // of its rows, where there are any

  TileScratch(const CrossEntropy<T>& p, Scratch& scratch)
      : buffers(p.layout, buffers_before_slopes(p) + needs_slopes(p), scratch),
        terms(scratch.take<RowTerms<T>>(has_terms(p) ? kTile : 0)) {}
};

// Whether the logits in the buffer give way to their exponentials.
template <typename T>
bool holds_exps(const CrossEntropy<T>& p, const TileBuffers<T>& buffers) {
  return p.forward && p.grad_logits && !LogitTransform(p.options).is_capped() && buffers.whole();
}

// Loads z, and q where the target is probabilities, of the classes [first, first + classes) of a tile; for a gradient
// also the slopes, where they are needed.
template <typename T>
void load_tile_blocks(const CrossEntropy<T>& p, const Position& at, int64_t first, int64_t classes,
                      const TileBuffers<T>& buffers, bool for_gradient) {
  load_tile_block(p, at, first, classes, buffers.get(kZ), for_gradient ? slopes_of(p, buffers) : nullptr);
  if (!p.has_probabilities) return;
  load_operand_tile(p.layout, kProbabilities, p.probabilities, p.probabilities_type, at, first, classes,
                    buffers.get(kQ));
}

// What the vector of rows r of the next tile needs, from class `first` on.
template <typename T>
Ahead ahead_of_tile(const CrossEntropy<T>& p, const Position& at, int64_t first, int64_t r) {
  const int64_t bytes = size_of(p.logits_type), class_stride = p.layout.class_stride[kLogits];
  const int64_t inner_stride = p.layout.inner_stride[kLogits];
  const int64_t next = at.offset[kLogits] + first * class_stride + (kTile + r) * inner_stride;
  const int64_t step = inner_stride == 1 ? class_stride : kLanes<T>;  // else rows of few adjacent classes
  return {static_cast<const char*>(p.logits) + next * bytes, step * bytes};
}

// Adds the terms of the classes [first, first + classes) of a tile, whose sums hold the classes before.
template <typename T>
void add_tile_terms(const CrossEntropy<T>& p, const Position& at, const RowBatch<T>& batch, RowTerms<T>* terms,
                    int64_t first, int64_t classes, const TileBuffers<T>& buffers) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t r = 0; r < at.rows; r += L) {
    const T* const z = buffers.get(kZ) + r;
    const Vec<T> so_far = first == 0 ? Vec<T>(-kInfinity<T>) : Vec<T>::loadu(batch.sums.max + r);
    alignas(64) T max[L];
    Vec<T> none(-1);
    max_of_columns<false>(z, classes, so_far, none).store(max);
    for (int64_t i = 0; i < L; i++) terms[r + i].move_to(max[i]);
    add_column_terms(terms + r, p, z, p.has_probabilities ? buffers.get(kQ) + r : nullptr, classes, first);
  }
}

// The first block of the tile is loaded already.
template <typename T>
void reduce_tile(const CrossEntropy<T>& p, const Position& at, RowBatch<T>& batch, const TileScratch<T>& scratch) {
  const auto& [buffers, terms] = scratch;
  const bool has_exps = holds_exps(p, buffers);
  if (has_terms(p)) std::fill(terms, terms + kTile, RowTerms<T>{});
  if (p.layout.classes == 0)
    for (int64_t r = 0; r < at.rows; r++) batch.sums.set(r, {});
  T* const z = buffers.get(kZ);
  for (int64_t c = 0; c < p.layout.classes; c += buffers.classes()) {
    const int64_t n = std::min(buffers.classes(), p.layout.classes - c);
    if (c > 0) load_tile_blocks(p, at, c, n, buffers, false);
    // Before the exponentials take the place of the logits.
    if (has_terms(p)) add_tile_terms(p, at, batch, terms, c, n, buffers);
    const auto ahead = [&](int64_t r) { return ahead_of_tile(p, at, c, r); };
    if (p.stats && has_exps)
      add_tile<true, true>(batch.sums, at.rows, z, n, c, z, ahead);
    else if (p.stats)
      add_tile<true, false>(batch.sums, at.rows, z, n, c, z, ahead);
    else if (has_exps)
      add_tile<false, true>(batch.sums, at.rows, z, n, c, z, ahead);
    else
      add_tile<false, false>(batch.sums, at.rows, z, n, c, z, ahead);
  }
  if (!has_terms(p)) return;
  for (int64_t r = 0; r < at.rows; r++) set_terms(batch, r, terms[r]);
}

// tile[i, r] = value(r)(i) for the vector of rows r and class i.
template <typename T, typename Value>
void fill_tile(T* tile, int64_t classes, int64_t rows, const Value& value) {
  for (int64_t r = 0; r < rows; r += kLanes<T>) {
    const auto value_of_class = value(r);
    for (int64_t i = 0; i < classes; i++) value_of_class(i).store(tile + i * kTile + r);
  }
}

// Writes the gradient of class y of each row to the tile [classes, kTile].
template <typename T>
void put_at_targets(const RowBatch<T>& batch, T* tile) {
  for (int64_t r = 0; r < batch.rows; r++)
    if (batch.y[r] >= 0) tile[batch.y[r] * kTile + r] = static_cast<T>(batch.at_target[r]);
}

// The buffers hold the tile's exponentials, or the logits of its first block.
template <typename T>
void write_tile_gradients(const CrossEntropy<T>& p, const Position& at, const RowBatch<T>& batch,
                          const TileBuffers<T>& buffers) {
  const GradientTerms has = gradient_terms(p);
  const Layout& layout = p.layout;
  const Vec<T> none(0);
  const bool masks = batch.any_ignored && ignored_has_no_gradient(p), has_exps = holds_exps(p, buffers);
  const auto weight_of = [&p](int64_t c) { return Vec<T>(p.weight ? p.weight[c] : T(1)); };
  T* const z = buffers.get(kZ);
  const T* const q = p.has_probabilities ? buffers.get(kQ) : nullptr;
  const T* const slopes = slopes_of(p, buffers);
  for (int64_t c = 0; c < layout.classes; c += buffers.classes()) {
    const int64_t n = std::min(buffers.classes(), layout.classes - c);
    if (!buffers.whole()) load_tile_blocks(p, at, c, n, buffers, true);
    if (p.grad_probabilities) {
      T* const grad_q = buffers.get(kGradQ);
      fill_tile(grad_q, n, at.rows, [&](int64_t r) {
        return [g = load_rows(batch, r), zr = z + r, c, weight_of](int64_t i) {
          return probability_gradient<VectorMath<T>>(g, Vec<T>::loadu(zr + i * kTile) - g.max, weight_of(c + i));
        };
      });
      store_operand_tile(layout, kGradProbabilities, grad_q, p.grad_probabilities, p.probabilities_type, at, c, n,
                         store_of(p));
    }
    if (!p.grad_logits) continue;
    const auto write = [&](const auto& value) {
      fill_tile(z, n, at.rows, [&](int64_t r) {
        alignas(64) T live[kLanes<T>];
        if (masks) std::copy(batch.live + r, batch.live + r + kLanes<T>, live);
        const Ahead ahead = has_exps ? Ahead::nothing(z) : ahead_of_tile(p, at, c, r);
        const Vec<T> dead = masks ? Vec<T>::loadu(live) == none : none;
        return [ahead, dead, masks, c, r, value, g = load_rows(batch, r), zr = z + r, qr = q ? q + r : q](int64_t i) {
          ahead.fetch(i);
          const Vec<T> x = Vec<T>::loadu(zr + i * kTile);
          const Vec<T> v = value(g, x, qr ? Vec<T>::loadu(qr + i * kTile) : Vec<T>(0), c + i, i * kTile + r);
          return masks ? Vec<T>::blendv(v, Vec<T>(0), dead) : v;
        };
      });
    };
    if (!has.any() && has_exps)
      write([&](const GradientVectors<T>& g, const Vec<T>& e, const Vec<T>&, int64_t, int64_t) {
        return plain_gradient<VectorMath<T>>(g, e);
      });
    else if (!has.any())
      write([&](const GradientVectors<T>& g, const Vec<T>& x, const Vec<T>&, int64_t, int64_t) {
        return plain_gradient<VectorMath<T>>(g, exp_nonpositive(x - g.max));
      });
    else if (has_exps)
      write([&](const GradientVectors<T>& g, const Vec<T>& e, const Vec<T>& y, int64_t i, int64_t) {
        return gradient_without_logit<VectorMath<T>>(has, g, e, y, weight_of(i), Vec<T>(p.options.logit_scale));
      });
    else
      write([&](const GradientVectors<T>& g, const Vec<T>& x, const Vec<T>& y, int64_t i, int64_t at) {
        return full_gradient(p, has, g, x, y, weight_of(i), slopes + at);
      });
    if (buffers.whole()) put_at_targets(batch, z);
    store_operand_tile(layout, kGradLogits, z, p.grad_logits, p.logits_type, at, c, n, store_of(p));
  }
}

// The logits of the targets of a tile, and their slopes, from the buffers where it holds all classes.
template <typename T>
void load_tile_target_logits(const CrossEntropy<T>& p, const Position& at, RowBatch<T>& batch,
                             const TileBuffers<T>& buffers) {
  if (p.has_probabilities) return;
  if (!buffers.whole()) {
    int64_t first[kTile];
    for (int64_t r = 0; r < at.rows; r++) first[r] = at.offset[kLogits] + r * p.layout.inner_stride[kLogits];
    load_target_logits(p, batch, first);
    return;
  }
  const T *const z = buffers.get(kZ), *const slopes = slopes_of(p, buffers);
  for (int64_t r = 0; r < at.rows; r++) {
    batch.z[r] = batch.y[r] < 0 ? T(0) : z[batch.y[r] * kTile + r];
    batch.slope[r] = batch.y[r] < 0 || !slopes ? T(1) : slopes[batch.y[r] * kTile + r];
  }
}

template <typename T>
double visit_tile(const CrossEntropy<T>& p, int64_t unit, const TileScratch<T>& scratch) {
  const TileBuffers<T>& buffers = scratch.buffers;
  const Position at = locate(p.layout, unit);
  RowBatch<T> batch;
  batch.rows = at.rows;
  batch.consecutive = p.layout.inner_stride[kRow] == 1;
  for (int64_t r = 0; r < at.rows; r++) batch.number[r] = at.offset[kRow] + r * p.layout.inner_stride[kRow];
  load_targets(p, batch);
  load_row_weights(p, batch);
  load_tile_blocks(p, at, 0, std::min(buffers.classes(), p.layout.classes), buffers, buffers.whole());
  load_tile_target_logits(p, at, batch, buffers);
  double loss = 0;
  if (p.forward)
    reduce_tile(p, at, batch, scratch);
  else
    load_state(p, batch);
  close_batch(batch);
  if (p.forward) loss = finish_rows(p, batch);
  if (!p.grad_logits && !p.grad_probabilities) return loss;
  prepare_gradients(p, batch);
  write_tile_gradients(p, at, batch, buffers);
  if (!p.grad_logits || buffers.whole()) return loss;
  int64_t gradient_at[kTile];
  for (int64_t r = 0; r < at.rows; r++)
    gradient_at[r] = at.offset[kGradLogits] + r * p.layout.inner_stride[kGradLogits];
  write_at_targets(p, batch, gradient_at);
  return loss;
}

template <typename T>
double visit_all_tiles(const CrossEntropy<T>& p, int64_t begin, int64_t end, Scratch& scratch) {
  const TileScratch<T> pieces(p, scratch);
  LongSum<double> loss;
  for (int64_t unit = begin; unit < end; unit++) loss.add(visit_tile(p, unit, pieces));
  fence_non_temporal();
  return loss.value();
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
