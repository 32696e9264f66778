// The softmax operators on CPU tensors.
#include "../../cpu/dispatch.h"
#include "../kernel_params.h"
#include "non_temporal.h"
#include "parallel.h"
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
  const SoftmaxParams params = softmax_params(input, output, log);
  const Placement placement{joint.layout(), is_non_temporal(output, input)};
  if (is_double(input, output))
    run(Softmax<double>{params, placement}, joint);
  else
    run(Softmax<float>{params, placement}, joint);
}

void device::softmax_backward(const Tensor& grad_output, const Tensor& output, const Tensor& grad_input, int64_t dim,
                              bool log) {
  const JointLayout joint(output, dim, {&grad_input, &output, &grad_output}, kBackwardLayoutRule);
  const SoftmaxBackwardParams params = softmax_backward_params(grad_output, output, grad_input, log);
  const Placement placement{joint.layout(), is_non_temporal(grad_input, output)};
  if (is_double(output, grad_input))
    run(SoftmaxBackward<double>{params, placement}, joint);
  else
    run(SoftmaxBackward<float>{params, placement}, joint);
}

void device::scale_rows(const Tensor& tensor, int64_t dim, const RowValues& factor) {
  if (factor.stride == 0 && value_at(factor.data, factor.dtype, 0) == 1) return;
  const JointLayout joint(tensor, dim, {&tensor}, kLayoutRule);
  if (joint.empty()) return;
  const ScaleRows k{scale_rows_params(tensor, factor), {joint.layout()}};
  Groups(k.layout).run(0, [&](int64_t, int64_t begin, int64_t end, void*) { kernels().scale_rows(k, begin, end); });
}

}  // namespace softmax_ext
