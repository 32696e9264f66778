// Softmax cross entropy of rows: forward, backward, or both in one visit (formulas: docs/math.md).
//
// Forward reads the logits once. Where the gradient is asked for in the same call, the exponentials are kept, in the
// gradient itself or in a buffer, and become the gradient once the row's sum is known; a row too long for the cache, or
// one whose gradient needs the logits again, is read a second time instead. Backward reads the logits once and writes
// the gradient once. In rows, float32 logits that need no transformation are read where they lie; everything else, and
// every tile, passes through a buffer of the arithmetic's type.
//
// What depends on the target class alone is computed apart, per row and in double (row_batch.h).

#include "isa_kernels.h"
#include "row_batch.h"
#include "row_visit.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

// Rows are taken together up to this many elements, so that their row_batch.h part fills vectors.
constexpr int64_t kBatchElements = 8192, kBatchRows = 16;

// ---- logits ----------------------------------------------------------------------------------------------------

// z of the run in place: logit_scale * x, or softcap * tanh(logit_scale * x / softcap).
template <typename T>
void transform_run(const CrossEntropy<T>& p, T* z, int64_t padded) {
  constexpr int64_t L = kLanes<T>;
  if (p.softcap != 0) {
    const Vec<T> scale(p.logit_scale / p.softcap), cap(p.softcap);
    for (int64_t i = 0; i < padded; i += L) (cap * (Vec<T>::loadu(z + i) * scale).tanh()).store(z + i);
  } else if (p.logit_scale != 1) {
    const Vec<T> scale(p.logit_scale);
    for (int64_t i = 0; i < padded; i += L) (Vec<T>::loadu(z + i) * scale).store(z + i);
  }
}

// z of one class, by the same instructions as its whole vector: a target that is the maximum must equal it.
template <typename T>
T load_logit(const CrossEntropy<T>& p, int64_t at) {
  alignas(64) T z[kLanes<T>] = {static_cast<T>(load_value(p.logits, p.logits_type, at))};
  transform_run(p, z, kLanes<T>);
  return z[0];
}

template <typename T>
bool needs_no_copy(const CrossEntropy<T>& p) {
  return is_own<T>(p.logits_type) && p.softcap == 0 && p.logit_scale == 1;
}

// z of the classes [at, at + n) of a row, padded with -inf to whole vectors; in `buffer` unless they can be used in place.
template <typename T>
const T* load_row_block(const CrossEntropy<T>& p, int64_t at, int64_t n, T* buffer) {
  const int64_t padded = round_up(n, kLanes<T>);
  if (padded == n && needs_no_copy(p)) return static_cast<const T*>(p.logits) + at;
  load_run(p.logits, p.logits_type, at, n, buffer);
  std::fill(buffer + n, buffer + padded, T(0));
  transform_run(p, buffer, padded);
  std::fill(buffer + n, buffer + padded, -kInfinity<T>);
  return buffer;
}

// z of the classes [first, first + classes) of a tile.
template <typename T>
void load_tile_block(const CrossEntropy<T>& p, const Position& at, int64_t first, int64_t classes, T* buffer) {
  load_operand_tile(p.layout, kLogits, p.logits, p.logits_type, at, first, classes, buffer);
  if (p.softcap == 0 && p.logit_scale == 1) return;
  for (int64_t c = 0; c < classes; c++) transform_run(p, buffer + c * kTile, round_up(at.rows, kLanes<T>));
}

// Probabilities [at, at + n); in `buffer` unless they are of type T. Not padded.
template <typename T>
const T* load_probabilities(const CrossEntropy<T>& p, int64_t at, int64_t n, T* buffer) {
  if (is_own<T>(p.probabilities_type)) return static_cast<const T*>(p.probabilities) + at;
  load_run(p.probabilities, p.probabilities_type, at, n, buffer);
  return buffer;
}

// ---- targets -----------------------------------------------------------------------------------------------------

// class_of(r) is the target of row r. By values and in loops of one thing each, which the compiler turns into vectors.
template <typename T, typename ClassOf>
void set_classes(RowBatch<T>& batch, int64_t ignore_index, const ClassOf& class_of) {
  const int64_t rows = batch.rows;
  int64_t ignored_rows = 0;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t y = class_of(r);
    batch.y[r] = y == ignore_index ? -1 : y;
  }
  for (int64_t r = 0; r < rows; r++) ignored_rows += batch.y[r] < 0;
  for (int64_t r = 0; r < rows; r++) batch.live[r] = batch.y[r] < 0 ? 0.0 : 1.0;
  batch.any_ignored = ignored_rows > 0;
}

template <typename T, typename Index>
void load_classes(const CrossEntropy<T>& p, RowBatch<T>& batch, const Index* index) {
  const Index* const first = index + batch.number[0];
  if (batch.consecutive)
    set_classes(batch, p.ignore_index, [first](int64_t r) { return static_cast<int64_t>(first[r]); });
  else
    set_classes(batch, p.ignore_index, [&](int64_t r) { return static_cast<int64_t>(index[batch.number[r]]); });
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
  if (!p.weight) {
    std::fill(batch.weight, batch.weight + batch.rows, 1.0);
    return;
  }
  for (int64_t r = 0; r < batch.rows; r++) batch.weight[r] = batch.y[r] < 0 ? 0 : p.weight[batch.y[r]];
}

// The logits of the targets; class 0 of row r is element first[r].
template <typename T>
void load_target_logits(const CrossEntropy<T>& p, RowBatch<T>& batch, const int64_t* first) {
  if (p.has_probabilities) return;
  const T* const own = needs_no_copy(p) ? static_cast<const T*>(p.logits) : nullptr;
  for (int64_t r = 0; r < batch.rows; r++) {
    const int64_t at = first[r] + batch.y[r] * p.layout.class_stride[kLogits];
    batch.z[r] = batch.y[r] < 0 ? T(0) : own ? own[at] : load_logit(p, at);
  }
}

// Fills the lanes beyond the last row.
template <typename T>
void close_batch(RowBatch<T>& batch) {
  const int64_t padded = round_up(batch.rows, std::max(kLanes<double>, kLanes<T>));
  for (int64_t r = batch.rows; r < padded; r++) {
    batch.z[r] = batch.sums.max[r] = 0;
    batch.live[r] = batch.weight[r] = batch.sums.rest[r] = batch.sums.lost[r] = 0;
    batch.dot[r] = batch.b_sum[r] = batch.q_dot[r] = batch.q_sum[r] = batch.sums.weighted[r] = 0;
  }
}

// Whether the gradient of an ignored row is 0: none of its statistics has one.
template <typename T>
bool ignored_has_no_gradient(const CrossEntropy<T>& p) {
  return !p.grad_lse.data && !p.grad_entropy.data;
}

// ---- terms of the loss that run over the classes -----------------------------------------------------------------

// The sums of RowBatch for one row, taken of z - shift, with the row's maximum so far as the shift, so that nothing is
// rounded at the magnitude of the logits.
template <typename T>
struct RowTerms {
  double shift = 0;
  LongSum<T> dot, b_sum, q_dot, q_sum;

  // Follows the maximum; before the first finite one nothing finite has been added.
  void move_to(double max) {
    if (!std::isfinite(max) || max == shift) return;
    dot.add(b_sum.value() * (shift - max));
    q_dot.add(q_sum.value() * (shift - max));
    shift = max;
  }
};

template <typename T>
struct TermSums {
  Vec<T> dot{0}, b_sum{0}, q_dot{0}, q_sum{0};

  void add(const TermSums& run) {
    dot = dot + run.dot;
    b_sum = b_sum + run.b_sum;
    q_dot = q_dot + run.q_dot;
    q_sum = q_sum + run.q_sum;
  }

  // Class indices: the weights alone. The classes that smoothing shares are 1 / C of these sums.
  void add_smoothing(const Vec<T>& d, const Vec<T>& w) {
    dot = dot + multiply_or_zero(w, d);
    b_sum = b_sum + w;
  }

  void add_plain_probabilities(const Vec<T>& d, const Vec<T>& q) {
    q_dot = q_dot + multiply_or_zero(q, d);
    q_sum = q_sum + q;
  }

  void add_probabilities(const CrossEntropy<T>& p, const Vec<T>& d, const Vec<T>& q, const Vec<T>& w) {
    const Vec<T> keep(1 - p.label_smoothing), share(p.label_smoothing / static_cast<T>(p.layout.classes));
    const Vec<T> b = w * at::vec::fmadd(q, keep, share);
    dot = dot + multiply_or_zero(b, d);
    b_sum = b_sum + b;
    add_plain_probabilities(d, q);
  }
};

template <typename T>
Vec<T> load_weight(const CrossEntropy<T>& p, int64_t c) {
  return p.weight ? Vec<T>::loadu(p.weight + c) : Vec<T>(1);
}

// Calls visit(k, i, count) for the vectors of [begin, end), which take turns in k, 0 to 3; count is a constant in all but
// the last.
template <typename T, typename Visit>
inline void each_vector(int64_t begin, int64_t end, const Visit& visit) {
  constexpr int64_t L = kLanes<T>;
  int64_t i = begin;
  for (; i + 4 * L <= end; i += 4 * L)
    for (int k = 0; k < 4; k++) visit(k, i + k * L, L);
  for (; i + L <= end; i += L) visit(0, i, L);
  if (i < end) visit(1, i, end - i);
}

// The terms that a call has: those of b, those of q, or both; without those of b they are the same.
enum class Terms { kOfB, kOfQ, kBoth };

// Adds the terms of n classes, each vector's by add(sums, i, count). They are summed in T in short runs: one class can
// have nearly all the mass, and what is added to its lane afterwards is rounded at its magnitude, every time the same way.
template <Terms terms, typename T, typename Add>
inline void add_runs(RowTerms<T>& row, int64_t n, const Add& add) {
  constexpr int64_t kRun = 16 * kLanes<T>;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    TermSums<T> sums[4];
    each_vector<T>(begin, std::min(n, begin + kRun), [&](int k, int64_t i, int64_t count) { add(sums[k], i, count); });
    const auto total = [&](Vec<T> TermSums<T>::* term) {
      return sum_lanes((sums[0].*term + sums[1].*term) + (sums[2].*term + sums[3].*term));
    };
    const double q_dot = terms == Terms::kOfB ? 0 : total(&TermSums<T>::q_dot);
    const double q_sum = terms == Terms::kOfB ? 0 : total(&TermSums<T>::q_sum);
    row.q_dot.add(q_dot);
    row.q_sum.add(q_sum);
    row.dot.add(terms == Terms::kOfQ ? q_dot : total(&TermSums<T>::dot));
    row.b_sum.add(terms == Terms::kOfQ ? q_sum : total(&TermSums<T>::b_sum));
  }
}

// z is padded to whole vectors.
template <typename T>
void add_row_terms(RowTerms<T>& terms, const CrossEntropy<T>& p, const Position& at, const T* z, int64_t n,
                   int64_t first, T* q_block) {
  const Vec<T> shift(static_cast<T>(terms.shift)), zero(0);
  const auto shifted = [&](int64_t i, int64_t count) {
    const Vec<T> d = Vec<T>::loadu(z + i) - shift;
    return count == kLanes<T> ? d : Vec<T>::set(zero, d, count);
  };
  const auto weight = [&](int64_t i, int64_t count) {
    const Vec<T> w = load_weight(p, first + i);
    return count == kLanes<T> ? w : Vec<T>::set(zero, w, count);
  };
  if (!p.has_probabilities) {
    add_runs<Terms::kOfB, T>(terms, n, [&](TermSums<T>& sums, int64_t i, int64_t count) {
      sums.add_smoothing(shifted(i, count), weight(i, count));
    });
    return;
  }
  const int64_t q_at = at.offset[kProbabilities] + first;
  const T* const q = load_probabilities(p, q_at, n, q_block);
  const Ahead ahead = ahead_of<T>(p.probabilities, p.probabilities_type, q_at + n);
  const auto probabilities = [&](int64_t i, int64_t count) {
    ahead.fetch(i / kLanes<T>);
    return load_converted<T>(q + i, count);
  };
  if (is_plain(p))
    add_runs<Terms::kOfQ, T>(terms, n, [&](TermSums<T>& sums, int64_t i, int64_t count) {
      sums.add_plain_probabilities(shifted(i, count), probabilities(i, count));
    });
  else
    add_runs<Terms::kBoth, T>(terms, n, [&](TermSums<T>& sums, int64_t i, int64_t count) {
      sums.add_probabilities(p, shifted(i, count), probabilities(i, count), weight(i, count));
    });
}

// One vector of rows of a tile, terms' [0, lanes).
template <typename T>
void add_column_terms(RowTerms<T>* terms, const CrossEntropy<T>& p, const T* z, const T* q, int64_t classes,
                      int64_t first) {
  constexpr int64_t L = kLanes<T>, kRunClasses = 8, kSummedRuns = 32;  // short runs: add_runs
  alignas(64) T lanes[4][L];
  for (int64_t r = 0; r < L; r++) lanes[0][r] = static_cast<T>(terms[r].shift);
  const Vec<T> shift = Vec<T>::loadu(lanes[0]);
  for (int64_t begin = 0; begin < classes; begin += kSummedRuns) {
    const int64_t end = std::min(classes, begin + kSummedRuns);
    TermSums<T> sums;
    for (int64_t run = begin; run < end; run += kRunClasses) {
      TermSums<T> of_run;
      for (int64_t c = run; c < std::min(end, run + kRunClasses); c++) {
        const Vec<T> d = Vec<T>::loadu(z + c * kTile) - shift, w(p.weight ? p.weight[first + c] : T(1));
        if (q)
          of_run.add_probabilities(p, d, Vec<T>::loadu(q + c * kTile), w);
        else
          of_run.add_smoothing(d, w);
      }
      sums.add(of_run);
    }
    sums.dot.store(lanes[0]);
    sums.b_sum.store(lanes[1]);
    sums.q_dot.store(lanes[2]);
    sums.q_sum.store(lanes[3]);
    for (int64_t r = 0; r < L; r++) {
      terms[r].dot.add(lanes[0][r]);
      terms[r].b_sum.add(lanes[1][r]);
      terms[r].q_dot.add(lanes[2][r]);
      terms[r].q_sum.add(lanes[3][r]);
    }
  }
}

template <typename T>
void set_terms(RowBatch<T>& batch, int64_t r, const RowTerms<T>& terms) {
  batch.dot[r] = terms.dot.value();
  batch.b_sum[r] = terms.b_sum.value();
  batch.q_dot[r] = terms.q_dot.value();
  batch.q_sum[r] = terms.q_sum.value();
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

// ---- gradients over the classes ----------------------------------------------------------------------------------

// The coefficients of RowBatch for one row in all lanes, or for a row in each.
template <typename T>
struct GradientVectors {
  Vec<T> max, alpha, beta, uniform, smooth, kept, nll, log_sum;
};

template <typename T>
GradientVectors<T> broadcast(const RowBatch<T>& b, int64_t r) {
  return {Vec<T>(b.sums.max[r]), Vec<T>(b.alpha[r]), Vec<T>(b.beta[r]), Vec<T>(b.uniform[r]),
          Vec<T>(b.smooth[r]),   Vec<T>(b.kept[r]),  Vec<T>(b.nll[r]),  Vec<T>(b.log_sum[r])};
}

template <typename T>
GradientVectors<T> load_rows(const RowBatch<T>& b, int64_t r) {
  const auto load = [&](const T* values) { return Vec<T>::loadu(values + r); };
  return {load(b.sums.max), load(b.alpha), load(b.beta), load(b.uniform),
          load(b.smooth),   load(b.kept),  load(b.nll),  load(b.log_sum)};
}

// Which of the terms of the gradient a call has beyond exp * alpha - uniform.
struct GradientTerms {
  bool any, entropy, smooth, probabilities, softcap;
};

template <typename T>
GradientTerms gradient_terms(const CrossEntropy<T>& p) {
  GradientTerms has{};
  has.entropy = p.grad_entropy.data;
  has.smooth = p.weight && p.label_smoothing != 0;
  has.probabilities = p.has_probabilities;
  has.softcap = p.softcap != 0;
  has.any = has.entropy || has.smooth || has.probabilities || has.softcap;
  return has;
}

// e = exp(z - max), or, with its own alpha, of any other shift.
template <typename T>
inline Vec<T> plain_gradient(const GradientVectors<T>& g, const Vec<T>& e) {
  return at::vec::fmsub(e, g.alpha, g.uniform);
}

// The terms that need the class itself, without those that need its logit again.
template <typename T>
inline Vec<T> gradient_without_logit(const CrossEntropy<T>& p, const GradientTerms& has, const GradientVectors<T>& g,
                                     const Vec<T>& e, const Vec<T>& q, const Vec<T>& w) {
  Vec<T> grad = plain_gradient(g, e);
  if (has.smooth) grad = grad - g.smooth * w;
  if (has.probabilities) grad = grad - q * at::vec::fmadd(g.kept, w, g.nll) * Vec<T>(p.logit_scale);
  return grad;
}

template <typename T>
inline Vec<T> full_gradient(const CrossEntropy<T>& p, const GradientTerms& has, const GradientVectors<T>& g,
                            const Vec<T>& z, const Vec<T>& q, const Vec<T>& w) {
  const Vec<T> d = z - g.max;
  const Vec<T> e = exp_nonpositive(d);
  Vec<T> grad = gradient_without_logit(p, has, g, e, q, w);
  if (has.entropy) grad = grad + multiply_or_zero(e, g.beta * d);
  if (has.softcap) {
    const Vec<T> t = z / Vec<T>(p.softcap);
    grad = grad * (Vec<T>(1) - t * t);
  }
  return grad;
}

// dL/dq_c = (kept w_c + nll)(lse - z_c)
template <typename T>
inline Vec<T> probability_gradient(const GradientVectors<T>& g, const Vec<T>& z, const Vec<T>& w) {
  return multiply_or_zero(g.kept * w + g.nll, g.log_sum - (z - g.max));
}

// ---- rows ----------------------------------------------------------------------------------------------------------

template <typename T>
KeptRow<T> kept_row(const CrossEntropy<T>& p, const Position& at, const KeptRows<T>& keep, int64_t r) {
  return keep.row(r, p.grad_logits, at.offset[kGradLogits]);
}

// The sums over the classes of row r of the batch.
template <typename T>
void reduce_row(const CrossEntropy<T>& p, const Position& at, RowBatch<T>& batch, int64_t r, const KeptRows<T>& keep) {
  Block<T> q_block;
  RowTerms<T> terms;
  const int64_t first = at.offset[kLogits];
  const auto load = [&](int64_t c, int64_t n, T* buffer) { return load_row_block(p, first + c, n, buffer); };
  const auto add_terms = [&](T max, const T* z, int64_t c, int64_t n) {
    if (!has_terms(p)) return;
    terms.move_to(max);
    add_row_terms(terms, p, at, z, n, c, q_block.data);
  };
  const KeptRow<T> kept = kept_row(p, at, keep, r);
  const int64_t classes = p.layout.classes;
  const bool direct = needs_no_copy(p);
  batch.sums.set(r, p.stats
                        ? reduce_row<true>(classes, direct, kept, p.logits, p.logits_type, first, load, add_terms)
                        : reduce_row<false>(classes, direct, kept, p.logits, p.logits_type, first, load, add_terms));
  set_terms(batch, r, terms);
}

// The gradient of row r from its kept exponentials.
template <typename T>
void write_gradient_from_kept(const CrossEntropy<T>& p, const Position& at, const RowBatch<T>& batch, int64_t r,
                              const KeptRow<T>& kept) {
  Block<T> q_block;
  const bool direct = needs_no_copy(p);
  const Store store = kept.in_result ? Store::kCached : store_of(p);
  const GradientTerms has = gradient_terms(p);
  GradientVectors<T> g = broadcast(batch, r);
  const double alpha = batch.alpha[r], max = batch.sums.max[r];
  for (int64_t c = 0, n, block = 0; c < p.layout.classes; c += n, block++) {
    n = next_block<T>(p.layout.classes - c, p.layout.classes, direct);
    const double shift = kept.shifts[block];
    g.alpha = Vec<T>(static_cast<T>(shift == max ? alpha : alpha * std::exp(shift - max)));
    const T* const e = kept.data + c;
    const auto write = [&](const auto& value) {
      write_run<T>(p.grad_logits, p.logits_type, at.offset[kGradLogits] + c, n, store, value);
    };
    if (!has.any) {
      write([g, e](int64_t i, int64_t count) { return plain_gradient(g, load_converted<T>(e + i, count)); });
    } else if (!has.probabilities) {
      write([g, e, w = p.weight + c](int64_t i, int64_t count) {
        return plain_gradient(g, load_converted<T>(e + i, count)) - g.smooth * Vec<T>::loadu(w + i);
      });
    } else {
      const T* const q = load_probabilities(p, at.offset[kProbabilities] + c, n, q_block.data);
      if (is_plain(p) && p.logit_scale == 1)  // g.nll is 0: kept exponentials have no gradient of the statistics
        write([g, e, q](int64_t i, int64_t count) {
          return plain_gradient(g, load_converted<T>(e + i, count)) - load_converted<T>(q + i, count) * g.kept;
        });
      else
        write([&p, g, has, e, c, q](int64_t i, int64_t count) {
          return gradient_without_logit(p, has, g, load_converted<T>(e + i, count), load_converted<T>(q + i, count),
                                        load_weight(p, c + i));
        });
    }
  }
}

// The gradients of row r from its logits.
template <typename T>
void write_gradient_from_logits(const CrossEntropy<T>& p, const Position& at, const RowBatch<T>& batch, int64_t r) {
  constexpr int64_t L = kLanes<T>;
  Block<T> z_block, q_block;
  const Store store = store_of(p);
  const GradientVectors<T> g = broadcast(batch, r);
  const GradientTerms has = gradient_terms(p);
  const bool direct = needs_no_copy(p) && !has.any && !p.grad_probabilities;
  for (int64_t c = 0, n; c < p.layout.classes; c += n) {
    n = std::min(kBlock<T>, p.layout.classes - c);
    const int64_t from = at.offset[kLogits] + c;
    const Ahead ahead = ahead_of<T>(p.logits, p.logits_type, from + n);
    const T* const z = direct ? static_cast<const T*>(p.logits) + from : load_row_block(p, from, n, z_block.data);
    if (!has.any && p.grad_logits)
      write_run<T>(p.grad_logits, p.logits_type, at.offset[kGradLogits] + c, n, store,
                   [g, z, ahead](int64_t i, int64_t count) {
                     ahead.fetch(i / L);
                     return plain_gradient(g, exp_nonpositive(load_converted<T>(z + i, count) - g.max));
                   });
    if (p.has_probabilities) {
      load_run(p.probabilities, p.probabilities_type, at.offset[kProbabilities] + c, n, q_block.data);
      std::fill(q_block.data + n, q_block.data + round_up(n, L), T(0));
    }
    if (p.grad_probabilities)
      write_run<T>(p.grad_probabilities, p.probabilities_type, at.offset[kGradProbabilities] + c, n, store,
                   [&p, g, z, c](int64_t i, int64_t count) {
                     return probability_gradient(g, load_converted<T>(z + i, count), load_weight(p, c + i));
                   });
    if (has.any && p.grad_logits)
      write_run<T>(p.grad_logits, p.logits_type, at.offset[kGradLogits] + c, n, store,
                   [&p, has, g, z, c, ahead, q = q_block.data](int64_t i, int64_t count) {
                     ahead.fetch(i / L);
                     const Vec<T> qi = p.has_probabilities ? Vec<T>::loadu(q + i) : Vec<T>(0);
                     return full_gradient(p, has, g, load_converted<T>(z + i, count), qi, load_weight(p, c + i));
                   });
  }
}

// The rows [first, first + rows) of the layout.
template <typename T>
double visit_rows(const CrossEntropy<T>& p, int64_t first, int64_t rows, const KeptRows<T>& keep) {
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
  load_target_logits(p, batch, logits_at);
  const bool skips_ignored = ignored_has_no_gradient(p) && !p.stats;
  const auto skipped = [&](int64_t r) { return skips_ignored && batch.live[r] == 0; };
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
        reduce_row(p, at[r], batch, r, keep);
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
    } else if (keep.active()) {
      write_gradient_from_kept(p, at[r], batch, r, kept_row(p, at[r], keep, r));
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
KeptRows<T> keep_rows(const CrossEntropy<T>& p, Scratch& scratch) {
  const bool keeps = p.forward && p.grad_logits && p.softcap == 0;
  return {keeps, needs_no_copy(p), p.layout.classes, batch_rows(p), scratch};
}

template <typename T>
double visit_all_rows(const CrossEntropy<T>& p, int64_t begin, int64_t end, Scratch& scratch) {
  const int64_t batch = batch_rows(p);
  const KeptRows<T> keep = keep_rows(p, scratch);
  LongSum<double> loss;
  for (int64_t first = begin; first < end; first += batch)
    loss.add(visit_rows(p, first, std::min(batch, end - first), keep));
  finish_streaming();
  return loss.value();
}

// ---- columns ---------------------------------------------------------------------------------------------------------

// The buffers of a tile: logits or exponentials; probabilities, and their gradient, where there are any.
enum TileBuffer { kZ, kQ, kGradQ };

// What the visit of a tile works in.
template <typename T>
struct TileScratch {
  TileBuffers<T> buffers;
  RowTerms<T>* terms;  // of its rows, where there are any

  TileScratch(const CrossEntropy<T>& p, Scratch& scratch)
      : buffers(p.layout,
                p.grad_probabilities  ? 3
                : p.has_probabilities ? 2
                                      : 1,
                scratch),
        terms(scratch.take<RowTerms<T>>(has_terms(p) ? kTile : 0)) {}
};

// Whether the logits in the buffer give way to their exponentials.
template <typename T>
bool keeps_exponentials(const CrossEntropy<T>& p, const TileBuffers<T>& buffers) {
  return p.forward && p.grad_logits && p.softcap == 0 && buffers.whole();
}

// Loads z, and q where the target is probabilities, of the classes [first, first + classes) of a tile.
template <typename T>
void load_tile_blocks(const CrossEntropy<T>& p, const Position& at, int64_t first, int64_t classes,
                      const TileBuffers<T>& buffers) {
  load_tile_block(p, at, first, classes, buffers.get(kZ));
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
  const bool keeps = keeps_exponentials(p, buffers);
  if (has_terms(p)) std::fill(terms, terms + kTile, RowTerms<T>{});
  if (p.layout.classes == 0)
    for (int64_t r = 0; r < at.rows; r++) batch.sums.set(r, {});
  T* const z = buffers.get(kZ);
  for (int64_t c = 0; c < p.layout.classes; c += buffers.classes()) {
    const int64_t n = std::min(buffers.classes(), p.layout.classes - c);
    if (c > 0) load_tile_blocks(p, at, c, n, buffers);
    // Before the exponentials take the place of the logits.
    if (has_terms(p)) add_tile_terms(p, at, batch, terms, c, n, buffers);
    const auto ahead = [&](int64_t r) { return ahead_of_tile(p, at, c, r); };
    if (p.stats && keeps)
      add_tile<true, true>(batch.sums, at.rows, z, n, c, z, ahead);
    else if (p.stats)
      add_tile<true, false>(batch.sums, at.rows, z, n, c, z, ahead);
    else if (keeps)
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
  const bool masks = batch.any_ignored && ignored_has_no_gradient(p), keeps = keeps_exponentials(p, buffers);
  const auto weight_of = [&p](int64_t c) { return Vec<T>(p.weight ? p.weight[c] : T(1)); };
  T* const z = buffers.get(kZ);
  const T* const q = p.has_probabilities ? buffers.get(kQ) : nullptr;
  for (int64_t c = 0; c < layout.classes; c += buffers.classes()) {
    const int64_t n = std::min(buffers.classes(), layout.classes - c);
    if (!buffers.whole()) load_tile_blocks(p, at, c, n, buffers);
    if (p.grad_probabilities) {
      T* const grad_q = buffers.get(kGradQ);
      fill_tile(grad_q, n, at.rows, [&](int64_t r) {
        return [g = load_rows(batch, r), zr = z + r, c, weight_of](int64_t i) {
          return probability_gradient(g, Vec<T>::loadu(zr + i * kTile), weight_of(c + i));
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
        const Ahead ahead = keeps ? Ahead::nothing(z) : ahead_of_tile(p, at, c, r);
        const Vec<T> dead = masks ? Vec<T>::loadu(live) == none : none;
        return [ahead, dead, masks, c, value, g = load_rows(batch, r), zr = z + r, qr = q ? q + r : q](int64_t i) {
          ahead.fetch(i);
          const Vec<T> x = Vec<T>::loadu(zr + i * kTile);
          const Vec<T> v = value(g, x, qr ? Vec<T>::loadu(qr + i * kTile) : Vec<T>(0), c + i);
          return masks ? Vec<T>::blendv(v, Vec<T>(0), dead) : v;
        };
      });
    };
    if (!has.any && keeps)
      write([&](const GradientVectors<T>& g, const Vec<T>& e, const Vec<T>&, int64_t) { return plain_gradient(g, e); });
    else if (!has.any)
      write([&](const GradientVectors<T>& g, const Vec<T>& x, const Vec<T>&, int64_t) {
        return plain_gradient(g, exp_nonpositive(x - g.max));
      });
    else if (keeps)
      write([&](const GradientVectors<T>& g, const Vec<T>& e, const Vec<T>& y, int64_t i) {
        return gradient_without_logit(p, has, g, e, y, weight_of(i));
      });
    else
      write([&](const GradientVectors<T>& g, const Vec<T>& x, const Vec<T>& y, int64_t i) {
        return full_gradient(p, has, g, x, y, weight_of(i));
      });
    if (buffers.whole()) put_at_targets(batch, z);
    store_operand_tile(layout, kGradLogits, z, p.grad_logits, p.logits_type, at, c, n, store_of(p));
  }
}

// The logits of the targets of a tile, from the buffer where it holds all classes.
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
  const T* const z = buffers.get(kZ);
  for (int64_t r = 0; r < at.rows; r++) batch.z[r] = batch.y[r] < 0 ? T(0) : z[batch.y[r] * kTile + r];
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
  load_tile_blocks(p, at, 0, std::min(buffers.classes(), p.layout.classes), buffers);
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
  finish_streaming();
  return loss.value();
}

template <typename T>
double cross_entropy(const CrossEntropy<T>& p, int64_t begin, int64_t end, void* memory) {
  Scratch scratch(memory);
  return p.layout.rows ? visit_all_rows(p, begin, end, scratch) : visit_all_tiles(p, begin, end, scratch);
}

template <typename T>
size_t scratch_of(const CrossEntropy<T>& p) {
  Scratch scratch;
  if (p.layout.rows)
    keep_rows(p, scratch);
  else
    TileScratch<T>(p, scratch);
  return scratch.bytes();
}

template <typename Index>
ClassScan scan(const Index* index, int64_t n, int64_t classes, int64_t ignore_index) {
  int64_t live = 0, wrong = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t y = static_cast<int64_t>(index[i]), is_live = y != ignore_index;
    live += is_live;
    wrong |= is_live & (static_cast<uint64_t>(y) >= static_cast<uint64_t>(classes));
  }
  return {live, wrong != 0};
}

}  // namespace

ClassScan scan_classes(const int64_t* index, int64_t n, int64_t classes, int64_t ignore_index) {
  return scan(index, n, classes, ignore_index);
}
ClassScan scan_classes_u8(const uint8_t* index, int64_t n, int64_t classes, int64_t ignore_index) {
  return scan(index, n, classes, ignore_index);
}
size_t scratch_bytes(const CrossEntropy<float>& p) { return scratch_of(p); }
size_t scratch_bytes(const CrossEntropy<double>& p) { return scratch_of(p); }
double cross_entropy_float(const CrossEntropy<float>& p, int64_t begin, int64_t end, void* scratch) {
  return cross_entropy(p, begin, end, scratch);
}
double cross_entropy_double(const CrossEntropy<double>& p, int64_t begin, int64_t end, void* scratch) {
  return cross_entropy(p, begin, end, scratch);
}

}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
