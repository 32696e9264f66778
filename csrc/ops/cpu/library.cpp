// The schemas of the operators, for every device, and their registration for the CPU. All is in torch's stable ABI;
// tensors are given in any shape and strides with the dimension of the classes, one result per row is in the shape of the
// batch (the input's without that dimension).
//
// The functional forms allocate; a name with a trailing underscore writes the gradient over its first argument.
#include "../operators.h"

STABLE_TORCH_LIBRARY(softmax_ext, m) {
  // -> [loss, state, total_weight] + [lse, nll, entropy, prediction] if stats + [grad_input] if precompute_grad.
  //    grad_input is for an upstream gradient of 1; in float16 with the mean, of total_weight.
  //    state [2, *batch] (class indices: max, rest; csrc/cpu/kernels.h) or [4, *batch] (probabilities: also sum b, sum q)
  //    total_weight [] float64, the mean's denominator; [0] without a mean
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int dim, int reduction, int ignore_index, "
      "float label_smoothing, float z_loss, float? softcap, float logit_scale, ScalarType? dtype, bool stats, "
      "bool precompute_grad) -> Tensor[]");
  // The same over the input, without grad_input; the statistics are empty if not asked for. (No list: torch
  // functionalises only operators that return tensors.) Where grad_divisor is given, a float64 scalar, the gradient is
  // divided by that and not by the mean's denominator: for rows that are part of a larger mean.
  m.def(
      "cross_entropy_(Tensor(a!) input, Tensor target, Tensor? weight, int dim, int reduction, int ignore_index, "
      "float label_smoothing, float z_loss, float? softcap, float logit_scale, ScalarType? dtype, bool stats, "
      "Tensor? grad_divisor=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // -> (grad_input, grad_target); one that is not needed is empty. Two tensors rather than a list: autograd's batched
  //    gradients (is_grads_batched) loop over operators that return tensors, and refuse lists.
  m.def(
      "cross_entropy_backward(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_nll, Tensor? grad_entropy, Tensor "
      "input, "
      "Tensor target, Tensor? weight, Tensor state, Tensor total_weight, Tensor? entropy, int dim, int reduction, "
      "int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale, bool needs_input, "
      "bool needs_target) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_backward_(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_nll, Tensor? grad_entropy, "
      "Tensor(a!) input, Tensor target, Tensor? weight, Tensor state, Tensor total_weight, Tensor? entropy, int dim, "
      "int reduction, int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale) -> ()");
  m.def("softmax(Tensor input, int dim, bool log, ScalarType? dtype) -> Tensor");
  m.def("softmax_backward(Tensor grad_output, Tensor output, int dim, bool log, ScalarType dtype) -> Tensor");
  m.def("scale_rows_(Tensor(a!) tensor, Tensor factor, int dim) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(softmax_ext, CPU, m) {
  softmax_ext::add_cross_entropy(m);
  softmax_ext::add_softmax(m);
}
