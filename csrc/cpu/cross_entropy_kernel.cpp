// Softmax cross entropy of rows: forward, backward, or both in one visit (formulas: docs/math.md).
//
// Forward reads the logits once; a gradient asked for in the same call is a second pass over a row that is still in
// cache. Backward reads the logits once and writes the gradient once. A row, or a tile of kTile rows, passes through an
// L1 block; float32 logits that need no transformation are read where they lie.
//
// What depends on the target class alone is corrected after the loops, in double, with p_y - 1 as expm1(log p_y).
#include "isa_kernels.h"
#include "logsumexp.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

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

// z of the classes [first, first + n) of a row, padded with -inf to whole vectors.
template <typename T>
const T* load_row_block(const CrossEntropy<T>& p, int64_t at, int64_t n, Block<T>& block) {
  const int64_t padded = round_up(n, kLanes<T>);
  if (padded == n && needs_no_copy(p)) return static_cast<const T*>(p.logits) + at;
  load_run(p.logits, p.logits_type, at, n, block.data);
  for (int64_t i = n; i < padded; i++) block.data[i] = 0;
  transform_run(p, block.data, padded);
  for (int64_t i = n; i < padded; i++) block.data[i] = -kInfinity<T>;
  return block.data;
}

// A block of a tile: z of class c and row r at data[c * stride + r]; columns beyond the tile's rows hold 0.
template <typename T>
struct TileView {
  const T* data;
  int64_t stride;
};

template <typename T>
void load_tile_padded(const void* src, DType type, const Layout& layout, int operand, int64_t at, int64_t classes,
                      int64_t rows, T* dst) {
  load_tile(src, type, at, layout.class_stride[operand], layout.inner_stride[operand], classes, rows, dst);
  const int64_t padded = round_up(rows, kLanes<T>);
  if (padded == rows) return;
  for (int64_t c = 0; c < classes; c++)
    for (int64_t r = rows; r < padded; r++) dst[c * kTile + r] = 0;
}

template <typename T>
TileView<T> load_tile_block(const CrossEntropy<T>& p, const Position& at, int64_t first, int64_t classes,
                            Block<T>& block) {
  const int64_t class_stride = p.layout.class_stride[kLogits];
  const int64_t offset = at.offset[kLogits] + first * class_stride;
  const bool whole = at.rows % kLanes<T> == 0 && p.layout.inner_stride[kLogits] == 1;
  if (whole && needs_no_copy(p)) return {static_cast<const T*>(p.logits) + offset, class_stride};
  load_tile_padded(p.logits, p.logits_type, p.layout, kLogits, offset, classes, at.rows, block.data);
  for (int64_t c = 0; c < classes; c++) transform_run(p, block.data + c * kTile, round_up(at.rows, kLanes<T>));
  return {block.data, kTile};
}

// ---- terms of the loss that run over the classes -----------------------------------------------------------------

// b_c = w_c ((1 - eps) q_c + eps / C), or its smoothing part alone where the target is a class index. The sums are taken
// of z - shift, with the row's maximum so far as the shift, so that nothing is rounded at the magnitude of the logits.
struct RowTerms {
  double shift = 0;
  double dot = 0;    // sum b_c (z_c - shift)
  double b_sum = 0;  // sum b_c
  double q_dot = 0;  // sum q_c (z_c - shift)
  double q_sum = 0;  // sum q_c

  // Follows the maximum; before the first finite one nothing finite has been added.
  void move_to(double max) {
    if (!std::isfinite(max) || max == shift) return;
    dot += b_sum * (shift - max);
    q_dot += q_sum * (shift - max);
    shift = max;
  }
};

template <typename T>
bool has_terms(const CrossEntropy<T>& p) {
  return p.has_probabilities || p.label_smoothing != 0;
}

template <typename T>
struct TermSums {
  Vec<T> dot{0}, b_sum{0}, q_dot{0}, q_sum{0};
};

// Adds one vector: q and w where the target is probabilities, smoothing's share alone otherwise.
template <typename T>
inline void add_term(TermSums<T>& sums, const CrossEntropy<T>& p, const Vec<T>& d, const Vec<T>& q, const Vec<T>& w) {
  const Vec<T> keep(1 - p.label_smoothing), share(p.label_smoothing / static_cast<T>(p.layout.classes));
  const Vec<T> b = w * at::vec::fmadd(q, keep, share);
  sums.dot = sums.dot + multiply_or_zero(b, d);
  sums.b_sum = sums.b_sum + b;
  sums.q_dot = sums.q_dot + multiply_or_zero(q, d);
  sums.q_sum = sums.q_sum + q;
}

template <typename T>
Vec<T> load_weight(const CrossEntropy<T>& p, int64_t c) {
  return p.weight ? Vec<T>::loadu(p.weight + c) : Vec<T>(1);
}

template <typename T>
void add_row_terms(RowTerms& terms, const CrossEntropy<T>& p, const Position& at, const T* z, int64_t n, int64_t first,
                   Block<T>& q_block) {
  constexpr int64_t L = kLanes<T>;
  const Vec<T> shift(static_cast<T>(terms.shift));
  TermSums<T> sums;
  if (p.has_probabilities)
    load_run(p.probabilities, p.probabilities_type, at.offset[kProbabilities] + first, n, q_block.data);
  const auto add = [&](int64_t i, int64_t count) {
    const Vec<T> zero(0);
    const Vec<T> d = Vec<T>::set(zero, Vec<T>::loadu(z + i) - shift, count);
    const Vec<T> q = p.has_probabilities ? Vec<T>::loadu(q_block.data + i, count) : zero;
    const Vec<T> w = Vec<T>::set(zero, load_weight(p, first + i), count);
    add_term(sums, p, d, count == L ? q : Vec<T>::set(zero, q, count), w);
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) add(i, L);
  if (i < n) add(i, n - i);
  terms.dot += sum_lanes(sums.dot);
  terms.b_sum += sum_lanes(sums.b_sum);
  terms.q_dot += sum_lanes(sums.q_dot);
  terms.q_sum += sum_lanes(sums.q_sum);
}

// One vector of rows of a tile.
template <typename T>
void add_column_terms(RowTerms* terms, const CrossEntropy<T>& p, const TileView<T>& z, const T* q, int64_t classes,
                      int64_t first) {
  constexpr int64_t L = kLanes<T>;
  alignas(64) T lanes[4][L];
  for (int64_t r = 0; r < L; r++) lanes[0][r] = static_cast<T>(terms[r].shift);
  const Vec<T> shift = Vec<T>::loadu(lanes[0]), zero(0);
  TermSums<T> sums;
  for (int64_t c = 0; c < classes; c++)
    add_term(sums, p, Vec<T>::loadu(z.data + c * z.stride) - shift, q ? Vec<T>::loadu(q + c * kTile) : zero,
             Vec<T>(p.weight ? p.weight[first + c] : T(1)));
  sums.dot.store(lanes[0]);
  sums.b_sum.store(lanes[1]);
  sums.q_dot.store(lanes[2]);
  sums.q_sum.store(lanes[3]);
  for (int64_t r = 0; r < L; r++) {
    terms[r].dot += lanes[0][r];
    terms[r].b_sum += lanes[1][r];
    terms[r].q_dot += lanes[2][r];
    terms[r].q_sum += lanes[3][r];
  }
}

// ---- one row: target, loss, coefficients of the gradient -----------------------------------------------------------

template <typename T>
struct Target {
  bool ignored = false;
  int64_t y = -1;     // -1 with probabilities
  T z = 0;            // logit of class y
  double weight = 1;  // of class y
};

template <typename T>
Target<T> load_target(const CrossEntropy<T>& p, int64_t row, int64_t logits_offset) {
  Target<T> target;
  if (p.has_probabilities) return target;
  target.y = p.index ? p.index[row] : p.index_u8[row];
  target.ignored = target.y == p.ignore_index;
  if (target.ignored) return target;
  target.z = load_logit(p, logits_offset + target.y * p.layout.class_stride[kLogits]);
  if (p.weight) target.weight = p.weight[target.y];
  return target;
}

// What backward needs of a row.
struct RowState {
  double max, log_sum, b_sum, q_sum;
};

template <typename T>
RowState load_state(const CrossEntropy<T>& p, int64_t row) {
  RowState state{p.state[row], p.state[p.rows + row], 0, 0};
  if (p.has_probabilities) {
    state.b_sum = p.state[2 * p.rows + row];
    state.q_sum = p.state[3 * p.rows + row];
  }
  return state;
}

template <typename T>
void store_state(const CrossEntropy<T>& p, int64_t row, const RowState& state) {
  p.state[row] = static_cast<T>(state.max);
  p.state[p.rows + row] = static_cast<T>(state.log_sum);
  if (p.has_probabilities) {
    p.state[2 * p.rows + row] = static_cast<T>(state.b_sum);
    p.state[3 * p.rows + row] = static_cast<T>(state.q_sum);
  }
}

inline double multiply_or_zero(double b, double d) { return b == 0 ? 0 : b * d; }

// Writes what forward writes of one row and returns its loss.
template <typename T>
double finish_row(const CrossEntropy<T>& p, int64_t row, const LogSumExp<T>& sums, const RowTerms& terms,
                  const Target<T>& target) {
  const double max = sums.max, log_sum = sums.log_sum();
  double nll, loss;
  if (p.has_probabilities) {
    nll = multiply_or_zero(terms.q_sum, log_sum) - terms.q_dot;
    loss = multiply_or_zero(terms.b_sum, log_sum) - terms.dot;
  } else {
    nll = log_sum - (static_cast<double>(target.z) - max);
    loss = multiply_or_zero((1 - p.label_smoothing) * target.weight, nll);
    if (p.label_smoothing != 0) loss += multiply_or_zero(terms.b_sum, log_sum) - terms.dot;
  }
  if (p.z_loss != 0) loss += p.z_loss * (max + log_sum) * (max + log_sum);
  if (target.ignored) nll = loss = 0;
  if (p.loss) store_value(loss, p.loss, p.loss_type, row);
  store_state(p, row, {max, log_sum, terms.b_sum, terms.q_sum});
  if (p.stats) {
    p.lse[row] = static_cast<T>(max + log_sum);
    p.nll[row] = static_cast<T>(nll);
    p.entropy[row] = static_cast<T>(log_sum - sums.mean_shifted());
    p.prediction[row] = sums.argmax;
  }
  return loss;
}

// An ignored row without statistics is not read.
template <typename T>
void skip_row(const CrossEntropy<T>& p, int64_t row) {
  if (p.loss) store_value(0, p.loss, p.loss_type, row);
  store_state(p, row, {0, 0, 0, 0});
}

inline double value_of(const RowValues& values, int64_t row) {
  return values.data ? values.scale * load_value(values.data, values.type, row * values.stride) : 0;
}

// dL/dx_c = slope_c [ exp(z_c - max) (alpha + beta (z_c - max)) - b_c ]
// with b_c = uniform + smooth * smooth_c                           (class index; smooth_c = eps / C w_c)
//   or b_c = q_c (kept * w_c + nll) + shared * w_c                 (probabilities)
// logit_scale is in alpha, beta, uniform and smooth, and a factor of the last line; slope_c is 1 - (z_c / softcap)^2, or 1.
struct RowGradient {
  bool zero = false;
  double max = 0, alpha = 0, beta = 0, uniform = 0, smooth = 0, kept = 0, nll = 0, shared = 0;
  double log_sum = 0;
  double at_target = 0;  // the whole gradient of class y, slope included
};

template <typename T>
RowGradient row_gradient(const CrossEntropy<T>& p, int64_t row, const RowState& state, const Target<T>& target) {
  double g = value_of(p.grad_loss, row), g_nll = value_of(p.grad_nll, row);
  const double g_lse = value_of(p.grad_lse, row), g_entropy = value_of(p.grad_entropy, row);
  RowGradient out;
  if (target.ignored) {
    g = g_nll = 0;
    if (!p.grad_lse.data && !p.grad_entropy.data) {
      out.zero = true;
      return out;
    }
  }
  const double eps = p.label_smoothing, share = eps / p.layout.classes, scale = p.logit_scale;
  const double lse = state.max + state.log_sum;
  double all = 2 * g * p.z_loss * lse + g_lse;
  if (p.grad_entropy.data) all += g_entropy * (state.log_sum - p.entropy[row]);  // E - max
  double one_hot = 0;
  if (p.has_probabilities) {
    all += g * state.b_sum + g_nll * state.q_sum;
    out.kept = g * (1 - eps);
    out.nll = g_nll;
    out.shared = g * share;
  } else {
    one_hot = g * (1 - eps) * target.weight + g_nll;
    all += g * share * p.weight_sum;
    if (p.smooth)
      out.smooth = g * scale;
    else
      out.uniform = g * share * scale;
  }
  const double inverse_sum = std::exp(-state.log_sum) * scale;
  out.max = state.max;
  out.log_sum = state.log_sum;
  out.alpha = (one_hot + all) * inverse_sum;
  out.beta = -g_entropy * inverse_sum;
  if (target.y >= 0 && !target.ignored) {
    const double d = static_cast<double>(target.z) - state.max, log_p = d - state.log_sum, prob = std::exp(log_p);
    const double tanh_z = p.softcap != 0 ? static_cast<double>(target.z) / p.softcap : 0;
    const double smooth_b = p.smooth ? g * p.smooth[target.y] : g * share;
    out.at_target = one_hot * std::expm1(log_p) + multiply_or_zero(prob, all - g_entropy * d) - smooth_b;
    out.at_target *= scale * (1 - tanh_z * tanh_z);
  }
  return out;
}

// ---- gradients over the classes ----------------------------------------------------------------------------------

// The coefficients of RowGradient, one row for all lanes or a row for each.
template <typename T>
struct GradientVectors {
  Vec<T> max, alpha, beta, uniform, smooth, kept, nll, shared, log_sum, zero;
};

template <typename T>
GradientVectors<T> broadcast(const RowGradient& g) {
  const auto all = [](double v) { return Vec<T>(static_cast<T>(v)); };
  return {all(g.max),  all(g.alpha), all(g.beta),   all(g.uniform), all(g.smooth),
          all(g.kept), all(g.nll),   all(g.shared), all(g.log_sum), all(0)};
}

template <typename T>
GradientVectors<T> gather(const RowGradient* rows) {
  const auto each = [&](double RowGradient::* member) {
    alignas(64) T lanes[kLanes<T>];
    for (int64_t r = 0; r < kLanes<T>; r++) lanes[r] = static_cast<T>(rows[r].*member);
    return Vec<T>::loadu(lanes);
  };
  alignas(64) T dead[kLanes<T>];
  for (int64_t r = 0; r < kLanes<T>; r++) dead[r] = rows[r].zero;
  return {each(&RowGradient::max),     each(&RowGradient::alpha), each(&RowGradient::beta), each(&RowGradient::uniform),
          each(&RowGradient::smooth),  each(&RowGradient::kept),  each(&RowGradient::nll),  each(&RowGradient::shared),
          each(&RowGradient::log_sum), Vec<T>::loadu(dead)};
}

// Which of the terms of the gradient a call has beyond exp * alpha - uniform.
struct GradientTerms {
  bool any, entropy, smooth, probabilities, softcap;
};

template <typename T>
GradientTerms gradient_terms(const CrossEntropy<T>& p) {
  GradientTerms has{};
  has.entropy = p.grad_entropy.data;
  has.smooth = p.smooth && !p.has_probabilities;
  has.probabilities = p.has_probabilities;
  has.softcap = p.softcap != 0;
  has.any = has.entropy || has.smooth || has.probabilities || has.softcap;
  return has;
}

template <typename T>
inline Vec<T> plain_gradient(const GradientVectors<T>& g, const Vec<T>& z) {
  return exp_nonpositive(z - g.max) * g.alpha - g.uniform;
}

template <typename T>
inline Vec<T> full_gradient(const CrossEntropy<T>& p, const GradientTerms& has, const GradientVectors<T>& g,
                            const Vec<T>& z, const Vec<T>& q, const Vec<T>& w, const Vec<T>& smooth) {
  const Vec<T> d = z - g.max;
  const Vec<T> e = exp_nonpositive(d);
  Vec<T> grad = has.entropy ? multiply_or_zero(e, g.alpha + g.beta * d) : e * g.alpha;
  grad = grad - g.uniform;
  if (has.smooth) grad = grad - g.smooth * smooth;
  if (has.probabilities) grad = grad - (q * (g.kept * w + g.nll) + g.shared * w) * Vec<T>(p.logit_scale);
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
LogSumExp<T> reduce_row(const CrossEntropy<T>& p, const Position& at, RowTerms& terms) {
  Block<T> z_block, q_block;
  LogSumExp<T> sums;
  const bool direct = needs_no_copy(p);
  for (int64_t c = 0, n; c < p.layout.classes; c += n) {
    n = next_block<T>(p.layout.classes - c, direct);
    const T* z = load_row_block(p, at.offset[kLogits] + c, n, z_block);
    const int64_t padded = round_up(n, kLanes<T>);
    if (p.stats)
      add_block<true>(sums, z, padded, c);
    else
      add_block<false>(sums, z, padded, c);
    if (!has_terms(p)) continue;
    terms.move_to(sums.max);
    add_row_terms(terms, p, at, z, n, c, q_block);
  }
  return sums;
}

template <typename T>
void write_row_gradient(const CrossEntropy<T>& p, const Position& at, const RowGradient& row, int64_t y) {
  constexpr int64_t L = kLanes<T>;
  Block<T> z_block, q_block, out_block;
  const bool direct = needs_no_copy(p);
  const GradientVectors<T> g = broadcast<T>(row);
  const GradientTerms has = gradient_terms(p);
  for (int64_t c = 0, n; c < p.layout.classes; c += n) {
    n = next_block<T>(p.layout.classes - c, direct);
    const int64_t padded = round_up(n, L);
    const T* z = load_row_block(p, at.offset[kLogits] + c, n, z_block);
    if (p.has_probabilities) {
      load_run(p.probabilities, p.probabilities_type, at.offset[kProbabilities] + c, n, q_block.data);
      for (int64_t i = n; i < padded; i++) q_block.data[i] = 0;
    }
    if (p.grad_probabilities) {
      for (int64_t i = 0; i < padded; i += L)
        probability_gradient(g, Vec<T>::loadu(z + i), load_weight(p, c + i)).store(out_block.data + i);
      store_run(out_block.data, n, p.grad_probabilities, p.probabilities_type, at.offset[kGradProbabilities] + c);
    }
    if (!p.grad_logits) continue;
    T* out = direct && padded == n ? static_cast<T*>(p.grad_logits) + at.offset[kGradLogits] + c : out_block.data;
    if (!has.any) {
      for (int64_t i = 0; i < padded; i += L) plain_gradient(g, Vec<T>::loadu(z + i)).store(out + i);
    } else {
      const Vec<T> none(0);
      for (int64_t i = 0; i < padded; i += L)
        full_gradient(p, has, g, Vec<T>::loadu(z + i), p.has_probabilities ? Vec<T>::loadu(q_block.data + i) : none,
                      load_weight(p, c + i), has.smooth ? Vec<T>::loadu(p.smooth + c + i) : none)
            .store(out + i);
    }
    if (out == out_block.data) store_run(out, n, p.grad_logits, p.logits_type, at.offset[kGradLogits] + c);
  }
  if (p.grad_logits && y >= 0) store_value(row.at_target, p.grad_logits, p.logits_type, at.offset[kGradLogits] + y);
}

template <typename T>
double visit_row(const CrossEntropy<T>& p, int64_t unit) {
  const Position at = locate(p.layout, unit);
  const int64_t row = at.offset[kRow];
  const Target<T> target = load_target(p, row, at.offset[kLogits]);
  const bool wants_gradient = p.grad_logits || p.grad_probabilities;
  double loss = 0;
  RowState state{};
  if (!p.forward) {
    state = load_state(p, row);
  } else if (target.ignored && !p.stats) {
    skip_row(p, row);
  } else {
    RowTerms terms;
    const LogSumExp<T> sums = reduce_row(p, at, terms);
    loss = finish_row(p, row, sums, terms, target);
    state = {static_cast<double>(sums.max), sums.log_sum(), terms.b_sum, terms.q_sum};
  }
  if (!wants_gradient) return loss;
  const RowGradient gradient = row_gradient(p, row, state, target);
  if (gradient.zero)
    std::memset(address(p.grad_logits, p.logits_type, at.offset[kGradLogits]), 0,
                p.layout.classes * size_of(p.logits_type));
  else
    write_row_gradient(p, at, gradient, target.ignored ? -1 : target.y);
  return loss;
}

// ---- columns ---------------------------------------------------------------------------------------------------------

// The rows of one tile.
template <typename T>
struct Tile {
  LogSumExp<T> sums[kTile];
  RowTerms terms[kTile];
  Target<T> targets[kTile];
  RowGradient gradients[kTile];
};

template <typename T>
const T* load_probability_block(const CrossEntropy<T>& p, const Position& at, int64_t first, int64_t classes,
                                Block<T>& block) {
  if (!p.has_probabilities) return nullptr;
  load_tile_padded(p.probabilities, p.probabilities_type, p.layout, kProbabilities,
                   at.offset[kProbabilities] + first * p.layout.class_stride[kProbabilities], classes, at.rows,
                   block.data);
  return block.data;
}

template <typename T>
void reduce_tile(const CrossEntropy<T>& p, const Position& at, Tile<T>& tile) {
  constexpr int64_t L = kLanes<T>;
  Block<T> z_block, q_block;
  for (int64_t c = 0; c < p.layout.classes; c += kTileClasses<T>) {
    const int64_t n = std::min(kTileClasses<T>, p.layout.classes - c);
    const TileView<T> z = load_tile_block(p, at, c, n, z_block);
    const T* q = load_probability_block(p, at, c, n, q_block);
    for (int64_t r = 0; r < at.rows; r += L) {
      if (p.stats)
        add_column_vector<true>(tile.sums + r, z.data + r, z.stride, n, c);
      else
        add_column_vector<false>(tile.sums + r, z.data + r, z.stride, n, c);
      if (!has_terms(p)) continue;
      for (int64_t i = r; i < r + L; i++) tile.terms[i].move_to(tile.sums[i].max);
      add_column_terms(tile.terms + r, p, TileView<T>{z.data + r, z.stride}, q ? q + r : nullptr, n, c);
    }
  }
}

template <typename T>
void write_tile_gradient(const CrossEntropy<T>& p, const Position& at, const Tile<T>& tile) {
  constexpr int64_t L = kLanes<T>;
  Block<T> z_block, q_block, out_block;
  const GradientTerms has = gradient_terms(p);
  const Layout& layout = p.layout;
  const Vec<T> none(0);
  for (int64_t c = 0; c < layout.classes; c += kTileClasses<T>) {
    const int64_t n = std::min(kTileClasses<T>, layout.classes - c);
    const TileView<T> z = load_tile_block(p, at, c, n, z_block);
    const T* q = load_probability_block(p, at, c, n, q_block);
    const auto each_vector = [&](const auto& value) {  // value(coefficients, z, q, class) for the whole block
      for (int64_t r = 0; r < at.rows; r += L) {
        const GradientVectors<T> g = gather<T>(tile.gradients + r);
        for (int64_t i = 0; i < n; i++) {
          const Vec<T> v =
              value(g, Vec<T>::loadu(z.data + i * z.stride + r), q ? Vec<T>::loadu(q + i * kTile + r) : none, c + i);
          Vec<T>::blendv(v, none, g.zero != none).store(out_block.data + i * kTile + r);
        }
      }
    };
    const auto weight_of = [&](int64_t i) { return Vec<T>(p.weight ? p.weight[i] : T(1)); };
    if (p.grad_probabilities) {
      each_vector([&](const GradientVectors<T>& g, const Vec<T>& x, const Vec<T>&, int64_t i) {
        return probability_gradient(g, x, weight_of(i));
      });
      store_tile(out_block.data, p.grad_probabilities, p.probabilities_type,
                 at.offset[kGradProbabilities] + c * layout.class_stride[kGradProbabilities],
                 layout.class_stride[kGradProbabilities], layout.inner_stride[kGradProbabilities], n, at.rows);
    }
    if (!p.grad_logits) continue;
    if (!has.any)
      each_vector(
          [&](const GradientVectors<T>& g, const Vec<T>& x, const Vec<T>&, int64_t) { return plain_gradient(g, x); });
    else
      each_vector([&](const GradientVectors<T>& g, const Vec<T>& x, const Vec<T>& y, int64_t i) {
        return full_gradient(p, has, g, x, y, weight_of(i), has.smooth ? Vec<T>(p.smooth[i]) : none);
      });
    store_tile(out_block.data, p.grad_logits, p.logits_type,
               at.offset[kGradLogits] + c * layout.class_stride[kGradLogits], layout.class_stride[kGradLogits],
               layout.inner_stride[kGradLogits], n, at.rows);
  }
  if (!p.grad_logits || p.has_probabilities) return;
  for (int64_t r = 0; r < at.rows; r++)
    if (!tile.targets[r].ignored)
      store_value(tile.gradients[r].at_target, p.grad_logits, p.logits_type,
                  at.offset[kGradLogits] + tile.targets[r].y * layout.class_stride[kGradLogits] +
                      r * layout.inner_stride[kGradLogits]);
}

template <typename T>
double visit_tile(const CrossEntropy<T>& p, int64_t unit) {
  const Position at = locate(p.layout, unit);
  const auto row_of = [&](int64_t r) { return at.offset[kRow] + r * p.layout.inner_stride[kRow]; };
  Tile<T> tile;
  for (int64_t r = 0; r < at.rows; r++)
    tile.targets[r] = load_target(p, row_of(r), at.offset[kLogits] + r * p.layout.inner_stride[kLogits]);
  double loss = 0;
  if (p.forward) {
    reduce_tile(p, at, tile);
    for (int64_t r = 0; r < at.rows; r++)
      loss += finish_row(p, row_of(r), tile.sums[r], tile.terms[r], tile.targets[r]);
  }
  if (!p.grad_logits && !p.grad_probabilities) return loss;
  for (int64_t r = 0; r < at.rows; r++) {
    const RowState state = p.forward ? RowState{static_cast<double>(tile.sums[r].max), tile.sums[r].log_sum(),
                                                tile.terms[r].b_sum, tile.terms[r].q_sum}
                                     : load_state(p, row_of(r));
    tile.gradients[r] = row_gradient(p, row_of(r), state, tile.targets[r]);
  }
  write_tile_gradient(p, at, tile);
  return loss;
}

template <typename T>
double cross_entropy(const CrossEntropy<T>& p, int64_t begin, int64_t end) {
  double loss = 0;
  for (int64_t unit = begin; unit < end; unit++) loss += p.layout.rows ? visit_row(p, unit) : visit_tile(p, unit);
  return loss;
}

}  // namespace

double cross_entropy_float(const CrossEntropy<float>& p, int64_t begin, int64_t end) {
  return cross_entropy(p, begin, end);
}
double cross_entropy_double(const CrossEntropy<double>& p, int64_t begin, int64_t end) {
  return cross_entropy(p, begin, end);
}

}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
