// The schemas of the operators. All are registered in torch's stable ABI; tensors are given in any shape and strides with
// the dimension of the classes, one result per row is in the shape of the batch (the input's without that dimension).
//
// The functional forms allocate; a name with a trailing underscore writes the gradient over its first argument.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(softmax_ext, m) {
  // -> [loss, state, total_weight] + [lse, nll, entropy, prediction] if stats + [grad_input] if precompute_grad.
  //    state [2, *batch] (class indices: max, log_sum) or [4, *batch] (probabilities: also sum b, sum q)
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int dim, int reduction, int ignore_index, "
      "float label_smoothing, ScalarType? dtype, float z_loss, float? softcap, float logit_scale, bool stats, "
      "bool precompute_grad) -> Tensor[]");
  m.def(
      "cross_entropy_(Tensor(a!) input, Tensor target, Tensor? weight, int dim, int reduction, int ignore_index, "
      "float label_smoothing, ScalarType? dtype, float z_loss, float? softcap, float logit_scale, bool stats) -> "
      "Tensor[]");
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
