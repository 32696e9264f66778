// From checked arguments to the structs that the kernels take. Those of the CPU and of CUDA (csrc/*/kernels.h) have the
// same names for the same things, so that they are filled here, once; what a device has of its own it adds itself.
#pragma once

#include "operators.h"

namespace softmax_ext {

// Numbers and pointers are of T in the CPU's structs, double and void in CUDA's.
template <typename To, typename From>
void set(To& to, From from) {
  to = static_cast<To>(from);
}

template <typename K>
K cross_entropy_call(const Call& call, const Layout& layout) {
  K k{};
  k.layout = layout;
  k.rows = call.rows;
  k.logits = call.input.const_data_ptr();
  k.logits_type = call.input_type;
  const void* target = call.target.const_data_ptr();
  k.has_probabilities = call.probabilities;
  if (call.probabilities)
    k.probabilities = target;
  else if (call.byte_target)
    k.index_u8 = static_cast<const uint8_t*>(target);
  else
    k.index = static_cast<const int64_t*>(target);
  k.probabilities_type = call.target_type;
  k.ignore_index = call.ignore_index;
  set(k.label_smoothing, call.label_smoothing);
  set(k.z_loss, call.z_loss);
  set(k.softcap, call.softcap);
  set(k.logit_scale, call.logit_scale);
  return k;
}

// Without loss and grad_loss.
template <typename K>
K forward_call(const Call& call, const Forward& out, const Layout& layout) {
  K k = cross_entropy_call<K>(call, layout);
  k.forward = true;
  if (out.keeps_state) set(k.state, out.state.data_ptr());
  k.stats = !out.stats.empty();
  if (k.stats) {
    set(k.lse, out.stats[0].data_ptr());
    set(k.nll, out.stats[1].data_ptr());
    set(k.entropy, out.stats[2].data_ptr());
    set(k.prediction, out.stats[3].data_ptr());
  }
  if (out.grad) k.grad_logits = out.grad->data_ptr();
  return k;
}

// Without the upstream gradients.
template <typename K>
K backward_call(const Call& call, const Backward& operands, const Layout& layout) {
  K k = cross_entropy_call<K>(call, layout);
  set(k.state, operands.state.data_ptr());
  if (operands.entropy_values) set(k.entropy, operands.entropy_values->data_ptr());
  if (operands.grad_input) k.grad_logits = operands.grad_input->data_ptr();
  if (operands.grad_target) k.grad_probabilities = operands.grad_target->data_ptr();
  return k;
}

// The layout of a cross entropy's operands.
inline JointLayout cross_entropy_layout(const Call& call, const std::optional<Tensor>& grad_input,
                                        const std::optional<Tensor>& grad_target, const LayoutRule& rule) {
  const auto operand = [](const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; };
  const Tensor* probabilities = call.probabilities ? &call.target : nullptr;
  return JointLayout(call.input, call.dim, {&call.input, operand(grad_input), probabilities, operand(grad_target)},
                     rule);
}

template <typename K>
K softmax_call(const Tensor& input, const Tensor& output, bool log, const Layout& layout) {
  return {layout,
          log,
          input.const_data_ptr(),
          dtype_of(input, "softmax", "input"),
          output.data_ptr(),
          dtype_of(output, "softmax", "dtype")};
}

template <typename K>
K softmax_backward_call(const Tensor& grad_output, const Tensor& output, const Tensor& grad_input, bool log,
                        const Layout& layout) {
  return {layout,
          log,
          grad_output.const_data_ptr(),
          output.const_data_ptr(),
          dtype_of(output, "softmax_backward", "output"),
          grad_input.data_ptr(),
          dtype_of(grad_input, "softmax_backward", "dtype")};
}

template <typename K, typename RowFactor>
K scale_rows_call(const Tensor& tensor, const RowFactor& factor, const Layout& layout) {
  return {layout, tensor.data_ptr(), dtype_of(tensor, "scale_rows_", "tensor"), factor};
}

}  // namespace softmax_ext
