// The softmax operators on CPU tensors.
#include "../../cpu/dispatch.h"
#include "../kernel_calls.h"
#include "parallel.h"
#include "streams.h"
#include "values.h"

namespace softmax_ext {
namespace {

void run_kernel(const Softmax<float>& k, int64_t begin, int64_t end) { kernels().softmax_float(k, begin, end); }
void run_kernel(const Softmax<double>& k, int64_t begin, int64_t end) { kernels().softmax_double(k, begin, end); }
void run_kernel(const SoftmaxBackward<float>& k, int64_t begin, int64_t end) {
  kernels().softmax_backward_float(k, begin, end);
}
void run_kernel(const SoftmaxBackward<double>& k, int64_t begin, int64_t end) {
  kernels().softmax_backward_double(k, begin, end);
}
void run_kernel(const ScaleRows& k, int64_t begin, int64_t end) { kernels().scale_rows(k, begin, end); }

template <typename K>
void run(const K& k, const JointLayout& joint) {
  if (joint.empty()) return;
  Groups(k.layout).run([&](int64_t, int64_t begin, int64_t end) { run_kernel(k, begin, end); });
}

// Without exponentials a transposition costs more than it saves, except where rows are short.
constexpr LayoutRule kBackwardLayoutRule{40, kLayoutRule.max_outer_dims};

bool is_double(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == ScalarType::Double || b.scalar_type() == ScalarType::Double;
}

}  // namespace

void device::softmax(const Tensor& input, const Tensor& output, int64_t dim, bool log) {
  const JointLayout joint(input, dim, {&input, &output}, kLayoutRule);
  const auto run_as = [&](auto k) {
    k.streams = streams(output, input);
    run(k, joint);
  };
  if (is_double(input, output))
    run_as(softmax_call<Softmax<double>>(input, output, log, joint.layout()));
  else
    run_as(softmax_call<Softmax<float>>(input, output, log, joint.layout()));
}

void device::softmax_backward(const Tensor& grad_output, const Tensor& output, const Tensor& grad_input, int64_t dim,
                              bool log) {
  const JointLayout joint(output, dim, {&grad_input, &output, &grad_output}, kBackwardLayoutRule);
  const auto run_as = [&](auto k) {
    k.streams = streams(grad_input, output);
    run(k, joint);
  };
  if (is_double(output, grad_input))
    run_as(softmax_backward_call<SoftmaxBackward<double>>(grad_output, output, grad_input, log, joint.layout()));
  else
    run_as(softmax_backward_call<SoftmaxBackward<float>>(grad_output, output, grad_input, log, joint.layout()));
}

void device::scale_rows(const Tensor& tensor, int64_t dim, const Factor& factor) {
  if (factor.stride == 0 && value_at(factor.data(), factor.type, 0) == 1) return;
  const JointLayout joint(tensor, dim, {&tensor}, kLayoutRule);
  run(scale_rows_call<ScaleRows>(tensor, row_values(factor), joint.layout()), joint);
}

}  // namespace softmax_ext
