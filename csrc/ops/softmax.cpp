// The softmax operators on CPU tensors.
#include "../cpu/dispatch.h"
#include "tensors.h"

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
  const int64_t units = joint.units();
  if (units == 0 || k.layout.classes == 0) return;
  const Groups groups(units, k.layout.classes * (k.layout.rows ? 1 : kTile));
  groups.run([&](int64_t, int64_t begin, int64_t end) { run_kernel(k, begin, end); });
}

template <typename T>
void forward(const Tensor& input, const Tensor& output, int64_t dim, bool log) {
  const JointLayout joint(input, dim, {&input, &output});
  run(Softmax<T>{joint.layout(), log, input.const_data_ptr(), dtype_of(input, "softmax", "input"), output.data_ptr(),
                 dtype_of(output, "softmax", "dtype")},
      joint);
}

Tensor softmax(Tensor input, int64_t dim, bool log, std::optional<ScalarType> dtype) {
  const DType input_type = dtype_of(input, "softmax", "input");
  const ScalarType output_type = dtype.value_or(input.scalar_type());
  const DType stored = dtype_of(output_type, "softmax", "dtype");
  dim = wrap_dim(input, dim, "softmax");
  const Tensor output = softmax_ext::empty_like(input, output_type);
  if (arithmetic_type({input_type, stored}) == ScalarType::Double)
    forward<double>(input, output, dim, log);
  else
    forward<float>(input, output, dim, log);
  return output;
}

// Without exponentials a transposition costs more than it saves, except where rows are short.
constexpr int64_t kSmallClassesOfBackward = 40;

template <typename T>
void backward(const Tensor& grad_output, const Tensor& output, const Tensor& grad_input, int64_t dim, bool log) {
  const JointLayout joint(output, dim, {&grad_input, &output, &grad_output}, kSmallClassesOfBackward);
  run(SoftmaxBackward<T>{joint.layout(), log, grad_output.const_data_ptr(), output.const_data_ptr(),
                         dtype_of(output, "softmax_backward", "output"), grad_input.data_ptr(),
                         dtype_of(grad_input, "softmax_backward", "dtype")},
      joint);
}

Tensor softmax_backward(Tensor grad_output, Tensor output, int64_t dim, bool log, ScalarType dtype) {
  const DType output_type = dtype_of(output, "softmax_backward", "output");
  const DType input_type = dtype_of(dtype, "softmax_backward", "dtype");
  check_cpu(grad_output, "softmax_backward", "grad_output");
  check_same_sizes(output, grad_output, "softmax_backward", "grad_output");
  STD_TORCH_CHECK(grad_output.scalar_type() == output.scalar_type(),
                  "softmax_backward: grad_output must have the output's dtype.");
  dim = wrap_dim(output, dim, "softmax_backward");
  const Tensor grad_input = softmax_ext::empty_like(output, dtype);
  if (arithmetic_type({output_type, input_type}) == ScalarType::Double)
    backward<double>(grad_output, output, grad_input, dim, log);
  else
    backward<float>(grad_output, output, grad_input, dim, log);
  return grad_input;
}

// tensor *= factor, one value for all or one for each row of classes; nothing is touched where the one value is 1.
void scale_rows_(Tensor tensor, Tensor factor, int64_t dim) {
  const char* op = "scale_rows_";
  dim = wrap_dim(tensor, dim, op);
  check_cpu(factor, op, "factor");
  const bool per_row = factor.numel() != 1 || sizes_of(factor) == batch_sizes(tensor, dim);
  STD_TORCH_CHECK(!per_row || sizes_of(factor) == batch_sizes(tensor, dim), op,
                  ": factor must be a single value or have one for each row.");
  const Tensor values = as_contiguous(factor);
  const RowValues row_values{values.const_data_ptr(), dtype_of(factor, op, "factor"), per_row ? 1 : 0, 1};
  if (!per_row && value_at(row_values.data, row_values.type, 0) == 1) return;
  const JointLayout joint(tensor, dim, {&tensor});
  run(ScaleRows{joint.layout(), tensor.data_ptr(), dtype_of(tensor, op, "tensor"), row_values}, joint);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softmax_ext, CPU, m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("softmax_traced", TORCH_BOX(&softmax));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows_));
}

}  // namespace softmax_ext
