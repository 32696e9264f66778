// Softmax cross entropy as an Op of the row kernels: the loss from the sums over a row's classes, and its gradient
// (formulas: docs/math.md; Op: rows.cuh).
#pragma once

#include "rows.cuh"

namespace softmax_ext {
namespace cuda {

// What the kernels are given of a call, the same for all types.
template <typename T>
struct CrossEntropyArguments {
  DeviceLayout layout;
  bool reduces, writes, has_extra;  // forward; a gradient of the logits; a gradient of the probabilities

  const void* logits;
  void* grad_logits;
  const int64_t* index;
  const uint8_t* index_u8;
  const void* probabilities;
  DType probabilities_type;
  void* grad_probabilities;
  const T* weight;
  const double* weight_sum;
  int64_t ignore_index;
  T label_smoothing, share;  // share: label_smoothing / classes
  T z_loss, softcap, inverse_softcap, logit_scale;

  int64_t rows;
  void* loss;
  DType loss_type;
  T* state;
  bool has_probabilities, stats;
  T *lse, *nll, *entropy;
  int64_t* prediction;
  Upstream grad_loss, grad_lse, grad_nll, grad_entropy;
};

// S: type of the logits. kGeneral: with what costs time for every class: a transformation of the logits, statistics,
// weights in the smoothing, probability targets. Without it the sum of exponentials is all there is.
template <typename S, typename Arithmetic, bool kGeneral>
struct CrossEntropyOp : CrossEntropyArguments<Arithmetic> {
  using In = S;
  using Out = S;
  using T = Arithmetic;
  using Sums = std::conditional_t<kGeneral, RowSums<T>, LogSumExp<T>>;
  static constexpr int kInputs = 1, kOutputOperand = kGradLogits;
  static constexpr bool kMaximum = true;
  static constexpr int kStreamChunks = sizeof(T) == 8 || kGeneral ? 1 : 4;
  static constexpr ColumnShape kColumns = kGeneral ? ColumnShape{8, 8} : ColumnShape{10, 16};
  static constexpr int kKeptChunks = sizeof(T) == 8   ? 0
                                     : !kGeneral      ? 8
                                     : sizeof(S) == 4 ? 4
                                                      : 3;  // what 64 registers hold

  struct Context {
    int64_t row;
    int64_t probabilities, grad_probabilities;  // where they begin
    int64_t target = 0;                         // as it is given
    T max = 0, rest = 0;                        // of the state, in backward
    int y = -1;                                 // class; -1 with probabilities, where ignored, and where out of range
    bool live = true, bad = false;              // not ignored; out of range
    T z = 0, weight = 1;                        // of class y; z is the leader's alone
    T g = 0;                                    // upstream gradient of the loss, unless kGeneral: no register is left
  };

  // dL/dx_c = slope_c [ exp(z_c - max) (alpha + beta (z_c - max)) - uniform - smooth w_c - scale q_c (kept w_c + nll) ]
  // slope_c is 1 - (z_c / softcap)^2, or 1; scale is logit_scale, which is in alpha, beta, uniform and smooth.
  struct Coefficients {
    T max, alpha, uniform;
    T beta, smooth, kept, nll, log_sum;  // kGeneral
    T at_target;                         // the whole gradient of class y; the leader's alone
  };

  __device__ __forceinline__ bool never_kept() const { return this->has_probabilities || this->has_extra; }
  __device__ __forceinline__ bool idle() const { return false; }
  __device__ __forceinline__ bool overwrites() const { return this->logits == this->grad_logits; }
  __device__ __forceinline__ static int input_operand(int) { return kLogits; }
  __device__ __forceinline__ const S* input(int, const Position& at) const {
    return static_cast<const S*>(this->logits) + at.offset[kLogits];
  }
  __device__ __forceinline__ S* output(const Position& at) const {
    return static_cast<S*>(this->grad_logits) + at.offset[kGradLogits];
  }

  // softcap * tanh(logit_scale * x / softcap), or logit_scale * x
  __device__ __forceinline__ T logit(T x) const {
    if (!kGeneral) return x;
    x *= this->logit_scale;
    return this->softcap == 0 ? x : this->softcap * tanh_of(x * this->inverse_softcap);
  }
  __device__ __forceinline__ T level(const Elements<CrossEntropyOp>& x) const { return logit(x.of[0]); }

  __device__ __forceinline__ Context fetch(const Position& at) const {
    Context context;
    context.row = at.offset[kRow];
    context.probabilities = at.offset[kProbabilities];
    context.grad_probabilities = at.offset[kGradProbabilities];
    if (!this->has_probabilities) context.target = this->index ? this->index[context.row] : this->index_u8[context.row];
    if (!this->reduces) {
      context.max = this->state[context.row];
      context.rest = this->state[this->rows + context.row];
    }
    return context;
  }

  __device__ __forceinline__ void begin(Context& context) const {
    if (!kGeneral && this->writes) context.g = upstream(this->grad_loss, context.row);
    if (this->has_probabilities) return;
    const int64_t classes = this->layout.classes, y = context.target;
    context.live = y != this->ignore_index;
    context.bad = context.live && static_cast<uint64_t>(y) >= static_cast<uint64_t>(classes);
    if (context.live && !context.bad) context.y = static_cast<int>(y);
  }

  template <typename Value>
  __device__ __forceinline__ void keep(Context& context, bool leader, const Value& value) const {
    if (context.y < 0) return;
    if (this->weight) context.weight = this->weight[context.y];
    if (leader) context.z = logit(value(context.y));
  }

  // An ignored row, unless one of its statistics has a gradient; and unless one is wanted.
  __device__ __forceinline__ bool clears(const Context& context) const {
    return !context.live && !this->grad_lse.given && !has_entropy_gradient();
  }
  __device__ __forceinline__ bool skips(const Context& context) const { return clears(context) && !this->stats; }

  __device__ __forceinline__ bool has_entropy_gradient() const { return kGeneral && this->grad_entropy.given; }

  __device__ __forceinline__ T class_weight(int c) const { return this->weight ? this->weight[c] : T(1); }

  __device__ __forceinline__ T probability(const Context& context, int c) const {
    return load_value<T>(this->probabilities, this->probabilities_type,
                         context.probabilities + c * this->layout.class_stride[kProbabilities]);
  }

  __device__ __forceinline__ void add(Sums& sums, const Context& context, const Elements<CrossEntropyOp>& x,
                                      int c) const {
    const T z = level(x), d = z - sums.shift(), e = exp_nonpositive<S>(d);
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
      const T b = class_weight(c) * multiply_add(q, 1 - this->label_smoothing, this->share);
      sums.dot += multiply_or_zero(b, d);
      sums.b_sum += b;
      sums.q_dot += multiply_or_zero(q, d);
      sums.q_sum += q;
    } else if (this->label_smoothing != 0) {
      const T w = class_weight(c);
      sums.dot += multiply_or_zero(w, d);
      sums.b_sum += w;
    }
  }

  __device__ __forceinline__ T upstream(const Upstream& gradient, int64_t row) const {
    if (!gradient.given) return 0;
    const T value = gradient.data ? load_value<T>(gradient.data, gradient.type, row * gradient.stride) : T(1);
    return gradient.divisor ? divide(value, static_cast<T>(*gradient.divisor)) : value;
  }

  // The row's sums as backward needs them.
  struct State {
    T max, rest, b_sum, q_sum;
  };

  __device__ __forceinline__ Coefficients finish(const Context& context, const Sums& sums, bool leader) const {
    const int64_t row = context.row;
    State s{0, 0, 1, 1};
    if (!this->reduces) {
      if (!skips(context)) s = {context.max, context.rest, 1, 1};
      if (this->has_probabilities && !skips(context)) {
        s.b_sum = this->state[2 * this->rows + row];
        s.q_sum = this->state[3 * this->rows + row];
      }
    } else {
      if (!skips(context)) s = {sums.max, sums.rest(), 1, 1};
      if constexpr (kGeneral)
        if (this->has_probabilities) s = {s.max, s.rest, sums.b_sum, sums.q_sum};
      if (leader) write_row(context, sums, s);
    }
    return this->writes || this->has_extra ? coefficients(context, s, leader) : Coefficients{};
  }

  // What forward writes of a row.
  __device__ __forceinline__ void write_row(const Context& context, const Sums& sums, const State& s) const {
    const int64_t row = context.row, rows = this->rows;
    const T eps = this->label_smoothing, share = this->share;
    const T log_sum = log1p_of(s.rest), lse = s.max + log_sum;
    T nll = log_sum - (context.z - s.max);
    T loss = multiply_or_zero((1 - eps) * context.weight, nll);
    if constexpr (kGeneral) {
      if (this->has_probabilities) {
        nll = multiply_or_zero(s.q_sum, log_sum) - sums.q_dot;
        loss = multiply_or_zero(s.b_sum, log_sum) - sums.dot;
      } else if (eps != 0) {
        const T weight_sum = this->weight ? static_cast<T>(*this->weight_sum) : static_cast<T>(this->layout.classes);
        loss += share * (multiply_or_zero(weight_sum, log_sum) - sums.dot);
      }
    }
    if (this->z_loss != 0) loss += this->z_loss * lse * lse;
    if (context.bad) loss = nll = not_a_number<T>();
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
      this->lse[row] = lse;
      this->nll[row] = nll;
      this->entropy[row] = log_sum - divide(sums.weighted, 1 + s.rest);
      this->prediction[row] = sums.prediction();
    }
  }

  __device__ __forceinline__ Coefficients coefficients(const Context& context, const State& s, bool leader) const {
    const int64_t row = context.row;
    const T eps = this->label_smoothing, share = this->share, scale = kGeneral ? this->logit_scale : T(1);
    const T g_loss = kGeneral ? upstream(this->grad_loss, row) : context.g, g = context.live ? g_loss : T(0);
    const T g_nll = context.live ? upstream(this->grad_nll, row) : T(0);
    const T g_entropy = kGeneral ? upstream(this->grad_entropy, row) : T(0);
    const bool needs_log = this->z_loss != 0 || has_entropy_gradient() || this->has_extra;
    const T log_sum = needs_log ? log1p_of(s.rest) : T(0);
    T all = upstream(this->grad_lse, row), one_hot = 0;
    if (this->z_loss != 0) all += g * 2 * this->z_loss * (s.max + log_sum);
    if (has_entropy_gradient()) all += g_entropy * (log_sum - this->entropy[row]);  // E - max
    if (this->has_probabilities) {
      all += g * s.b_sum + g_nll * s.q_sum;
    } else {
      const T weight_sum =
          this->weight && eps != 0 ? static_cast<T>(*this->weight_sum) : static_cast<T>(this->layout.classes);
      one_hot = g * (1 - eps) * context.weight + g_nll;
      all += g * share * weight_sum;
    }
    Coefficients k{};
    const T uniform = g * share, inverse_sum = divide(T(1), 1 + s.rest);
    k.max = s.max;
    k.alpha = (one_hot + all) * inverse_sum * scale;
    if (context.bad) k.alpha = not_a_number<T>();
    k.uniform = this->weight ? T(0) : uniform * scale;
    k.beta = -g_entropy * inverse_sum * scale;
    k.smooth = this->weight ? uniform * scale : T(0);
    k.kept = g * (1 - eps);
    k.nll = g_nll;
    k.log_sum = log_sum;
    if (leader && context.y >= 0) k.at_target = at_target(context, s, one_hot, all, g_entropy, uniform, inverse_sum);
    return k;
  }

  // p_y - 1: of a maximal class by its complement, which does not cancel; any other p_y is at most 1/2.
  __device__ __forceinline__ T at_target(const Context& context, const State& s, T one_hot, T all, T g_entropy,
                                         T uniform, T inverse_sum) const {
    const T d = context.z - s.max, probability = exp_nonpositive<T>(d) * inverse_sum;
    const T less_one = d == 0 ? -s.rest * inverse_sum : probability - 1;
    T gradient = one_hot * less_one + multiply_or_zero(probability, all - g_entropy * d);
    gradient -= this->weight ? uniform * context.weight : uniform;
    if (!kGeneral) return gradient;
    if (this->softcap != 0) gradient *= slope(context.z);
    return gradient * this->logit_scale;
  }

  __device__ __forceinline__ T slope(T z) const {
    const T t = z * this->inverse_softcap;
    return 1 - t * t;
  }

  __device__ __forceinline__ T value(const Context& context, const Coefficients& k, const Elements<CrossEntropyOp>& x,
                                     int c) const {
    const T z = level(x), d = z - k.max, e = exp_nonpositive<S>(d);
    T gradient = multiply_add(e, k.alpha, -k.uniform);
    if constexpr (kGeneral) {
      if (k.smooth != 0) gradient -= k.smooth * class_weight(c);
      if (this->has_probabilities)
        gradient -= probability(context, c) * multiply_add(k.kept, class_weight(c), k.nll) * this->logit_scale;
      if (has_entropy_gradient()) gradient += multiply_or_zero(e, k.beta * d);
      if (this->softcap != 0) gradient *= slope(z);
    }
    return gradient;
  }

  __device__ __forceinline__ bool apart(const Context& context, const Coefficients& k, int& c, T& value) const {
    c = context.y;
    value = k.at_target;
    return context.y >= 0;
  }

  // dL/dq_c = (kept w_c + nll)(lse - z_c)
  __device__ __forceinline__ void extra(const Context& context, const Coefficients& k,
                                        const Elements<CrossEntropyOp>& x, int c) const {
    const T gradient = multiply_or_zero(multiply_add(k.kept, class_weight(c), k.nll), k.log_sum - (level(x) - k.max));
    store_value(gradient, this->grad_probabilities, this->probabilities_type,
                context.grad_probabilities + c * this->layout.class_stride[kGradProbabilities]);
  }
};

}  // namespace cuda
}  // namespace softmax_ext
