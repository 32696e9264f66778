// The softmax operators on CPU tensors.
#include "../../cpu/dispatch.h"
#include "../kernel_calls.h"
#include "parallel.h"
#include "streams.h"
#include "values.h"

namespace softmax_ext {
namespace {

template <typename K>
void run(const K& k, const JointLayout& joint) {
  if (joint.empty()) return;
  const auto& kernel = kernels().of(k);
  Groups(k.layout).run(kernel.scratch_bytes(k),
                       [&](int64_t, int64_t begin, int64_t end, void* scratch) { kernel.run(k, begin, end, scratch); });
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
  if (joint.empty()) return;
  const auto k = scale_rows_call<ScaleRows>(tensor, row_values(factor), joint.layout());
  Groups(k.layout).run(0, [&](int64_t, int64_t begin, int64_t end, void*) { kernels().scale_rows(k, begin, end); });
}

}  // namespace softmax_ext
