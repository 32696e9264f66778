// The schemas of the operators, for every device. Tensors are given in any shape and strides with the dimension of the
// classes; one result per row has the shape of the batch, which is the input's without that dimension.
//
// The functional forms allocate. A name with a trailing underscore writes the gradient over its first argument.
#include "operators.h"

namespace softmax_ext {

// In the order of OptionsOf (params.h), as boxed.h reads them.
#define OPTIONS                                                                                                        \
  "int dim, int reduction, int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale, " \
  "bool weighs_by_probability, bool skips_ignored"
#define UPSTREAM "Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_nll, Tensor? grad_entropy"
#define SAVED "Tensor state, Tensor total_weight, Tensor? entropy"

void define_operators(torch::stable::detail::StableLibrary& library) {
  // -> [loss, state, total_weight] + [lse, nll, entropy, prediction] if stats + [grad_input] if precompute_grad.
  //    grad_input is for an upstream gradient of 1; in float16 with the mean, of total_weight.
  //    state is [2, *batch] with class indices, [3, *batch] with weighs_by_probability, [4, *batch] with probabilities
  //    (params.h).
  //    total_weight is float64: [], the mean's denominator; [2], that and a factor of z_loss; [0] without a mean. There
  //    is a factor where class weights are in the denominator and z_loss is not 0: the z terms are then divided by the
  //    sum over the rows without class weights, and so the factor is the one sum over the other.
  //    `denominator`, of the same form, takes the place of total_weight: for rows that are part of a larger mean. With
  //    the reduction "none" the losses are not divided, so that their sum is rounded once; grad_input is. A factor of
  //    z_loss counts with every reduction, here and in backward's total_weight.
  //    `row_weight`, [*batch], is a factor of each row's loss, and of what the row adds to the mean's denominator.
  library.def("cross_entropy(Tensor input, Tensor target, Tensor? weight, " OPTIONS
              ", ScalarType? dtype, bool stats, bool precompute_grad, Tensor? denominator=None, Tensor? "
              "row_weight=None) -> Tensor[]");
  // The same over the input, without grad_input; the statistics are empty if not asked for. (No list: torch
  // functionalises only operators that return tensors.)
  library.def("cross_entropy_(Tensor(a!) input, Tensor target, Tensor? weight, " OPTIONS
              ", ScalarType? dtype, bool stats, Tensor? denominator=None, Tensor? row_weight=None) "
              "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // -> (grad_input, grad_target); one that is not needed is empty. Two tensors rather than a list: autograd's batched
  //    gradients (is_grads_batched) loop over operators that return tensors, and refuse lists.
  //    The input may be a part of the classes, those from first_class on of all_classes. The state is of the whole row
  //    and class indices count from its first class; weight is of all classes, and a target of probabilities of the part.
  library.def("cross_entropy_backward(" UPSTREAM ", Tensor input, Tensor target, Tensor? weight, " SAVED ", " OPTIONS
              ", bool needs_input, bool needs_target, int first_class=0, int? all_classes=None, Tensor? "
              "row_weight=None) -> (Tensor, Tensor)");
  library.def("cross_entropy_backward_(" UPSTREAM ", Tensor(a!) input, Tensor target, Tensor? weight, " SAVED
              ", " OPTIONS ", int first_class=0, int? all_classes=None, Tensor? row_weight=None) -> ()");
  // What such a part adds to its rows, [fields, *batch] float64 (row_part.h). The arithmetic is cross_entropy's with this
  // dtype. The reduction has no effect. `before` is what the classes before first_class add: the result has both.
  library.def("cross_entropy_part(Tensor input, Tensor target, Tensor? weight, " OPTIONS
              ", ScalarType? dtype, bool stats, int first_class, int all_classes, Tensor? before=None) -> Tensor");
  // The results of cross_entropy from parts [parts, fields, *batch], in the order of the classes, that were made with the
  // same options. `wide`: the arithmetic is float64. With probabilities there is no target.
  library.def("cross_entropy_of_parts(Tensor parts, Tensor? target, Tensor? weight, " OPTIONS
              ", ScalarType dtype, bool wide, bool stats, Tensor? denominator, int all_classes, Tensor? "
              "row_weight=None) -> Tensor[]");
  library.def("softmax(Tensor input, int dim, bool log, ScalarType? dtype) -> Tensor");
  library.def("softmax_backward(Tensor grad_output, Tensor output, int dim, bool log, ScalarType dtype) -> Tensor");
  library.def("scale_rows_(Tensor(a!) tensor, Tensor factor, int dim) -> ()");
}

}  // namespace softmax_ext
