// Softmax cross entropy as an Op of the row kernels: the loss from the sums over a row's classes, and its gradient
// (formulas: docs/math.md; Op: rows.cuh).
#pragma once

#include "rows.cuh"

namespace softmax_ext {
namespace cuda {

// S: type of the logits. kGeneral: with what costs time for every class: a transformation of the logits, statistics,
// weights in the smoothing, probability targets. Without it the sum of exponentials is all there is.
template <typename S, typename Arithmetic, bool kGeneral>
struct CrossEntropyOp : CrossEntropyParams<Arithmetic> {
  using In = S;
  using Out = S;
  using T = Arithmetic;
  using Math = ScalarMath<T>;
  using Sums = std::conditional_t<kGeneral, RowSums<T>, LogSumExp<T>>;
  static constexpr int kInputs = 1, kOutputOperand = kGradLogits;
  static constexpr bool kMaximum = true;
  static constexpr int kTwoPassChunks = sizeof(T) == 8 || kGeneral ? 1 : 4;
  static constexpr ColumnShape kColumns = kGeneral ? ColumnShape{8, 8} : ColumnShape{10, 16};
  static constexpr int kRegisterChunks = sizeof(T) == 8   ? 0
                                         : !kGeneral      ? 8
                                         : sizeof(S) == 4 ? 4
                                                          : 3;  // what 64 registers hold

  struct Context {
    int64_t row;
    int64_t probabilities, grad_probabilities;  // where they begin
    int64_t target = 0;                         // as it is given
    T max = 0, rest = 0;                        // of the state, in backward
    int y = -1;                                 // class; -1 with probabilities, where ignored, and where out of range
    bool live = true, out_of_range = false;     // not ignored; out of range
    T z = 0, weight = 1;                        // of class y; z is the leader's alone
    T g = 0;                                    // upstream gradient of the loss, unless kGeneral: no register is left
  };

  // at_target is the leader's alone.
  struct Coefficients : GradientCoefficients<T> {
    T max;
  };

  DeviceLayout layout;
  bool reduces, writes, writes_second;  // forward; a gradient of the logits; a gradient of the probabilities
  LogitTransform<T> transform;
  T share;  // label_smoothing / classes

  __device__ __forceinline__ bool never_in_registers() const { return this->has_probabilities || writes_second; }
  __device__ __forceinline__ bool is_noop() const { return false; }
  __device__ __forceinline__ bool overwrites() const { return this->logits == this->grad_logits; }
  __device__ __forceinline__ static int input_operand(int) { return kLogits; }
  __device__ __forceinline__ const S* input(int, const Position& at) const {
    return static_cast<const S*>(this->logits) + at.offset[kLogits];
  }
  __device__ __forceinline__ S* output(const Position& at) const {
    return static_cast<S*>(this->grad_logits) + at.offset[kGradLogits];
  }

  __device__ __forceinline__ T transformed(T x) const {
    if (!kGeneral) return x;
    return transform.is_capped() ? capped_logit<Math>(x, transform.inner_scale, transform.cap) : x * transform.scale;
  }
  __device__ __forceinline__ T logit(const Elements<CrossEntropyOp>& x) const { return transformed(x.of[0]); }

  __device__ __forceinline__ Context fetch(const Position& at) const {
    Context context;
    context.row = at.offset[kRow];
    context.probabilities = at.offset[kProbabilities];
    context.grad_probabilities = at.offset[kGradProbabilities];
    if (!this->has_probabilities) context.target = this->index ? this->index[context.row] : this->index_u8[context.row];
    if (!reduces) {
      context.max = this->state[context.row];
      context.rest = this->state[this->rows + context.row];
    }
    return context;
  }

  __device__ __forceinline__ void decode_target(Context& context) const {
    if (!kGeneral && writes) context.g = row_value<T>(this->grad_loss, context.row);
    if (this->has_probabilities) return;
    const int64_t classes = layout.classes, y = context.target;
    context.live = y != this->options.ignore_index;
    context.out_of_range = context.live && static_cast<uint64_t>(y) >= static_cast<uint64_t>(classes);
    if (context.live && !context.out_of_range) context.y = static_cast<int>(y);
  }

  template <typename Value>
  __device__ __forceinline__ void read_target_logit(Context& context, bool leader, const Value& value) const {
    if (context.y < 0) return;
    if (this->weight) context.weight = this->weight[context.y];
    if (leader) context.z = transformed(value(context.y));
  }

  // An ignored row, unless one of its statistics has a gradient; and unless one is wanted.
  __device__ __forceinline__ bool zero_gradient(const Context& context) const {
    return !context.live && !this->grad_lse.given && !has_entropy_gradient();
  }
  __device__ __forceinline__ bool skip_row(const Context& context) const {
    return zero_gradient(context) && !this->stats;
  }

  __device__ __forceinline__ bool has_entropy_gradient() const { return kGeneral && this->grad_entropy.given; }

  __device__ __forceinline__ T class_weight(int c) const { return this->weight ? this->weight[c] : T(1); }

  __device__ __forceinline__ T probability(const Context& context, int c) const {
    return load_value<T>(this->probabilities, this->probabilities_type,
                         context.probabilities + c * layout.class_stride[kProbabilities]);
  }

  __device__ __forceinline__ void add(Sums& sums, const Context& context, const Elements<CrossEntropyOp>& x,
                                      int c) const {
    const T z = logit(x), d = z - sums.shift(), e = exp_nonpositive<S>(d);
    sums.add(z, e);
    if constexpr (kGeneral) add_terms(sums, context, z, d, e, c);
  }

  __device__ __forceinline__ void add_terms(Sums& sums, const Context& context, T z, T d, T e, int c) const {
    if (this->stats) {
      sums.weighted += multiply_or_zero(e, d);
      if (z == sums.max) sums.argmax = min(sums.argmax, c);
      if (z != z) sums.first_nan = min(sums.first_nan, c);
    }
    if (this->has_probabilities) {
      const T q = probability(context, c);
      const T b = class_weight(c) * multiply_add(q, 1 - this->options.label_smoothing, share);
      sums.dot += multiply_or_zero(b, d);
      sums.b_sum += b;
      sums.q_dot += multiply_or_zero(q, d);
      sums.q_sum += q;
    } else if (this->options.label_smoothing != 0) {
      const T w = class_weight(c);
      sums.dot += multiply_or_zero(w, d);
      sums.b_sum += w;
    }
  }

  __device__ __forceinline__ RowRules<T> rules() const {
    RowRules<T> rules;
    rules.has_probabilities = kGeneral && this->has_probabilities;
    rules.has_weight = this->weight;
    rules.has_entropy_gradient = has_entropy_gradient();
    rules.writes_second = kGeneral && writes_second;
    rules.is_capped = kGeneral && transform.is_capped();
    rules.eps = this->options.label_smoothing;
    rules.share = share;
    rules.z_loss = this->options.z_loss;
    rules.scale = kGeneral ? transform.scale : T(1);
    return rules;
  }

  // The row's sums as backward needs them.
  struct State {
    T max, rest, b_sum, q_sum;
  };

  __device__ __forceinline__ Coefficients finish(const Context& context, const Sums& sums, bool leader) const {
    const int64_t row = context.row;
    State s{0, 0, 1, 1};
    if (!reduces) {
      if (!skip_row(context)) s = {context.max, context.rest, 1, 1};
      if (this->has_probabilities && !skip_row(context)) {
        s.b_sum = this->state[2 * this->rows + row];
        s.q_sum = this->state[3 * this->rows + row];
      }
    } else {
      if (!skip_row(context)) s = {sums.max, sums.rest(), 1, 1};
      if constexpr (kGeneral)
        if (this->has_probabilities) s = {s.max, s.rest, sums.b_sum, sums.q_sum};
      if (leader) write_row(context, sums, s);
    }
    return writes || writes_second ? coefficients(context, s, leader) : Coefficients{};
  }

  // One row as row_math.h asks for it.
  struct StateRow {
    const CrossEntropyOp& op;
    const Context& context;
    const State& s;

    __device__ __forceinline__ T max() const { return s.max; }
    __device__ __forceinline__ T rest() const { return s.rest; }
    __device__ __forceinline__ T z() const { return context.z; }
    __device__ __forceinline__ T weight() const { return context.weight; }
    __device__ __forceinline__ T weight_sum() const {
      return op.weight_sum ? static_cast<T>(*op.weight_sum) : static_cast<T>(op.layout.classes);
    }
    __device__ __forceinline__ T b_sum() const { return s.b_sum; }
    __device__ __forceinline__ T q_sum() const { return s.q_sum; }
  };

  // With the sums that are wanted in forward alone.
  struct SummedRow : StateRow {
    const Sums& sums;

    __device__ __forceinline__ T dot() const {
      if constexpr (kGeneral) return sums.dot;
      return 0;
    }
    __device__ __forceinline__ T q_dot() const {
      if constexpr (kGeneral) return sums.q_dot;
      return 0;
    }
  };

  struct GradientRow : StateRow {
    bool leader;

    __device__ __forceinline__ T g_loss() const {
      const T g = kGeneral ? row_value<T>(this->op.grad_loss, this->context.row) : this->context.g;
      return this->context.live ? g : T(0);
    }
    __device__ __forceinline__ T g_lse() const { return row_value<T>(this->op.grad_lse, this->context.row); }
    __device__ __forceinline__ T g_nll() const {
      return this->context.live ? row_value<T>(this->op.grad_nll, this->context.row) : T(0);
    }
    __device__ __forceinline__ T g_entropy() const {
      return kGeneral ? row_value<T>(this->op.grad_entropy, this->context.row) : T(0);
    }
    __device__ __forceinline__ T entropy() const { return this->op.entropy[this->context.row]; }
    __device__ __forceinline__ bool has_target() const { return leader && this->context.y >= 0; }
    __device__ __forceinline__ T exp_at_target(T d) const { return exp_nonpositive<T>(d); }
    __device__ __forceinline__ T tanh_at_target(T z) const { return z * this->op.transform.inverse_cap; }
  };

  // What forward writes of a row.
  __device__ __forceinline__ void write_row(const Context& context, const Sums& sums, const State& s) const {
    const int64_t row = context.row, rows = this->rows;
    RowRules<T> forward_rules = rules();
    if (!kGeneral) forward_rules.eps = 0;
    const RowLoss<T> of = row_loss<Math>(forward_rules, SummedRow{{*this, context, s}, sums});
    T loss = of.loss, nll = of.nll;
    if (context.out_of_range) loss = nll = not_a_number<T>();
    if (!context.live) loss = nll = 0;
    if (this->loss) store_value(loss, this->loss, this->loss_type, row);
    if (this->state) {
      this->state[row] = s.max;
      this->state[rows + row] = s.rest;
      if (this->has_probabilities) {
        this->state[2 * rows + row] = s.b_sum;
        this->state[3 * rows + row] = s.q_sum;
      }
    }
    if constexpr (kGeneral) {
      if (!this->stats) return;
      this->lse[row] = of.lse;
      this->nll[row] = nll;
      this->entropy[row] = row_entropy<Math>(of.log_sum, sums.weighted, s.rest);
      this->prediction[row] = sums.prediction();
    }
  }

  __device__ __forceinline__ Coefficients coefficients(const Context& context, const State& s, bool leader) const {
    Coefficients k{gradient_coefficients<Math>(rules(), GradientRow{{*this, context, s}, leader}), s.max};
    if (context.out_of_range) k.alpha = not_a_number<T>();
    return k;
  }

  __device__ __forceinline__ T value(const Context& context, const Coefficients& k, const Elements<CrossEntropyOp>& x,
                                     int c) const {
    const T z = logit(x), d = z - k.max, e = exp_nonpositive<S>(d);
    if constexpr (!kGeneral) return plain_gradient<Math>(k, e);
    const GradientTerms has{has_entropy_gradient(), k.smooth != 0, this->has_probabilities, transform.is_capped()};
    const T q = has.probabilities ? probability(context, c) : T(0);
    const T w = has.probabilities || has.smooth ? class_weight(c) : T(1);
    const T gradient = gradient_without_slope<Math>(has, k, d, e, q, w, transform.scale);
    return has.capped ? gradient * capped_slope(z * transform.inverse_cap) : gradient;
  }

  __device__ __forceinline__ bool target_override(const Context& context, const Coefficients& k, int& c,
                                                  T& value) const {
    c = context.y;
    value = k.at_target;
    return context.y >= 0;
  }

  __device__ __forceinline__ void write_second(const Context& context, const Coefficients& k,
                                               const Elements<CrossEntropyOp>& x, int c) const {
    const T gradient = probability_gradient<Math>(k, logit(x) - k.max, class_weight(c));
    store_value(gradient, this->grad_probabilities, this->probabilities_type,
                context.grad_probabilities + c * layout.class_stride[kGradProbabilities]);
  }
};

}  // namespace cuda
}  // namespace softmax_ext
