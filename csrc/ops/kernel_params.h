// From checked arguments to what the kernels are told (params.h), the same for every device.
#pragma once

#include "operators.h"

namespace softmax_ext {

template <typename T>
T* values_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Of a tensor that is read only: torch need not give it memory of its own.
template <typename T>
const T* const_values_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Without the weights, and what forward and backward have of their own.
template <typename T>
CrossEntropyParams<T> cross_entropy_params(const Call& call) {
  CrossEntropyParams<T> p{};
  p.rows = call.rows;
  p.logits = call.input.const_data_ptr();
  p.logits_type = call.input_type;
  const void* target = call.target.const_data_ptr();
  p.has_probabilities = call.probabilities;
  if (call.probabilities)
    p.probabilities = target;
  else if (call.byte_target)
    p.index_u8 = static_cast<const uint8_t*>(target);
  else
    p.index = static_cast<const int64_t*>(target);
  p.probabilities_type = call.target_type;
  p.options = rounded_to<T>(call.options);
  p.first_class = call.first_class;
  p.all_classes = call.all_classes;
  if (call.row_weight) p.row_weight = const_values_of<T>(*call.row_weight);
  return p;
}

// Without loss and grad_loss.
template <typename T>
CrossEntropyParams<T> forward_params(const Call& call, const Forward& out) {
  CrossEntropyParams<T> p = cross_entropy_params<T>(call);
  p.forward = true;
  if (out.saves_state) p.state = values_of<T>(out.state);
  p.z_factor = z_factor_in(out.total_weight);
  p.stats = !out.stats.empty();
  if (p.stats) {
    p.lse = values_of<T>(out.stats[0]);
    p.nll = values_of<T>(out.stats[1]);
    p.entropy = values_of<T>(out.stats[2]);
    p.prediction = values_of<int64_t>(out.stats[3]);
  }
  if (out.grad) p.grad_logits = out.grad->data_ptr();
  return p;
}

// What is written of a part of the classes, without statistics or with them, merged with the part before if there is one.
template <typename T>
CrossEntropyParams<T> part_params(const Call& call, const std::optional<Tensor>& before, bool stats,
                                  const Tensor& part) {
  CrossEntropyParams<T> p = cross_entropy_params<T>(call);
  p.forward = true;
  p.stats = stats;
  p.part = values_of<double>(part);
  if (before) p.parts = const_values_of<double>(*before);
  return p;
}

// Of a call that cross_entropy_of_parts describes.
template <typename T>
CrossEntropyParams<T> parts_params(const Call& call, const Forward& out) {
  CrossEntropyParams<T> p = forward_params<T>(call, out);
  p.logits = nullptr;
  p.parts = const_values_of<double>(call.input);
  p.part_count = call.input.size(0);
  return p;
}

template <typename T>
CrossEntropyParams<T> backward_params(const Call& call, const Backward& operands) {
  CrossEntropyParams<T> p = cross_entropy_params<T>(call);
  p.z_factor = z_factor_in(operands.total_weight);
  p.state = values_of<T>(operands.state);
  if (call.options.weighs_by_probability) p.row_weight = p.state + 2 * p.rows;
  if (operands.entropy_values) p.entropy = values_of<T>(*operands.entropy_values);
  if (operands.grad_input) p.grad_logits = operands.grad_input->data_ptr();
  if (operands.grad_target) p.grad_probabilities = operands.grad_target->data_ptr();
  p.grad_loss = operands.grad_loss;
  if (call.options.reduction == kMean) p.grad_loss.divisor = const_values_of<double>(operands.total_weight);
  p.grad_lse = operands.grad_lse;
  p.grad_nll = operands.grad_nll;
  p.grad_entropy = operands.grad_entropy;
  return p;
}

// The layout of a cross entropy's operands.
inline JointLayout cross_entropy_layout(const Call& call, const std::optional<Tensor>& grad_input,
                                        const std::optional<Tensor>& grad_target, const LayoutRule& rule) {
  const auto operand = [](const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; };
  const Tensor* probabilities = call.probabilities ? &call.target : nullptr;
  return JointLayout(call.input, call.options.dim,
                     {&call.input, operand(grad_input), probabilities, operand(grad_target)}, rule);
}

inline SoftmaxParams softmax_params(const Tensor& input, const Tensor& output, bool log) {
  return {log, input.const_data_ptr(), dtype_of(input, "softmax", "input"), output.data_ptr(),
          dtype_of(output, "softmax", "dtype")};
}

inline SoftmaxBackwardParams softmax_backward_params(const Tensor& grad_output, const Tensor& output,
                                                     const Tensor& grad_input, bool log) {
  return {log,
          grad_output.const_data_ptr(),
          output.const_data_ptr(),
          dtype_of(output, "softmax_backward", "output"),
          grad_input.data_ptr(),
          dtype_of(grad_input, "softmax_backward", "dtype")};
}

inline ScaleRowsParams scale_rows_params(const Tensor& tensor, const RowValues& factor) {
  return {tensor.data_ptr(), dtype_of(tensor, "scale_rows_", "tensor"), factor};
}

}  // namespace softmax_ext
