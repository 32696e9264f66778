// Softmax cross entropy as an Op of the row kernels: the loss from the sums over a row's classes, and its gradient
// (formulas: docs/math.md; Op: op.cuh); and its launch.
#pragma once

#include "../row_part.h"
#include "dispatch.cuh"

namespace softmax_ext {
namespace cuda {

template <typename T>
struct CrossEntropyCoefficients : GradientCoefficients<T> {
  T max;
};

// What a kernel can do, each with what the one before it can. The more there is, the more registers it takes.
//
//   kPlain      the sum of exponentials is all that it needs of the classes: class indices, class weights, row weights,
//               z_loss, and in backward smoothing without weights
//   kOptions    a transformation of the logits, smoothing, row weights by probability, statistics and their gradients,
//               sums of a part of the classes, a factor of z_loss
//   kAll        probability targets and their gradient; arithmetic in double, which is not for speed
enum class Kind { kPlain, kOptions, kAll };

// Classes of a row that a thread can hold.
constexpr int64_t most_in_thread(Kind kind) {
  return kind == Kind::kPlain ? kSmallClasses : kind == Kind::kOptions ? kSmallClasses / 2 : 0;
}

// S: type of the logits.
template <typename S, typename Arithmetic, Kind kKind>
struct CrossEntropyOp : CrossEntropyParams<Arithmetic> {
  using In = S;
  using Out = S;
  using T = Arithmetic;
  static constexpr bool kGeneral = kKind != Kind::kPlain, kHasProbabilities = kKind == Kind::kAll;
  using Math = ScalarMath<T>;
  using Sums = std::conditional_t<kGeneral, RowSums<T>, ExpSum<T>>;
  static constexpr int kInputs = 1, kOutputOperand = kGradLogits;
  static constexpr bool kMaximum = true, kPredicts = kGeneral, kHasTotal = true;
  // What 64 registers hold; and loads under way at once.
  static constexpr int kKeptChunks = kKind == Kind::kAll ? 0 : 8, kKeptThreads = kGeneral ? 512 : 1024;
  static constexpr int64_t kMostInThread = most_in_thread(kKind);
  static constexpr int kStreamedChunks = sizeof(T) == 8 ? 1 : kGeneral && sizeof(S) == 2 ? 2 : 4;

  struct Row {
    int64_t number;
    int64_t probabilities, grad_probabilities;  // where they begin
    int64_t y;                                  // the class, counted from that of the first logit
    T max, rest;                                // of the state, in backward
    T g;                                        // upstream gradient of the loss
    T target_logit;                             // where the row's own weight is by probability
  };
  using Coefficients = CrossEntropyCoefficients<T>;

  DeviceLayout layout;
  bool reduces;
  LogitTransform<T> transform;
  T share;  // label_smoothing / classes
  LossTotal total;

  DEVICE bool is_done() const { return false; }
  DEVICE bool has_total() const { return total.shares; }
  SOFTMAX_EXT_INLINE static int input_operand(int) { return kLogits; }
  SOFTMAX_EXT_INLINE const S* input(int) const { return static_cast<const S*>(this->logits); }
  SOFTMAX_EXT_INLINE S* output() const { return static_cast<S*>(this->grad_logits); }

  DEVICE T sign() const { return kGeneral && transform.scale < 0 ? T(-1) : T(1); }
  DEVICE T logit(T x) const {
    if (!kGeneral) return x;
    // Rounded before anything is subtracted: the largest logit less the maximum is to be 0.
    return transform.is_capped() ? rounded_product(transform.cap, Math::tanh(x * transform.inner_scale))
                                 : rounded_product(x, transform.scale);
  }
  DEVICE T slope(T x) const { return capped_slope<Math>(x, transform.size, transform.size_lost); }

  // ---- what is known of a row beforehand

  DEVICE Row row(const Position& at) const {
    Row row{};
    row.number = at.offset[kRow];
    if (kHasProbabilities && this->has_probabilities) {
      row.probabilities = at.offset[kProbabilities];
      row.grad_probabilities = at.offset[kGradProbabilities];
    } else {
      row.y = (this->index ? this->index[row.number] : this->index_u8[row.number]) - this->first_class;
    }
    if (!reduces) {
      row.max = this->state[row.number];
      row.rest = this->state[this->rows + row.number];
    }
    if (writes_anything()) row.g = row_value<T>(this->grad_loss, row.number);
    // Every thread needs it, and reads it before any is overwritten: there is a reduction in between.
    if (weighs_by_probability() && target(row) >= 0)
      row.target_logit = logit(widen(input(0)[at.offset[kLogits] + row.y * layout.class_stride[kLogits]]));
    return row;
  }
  DEVICE bool weighs_by_probability() const { return kGeneral && reduces && this->options.weighs_by_probability; }
  DEVICE bool has_classes() const { return !(kHasProbabilities && this->has_probabilities); }
  DEVICE bool is_live(const Row& row) const {
    return !has_classes() || row.y + this->first_class != this->options.ignore_index;
  }
  DEVICE bool is_in_range(const Row& row) const {
    return static_cast<uint64_t>(row.y + this->first_class) < static_cast<uint64_t>(this->all_classes);
  }
  DEVICE bool has_class(const Row& row) const { return has_classes() && is_live(row) && is_in_range(row); }
  DEVICE int target(const Row& row) const {
    const bool has_logit = static_cast<uint64_t>(row.y) < static_cast<uint64_t>(layout.classes);
    return has_class(row) && has_logit ? static_cast<int>(row.y) : -1;
  }
  DEVICE bool is_out_of_range(const Row& row) const { return has_classes() && is_live(row) && !is_in_range(row); }

  // An ignored row has the output 0 unless one of its statistics has a gradient, and is skipped unless one is wanted.
  // With skips_ignored it has none.
  DEVICE bool is_zero(const Row& row) const {
    return !is_live(row) && !(has_ignored_statistics() && (this->grad_lse.given || this->grad_entropy.given));
  }
  DEVICE bool is_skipped(const Row& row) const { return is_zero(row) && !(has_ignored_statistics() && this->stats); }
  DEVICE bool has_ignored_statistics() const { return kGeneral && !this->options.skips_ignored; }
  DEVICE bool wants_prediction() const { return kGeneral && this->stats; }
  DEVICE bool has_entropy_gradient() const { return kGeneral && this->grad_entropy.given; }
  DEVICE bool writes_anything() const { return this->grad_logits || (kHasProbabilities && this->grad_probabilities); }

  // Of classes c, c + 1, ...; ones without weights.
  template <int n>
  DEVICE void load_weights(int c, int count, T (&w)[n]) const {
    if (this->weight)
      load_values(this->weight, kArithmeticType<T>, c, 1, count, w);
    else
      for (T& one : w) one = 1;
  }
  template <int n>
  DEVICE void load_probabilities(const Row& row, int c, int count, T (&q)[n]) const {
    const int64_t stride = layout.class_stride[kProbabilities];
    load_values(this->probabilities, this->probabilities_type, row.probabilities + c * stride, stride, count, q);
  }

  // ---- the sums of a row

  template <typename Chunk>
  DEVICE void add(Sums& sums, T max, const Row& row, const Chunk& held, int c, int count) const {
    constexpr int n = Chunk::kElements;
    T d[n], e[n];
#pragma unroll
    for (int i = 0; i < n; i++)
      if (i < count) {
        d[i] = logit(held.at(i).of[0]) - max;
        e[i] = exp_nonpositive(d[i]);
        sums.sum += e[i];
      }
    if constexpr (kGeneral) {
      const auto each = [&](const auto& visit) {
#pragma unroll
        for (int i = 0; i < n; i++)
          if (i < count) visit(i);
      };
      // exp(-inf) is 0, and 0 * -inf would be NaN.
      if (this->stats) each([&](int i) { sums.weighted += e[i] * larger(d[i], lowest<T>()); });
      T w[n], q[n];
      if (kHasProbabilities && this->has_probabilities) {
        load_weights(c, count, w);
        load_probabilities(row, c, count, q);
        each([&](int i) {
          const T b = w[i] * fma(q[i], 1 - this->options.label_smoothing, share);
          sums.dot += product_or_zero(b, d[i]);
          sums.b_sum += b;
          sums.q_dot += product_or_zero(q[i], d[i]);
          sums.q_sum += q[i];
        });
      } else if (this->options.label_smoothing != 0 && this->weight) {
        load_weights(c, count, w);
        each([&](int i) {
          sums.dot += product_or_zero(w[i], d[i]);
          sums.b_sum += w[i];
        });
      } else if (this->options.label_smoothing != 0) {
        each([&](int i) { sums.dot += d[i]; });
        sums.b_sum += count;
      }
    }
  }

  // ---- from the sums to the loss and the gradient (row_math.h)

  DEVICE RowRules<T> rules() const {
    RowRules<T> rules;
    rules.has_probabilities = kHasProbabilities && this->has_probabilities;
    rules.has_weight = this->weight;
    rules.weighs_rows = this->row_weight || weighs_by_probability();
    rules.has_entropy_gradient = has_entropy_gradient();
    rules.writes_second = kHasProbabilities && this->grad_probabilities;
    rules.is_capped = kGeneral && transform.is_capped();
    rules.eps = this->options.label_smoothing;
    rules.share = share;
    rules.z_loss = this->options.z_loss;
    if (kGeneral && this->z_factor) rules.z_loss *= static_cast<T>(*this->z_factor);
    rules.scale = kGeneral ? transform.scale : T(1);
    return rules;
  }

  // One row as row_math.h asks for it.
  struct StateRow {
    const CrossEntropyOp& op;
    const Row& row;
    const Sums& sums;
    bool leader;
    T state_max, state_rest, state_b_sum, state_q_sum, log_of_sum, target_element, target_logit, target_weight,
        own_weight;

    DEVICE T max() const { return state_max; }
    DEVICE T rest() const { return state_rest; }
    DEVICE T log_sum() const { return log_of_sum; }
    DEVICE T z() const { return target_logit; }
    DEVICE T weight() const { return target_weight; }
    DEVICE T row_weight() const { return own_weight; }
    DEVICE T weight_sum() const {
      return op.weight_sum ? static_cast<T>(*op.weight_sum) : static_cast<T>(op.all_classes);
    }
    DEVICE T b_sum() const { return state_b_sum; }
    DEVICE T q_sum() const { return state_q_sum; }
    DEVICE T dot() const {
      if constexpr (kGeneral) return sums.dot;
      return 0;
    }
    DEVICE T q_dot() const {
      if constexpr (kGeneral) return sums.q_dot;
      return 0;
    }
    DEVICE T upstream(const RowValues& values) const { return kGeneral ? row_value<T>(values, row.number) : T(0); }
    DEVICE T g_loss() const { return op.is_live(row) ? row.g : T(0); }
    DEVICE T g_lse() const { return upstream(op.grad_lse); }
    DEVICE T g_nll() const { return op.is_live(row) ? upstream(op.grad_nll) : T(0); }
    DEVICE T g_entropy() const { return upstream(op.grad_entropy); }
    DEVICE T entropy() const { return op.entropy[row.number]; }
    DEVICE bool has_target() const { return leader && op.target(row) >= 0; }
    DEVICE T exp_at_target(T d) const { return exp(d); }
    DEVICE T slope_at_target() const { return op.slope(target_element); }
  };

  DEVICE Coefficients finish(const Row& row, const Sums& sums, const Outcome<T>& outcome, T x, bool leader,
                             Totals& total_share) const {
    const T z = logit(x);
    StateRow s{*this, row, sums, leader, outcome.max, outcome.rest, 1, 1, 0, x, z, 1, 0};
    if (!reduces) s.state_max = row.max, s.state_rest = row.rest;
    if (is_skipped(row)) s.state_max = s.state_rest = 0;
    if constexpr (kHasProbabilities)
      if (!has_classes()) {
        s.state_b_sum = reduces ? sums.b_sum : this->state[2 * this->rows + row.number];
        s.state_q_sum = reduces ? sums.q_sum : this->state[3 * this->rows + row.number];
      }
    // The leader asks for it, and some options.
    if (kGeneral || leader || this->options.z_loss != 0) s.log_of_sum = log1p(s.state_rest);
    if (this->weight && has_class(row)) s.target_weight = this->weight[row.y];
    if constexpr (kGeneral)
      if (reduces && leader && this->part) {
        write_part(s, outcome);
        return {};
      }
    if (this->row_weight && is_live(row)) s.own_weight = this->row_weight[row.number];  // of an ignored row 0
    if (weighs_by_probability() && has_class(row))
      s.own_weight = target_probability<Math>(exp((leader ? z : row.target_logit) - s.state_max), s.state_rest);
    if (reduces && leader) total_share = write_row(s, outcome.prediction);
    if (!writes_anything()) return {};
    Coefficients k{gradient_coefficients<Math>(rules(), s), s.state_max};
    if (is_out_of_range(row)) k.alpha = not_a_number<T>();
    return k;
  }

  // What forward writes of a part of a row.
  DEVICE void write_part(const StateRow& s, const Outcome<T>& outcome) const {
    const bool nothing = s.sums.sum == 0;  // all logits are -inf
    RowPart part;
    part.max = nothing ? -INFINITY : outcome.max;
    part.rest = nothing ? 0 : outcome.rest;
    part.target = target(s.row) < 0 ? T(0) : s.z();
    part.dot = s.sums.dot;
    part.b_sum = s.sums.b_sum;
    part.q_dot = s.sums.q_dot;
    part.q_sum = s.sums.q_sum;
    part.weighted = s.sums.weighted;
    const double prediction = outcome.prediction;
    part.argmax = prediction < 0 ? prediction - this->first_class : prediction + this->first_class;
    store_part(*this, part, s.row.number);
  }

  // What forward writes of a row; returns its share of the total.
  DEVICE Totals write_row(const StateRow& s, int64_t prediction) const {
    const int64_t row = s.row.number, rows = this->rows;
    RowRules<T> forward_rules = rules();
    if (!kGeneral) forward_rules.eps = 0;
    const RowLoss<T> of = row_loss<Math>(forward_rules, s);
    T loss = of.loss, nll = of.nll;
    const bool out_of_range = is_out_of_range(s.row), live = is_live(s.row);
    if (out_of_range) loss = nll = not_a_number<T>();
    if (!live) loss = nll = 0;
    if (this->loss) store_value(loss, this->loss, this->loss_type, row);
    if (this->state) {
      this->state[row] = s.state_max;
      this->state[rows + row] = s.state_rest;
      if (weighs_by_probability()) this->state[2 * rows + row] = s.own_weight;
      if (!has_classes()) {
        this->state[2 * rows + row] = s.state_b_sum;
        this->state[3 * rows + row] = s.state_q_sum;
      }
    }
    if constexpr (kGeneral)
      if (this->stats) {
        this->lse[row] = of.lse;
        this->nll[row] = nll;
        const bool skipped = is_skipped(s.row);
        this->entropy[row] = skipped ? T(0) : row_entropy<Math>(of.log_sum, s.sums.weighted, s.state_rest);
        this->prediction[row] = skipped ? -1 : prediction < 0 ? -1 - prediction : prediction;
      }
    const bool counts = live && !out_of_range && this->all_classes > 0;
    const double own = this->row_weight ? s.own_weight : T(1);
    return {static_cast<double>(loss), counts ? own * static_cast<double>(s.target_weight) : 0};
  }
  DEVICE void add_to_total(const Totals& totals, unsigned unit, bool has) const { total.add(totals, unit, has); }

  // ---- the gradient of a class

  template <typename Chunk, int n>
  DEVICE void compute(const Row& row, const Coefficients& k, const Chunk& held, int c, int count,
                      T (&values)[n]) const {
    if constexpr (!kGeneral) {
#pragma unroll
      for (int i = 0; i < n; i++) values[i] = plain_gradient<Math>(k, exp_nonpositive(held.at(i).of[0] - k.max));
    } else {
      const GradientTerms has{has_entropy_gradient(), k.smooth != 0, !has_classes(), transform.is_capped()};
      T q[n], w[n];
      if (has.probabilities) load_probabilities(row, c, count, q);
      if (has.probabilities || has.smooth) load_weights(c, count, w);
#pragma unroll
      for (int i = 0; i < n; i++) {
        const T x = held.at(i).of[0], d = logit(x) - k.max;
        if (kHasProbabilities && this->grad_probabilities && i < count)
          write_probability_gradient(row, k, d, w[i], c + i);
        values[i] = gradient_without_slope<Math>(has, k, d, exp_nonpositive(d), q[i], w[i], transform.scale);
        if (has.capped) values[i] *= slope(x);
      }
    }
  }
  DEVICE void write_probability_gradient(const Row& row, const Coefficients& k, T d, T w, int c) const {
    store_value(probability_gradient<Math>(k, d, w), this->grad_probabilities, this->probabilities_type,
                row.grad_probabilities + c * layout.class_stride[kGradProbabilities]);
  }
  DEVICE void write_target(const Row&, const Coefficients& k, S* to) const {
    if (this->grad_logits) narrow(k.at_target, *to);
  }
};

// ---- the launch of one kind, which is compiled in a unit of its own, beside the others ------------------------------

template <typename S, Kind kKind, typename T>
CrossEntropyOp<S, T, kKind> op_for(const CrossEntropyParams<T>& params, const Layout& layout) {
  CrossEntropyOp<S, T, kKind> op{};
  static_cast<CrossEntropyParams<T>&>(op) = params;
  op.layout = device_layout(layout);
  op.reduces = params.forward;
  op.transform = LogitTransform(params.options);
  op.share = static_cast<T>(params.options.label_smoothing / static_cast<double>(params.all_classes));
  return op;
}

template <Kind kKind, typename T>
void launch_kind(const CrossEntropyParams<T>& params, const Layout& layout, const LossSum* sum, Stream stream) {
  visit_dtype<Halves>(params.logits_type, [&](auto element) {
    using S = typename decltype(element)::Type;
    if constexpr (sizeof(S) > sizeof(T)) {
      throw std::logic_error("cross_entropy: float64 logits need arithmetic in double");
    } else {
      const auto op = op_for<S, kKind>(params, layout);
      const bool writes = params.grad_logits || params.grad_probabilities;
      launch_op(kKind == Kind::kPlain ? "cross_entropy" : "cross_entropy with options", op, layout, writes, sum,
                stream);
    }
  });
}

}  // namespace cuda
}  // namespace softmax_ext
