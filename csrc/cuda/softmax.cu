// Softmax, log-softmax and their backward: as Ops of the row kernels (formulas: docs/math.md; Op: op.cuh), and their launch.
#include "dispatch.cuh"

namespace softmax_ext {
namespace cuda {

template <typename S, typename O>
struct SoftmaxOp : SimpleOp<NoRow> {
  using In = S;
  using Out = O;
  using T = std::conditional_t<sizeof(O) == 8, double, float>;
  using Sums = ExpSum<T>;
  static constexpr int kInputs = 1, kOutputOperand = kSoftmaxOutput;
  static constexpr bool kMaximum = true;
  static constexpr int kKeptChunks = sizeof(T) == 8 ? 0 : 8, kStreamedChunks = sizeof(T) == 8 ? 1 : 4;

  struct Coefficients {
    T max, log_sum, inverse_sum;
  };

  DeviceLayout layout;
  SoftmaxParams params;

  SOFTMAX_EXT_INLINE static int input_operand(int) { return kSoftmaxInput; }
  SOFTMAX_EXT_INLINE const S* input(int) const { return static_cast<const S*>(params.input); }
  SOFTMAX_EXT_INLINE O* output() const { return static_cast<O*>(params.output); }

  template <typename Chunk>
  DEVICE void add(Sums& sums, T max, const NoRow&, const Chunk& held, int, int count) const {
#pragma unroll
    for (int i = 0; i < Chunk::kElements; i++)
      if (i < count) sums.sum += exp_nonpositive(held.at(i).of[0] - max);
  }
  DEVICE Coefficients finish(const NoRow&, const Sums&, const Outcome<T>& outcome, T, bool, Totals&) const {
    const T rest = outcome.rest;
    return {outcome.max, params.log ? log1p(rest) : rest, divide(T(1), 1 + rest)};
  }
  template <typename Chunk, int n>
  DEVICE void compute(const NoRow&, const Coefficients& k, const Chunk& held, int, int, T (&values)[n]) const {
#pragma unroll
    for (int i = 0; i < n; i++) {
      const T d = held.at(i).of[0] - k.max;
      values[i] = params.log ? d - k.log_sum : exp_nonpositive(d) * k.inverse_sum;
    }
  }
};

// Inputs: the saved output and its upstream gradient, of type S; O is the type of the gradient written.
template <typename S, typename O>
struct SoftmaxBackwardOp : SimpleOp<NoRow> {
  using In = S;
  using Out = O;
  using T = std::conditional_t<sizeof(S) == 8, double, float>;
  using Sums = Sum<T>;
  static constexpr int kInputs = 2, kOutputOperand = kSoftmaxInput;
  static constexpr bool kMaximum = false;
  static constexpr int kKeptChunks = sizeof(T) == 8 ? 0 : 4, kStreamedChunks = sizeof(T) == 8 ? 1 : 2;
  static constexpr int64_t kMostInThread = kSmallClasses / 2;

  struct Coefficients {
    T total;
  };

  DeviceLayout layout;
  SoftmaxBackwardParams params;

  SOFTMAX_EXT_INLINE static int input_operand(int j) { return j == 0 ? kSoftmaxOutput : kSoftmaxGrad; }
  SOFTMAX_EXT_INLINE const S* input(int j) const {
    return static_cast<const S*>(j == 0 ? params.output : params.grad_output);
  }
  SOFTMAX_EXT_INLINE O* output() const { return static_cast<O*>(params.grad_input); }

  template <typename Chunk>
  DEVICE void add(Sums& sums, T, const NoRow&, const Chunk& held, int, int count) const {
#pragma unroll
    for (int i = 0; i < Chunk::kElements; i++)
      if (i < count) sums.value += params.log ? held.at(i).of[1] : held.at(i).of[1] * held.at(i).of[0];
  }
  DEVICE Coefficients finish(const NoRow&, const Sums& sums, const Outcome<T>&, T, bool, Totals&) const {
    return {sums.value};
  }
  template <typename Chunk, int n>
  DEVICE void compute(const NoRow&, const Coefficients& k, const Chunk& held, int, int, T (&values)[n]) const {
#pragma unroll
    for (int i = 0; i < n; i++) {
      const auto x = held.at(i);
      values[i] = params.log ? x.of[1] - exp_nonpositive(x.of[0]) * k.total : x.of[0] * (x.of[1] - k.total);
    }
  }
};

template <typename S, typename O>
void launch_forward(const SoftmaxParams& params, const Layout& layout, Stream stream) {
  SoftmaxOp<S, O> op{};
  op.layout = device_layout(layout);
  op.params = params;
  launch_op("softmax", op, layout, true, nullptr, stream);
}

template <typename S, typename O>
void launch_backward(const SoftmaxBackwardParams& params, const Layout& layout, Stream stream) {
  SoftmaxBackwardOp<S, O> op{};
  op.layout = device_layout(layout);
  op.params = params;
  launch_op("softmax_backward", op, layout, true, nullptr, stream);
}

template <typename S>
void launch_forward_from(const SoftmaxParams& params, const Layout& layout, Stream stream) {
  if constexpr (sizeof(S) == 2)
    if (params.output_type == DType::kFloat32) return launch_forward<S, float>(params, layout, stream);
  launch_forward<S, S>(params, layout, stream);
}

template <typename O>
void launch_backward_to(const SoftmaxBackwardParams& params, const Layout& layout, Stream stream) {
  if constexpr (sizeof(O) == 2)
    if (params.output_type == DType::kFloat32) return launch_backward<float, O>(params, layout, stream);
  launch_backward<O, O>(params, layout, stream);
}

void softmax(const SoftmaxParams& params, const Layout& layout, Stream stream) {
  visit_dtype<Halves>(params.input_type, [&](auto element) {
    launch_forward_from<typename decltype(element)::Type>(params, layout, stream);
  });
}

void softmax_backward(const SoftmaxBackwardParams& params, const Layout& layout, Stream stream) {
  visit_dtype<Halves>(params.grad_input_type, [&](auto element) {
    launch_backward_to<typename decltype(element)::Type>(params, layout, stream);
  });
}

}  // namespace cuda
}  // namespace softmax_ext
