// The parameters of a kernel call, the same on every device: plain structs of pointers, types and options. A device adds
// its own, such as the layout. Pointers are to memory of that device.
//
// T is the type of the arithmetic: double if any operand is float64, float otherwise.
#pragma once

#include "dtype.h"
#include "layout.h"

namespace softmax_ext {

enum Reduction { kNone = 0, kMean = 1, kSum = 2 };

// The options of cross entropy, in the order of the operators' schemas.
template <typename Number>
struct OptionsOf {
  int64_t dim;
  int64_t reduction;
  int64_t ignore_index;
  Number label_smoothing;
  Number z_loss;
  Number softcap;  // 0: none
  Number logit_scale;
  bool weighs_by_probability;  // the loss of a row is multiplied by the probability of its target class
  bool skips_ignored;  // the logits of an ignored row do not matter: statistics 0, without gradients; prediction -1
};
using Options = OptionsOf<double>;

// The same with numbers of T.
template <typename T>
OptionsOf<T> rounded_to(const Options& o) {
  return {o.dim,
          o.reduction,
          o.ignore_index,
          static_cast<T>(o.label_smoothing),
          static_cast<T>(o.z_loss),
          static_cast<T>(o.softcap),
          static_cast<T>(o.logit_scale),
          o.weighs_by_probability,
          o.skips_ignored};
}

// One value for each row, or one for all: data[row * stride] / *divisor. The CPU multiplies by 1 / *divisor.
struct RowValues {
  const void* data;  // null: 1 for every row
  DType dtype;
  int64_t stride;         // 0: one value for all
  const double* divisor;  // null: 1
  bool given;             // otherwise the value is 0
};

enum CrossEntropyOperand { kLogits, kGradLogits, kProbabilities, kGradProbabilities };

// Softmax cross entropy of the rows of `logits`, its gradient, or both (docs/math.md has the formulas):
//
//   forward            reads the logits once; writes loss, state and the statistics that are asked for
//   with grad_logits   writes the gradient in the same visit, while the row is near
//   backward           (not forward) reads the logits and the state, writes the gradients
//   of a part          the logits are a part of the classes: forward writes what they add to the row (row_part.h),
//                      perhaps merged with a part before; backward takes the state of the whole row and writes the
//                      gradients of the part
//   of parts           (forward) merges such parts in place of reading logits
//
// The state of a row is (max, rest) with
//
//   sum_c exp(z_c) = exp(max) (1 + rest),   rest: exp(z_c - max), summed over all classes but one of largest logit
//
// log-sum-exp is max + log1p(rest). Were it saved instead, it would be rounded at the magnitude of the maximum. As the
// 1 is no part of the sum, log1p(rest) has its full relative precision when one class has nearly all the probability,
// and so has p - 1 = -rest / (1 + rest) of that class. With probability targets the state has two more: sum b_c and sum
// q_c. With weighs_by_probability it has one more: p of the target class.
template <typename T>
struct CrossEntropyParams {
  const void* logits;
  void* grad_logits;  // null: not wanted. May be `logits` itself.
  DType logits_type;

  // The target: class indices of one of two types, or probabilities (whose pointer may be null if there is no class).
  bool has_probabilities;
  const int64_t* index;       // [rows]
  const uint8_t* index_u8;    // [rows]
  const void* probabilities;  // of the logits' shape
  DType probabilities_type;
  void* grad_probabilities;  // null: not wanted. Of probabilities_type.

  // The logits are of the classes from first_class on, of all_classes. Class indices count from the first of all.
  int64_t first_class, all_classes;
  const T* weight;           // of all classes, its first element that of first_class; null: ones
  const double* weight_sum;  // over all classes; null: their number
  const T* row_weight;       // [rows], a factor of the loss; null: 1, or in forward by probability
  OptionsOf<T> options;
  const double* z_factor;  // of options.z_loss; null: 1

  bool forward;
  int64_t rows;
  void* loss;  // forward: [rows] of loss_type, null where only the sum is wanted
  DType loss_type;
  T* state;             // [2, 3 or 4, rows]; forward writes it unless null, backward reads it
  double* part;         // [fields, rows]; forward writes it and nothing else, unless null
  const double* parts;  // [part_count, fields, rows]; without `part` forward reads no logits, unless null
  int64_t part_count;
  bool stats;           // forward: write the four below
  T* lse;               // [rows]
  T* nll;               // [rows]
  T* entropy;           // [rows]; backward reads it where grad_entropy is given
  int64_t* prediction;  // [rows]

  RowValues grad_loss, grad_lse, grad_nll, grad_entropy;
};

enum SoftmaxOperand { kSoftmaxInput, kSoftmaxOutput, kSoftmaxGrad };

// output = softmax(input) or log_softmax(input) over the classes.
struct SoftmaxParams {
  bool log;
  const void* input;
  DType input_type;
  void* output;
  DType output_type;
};

// grad_input from the upstream gradient and the saved output, all of one shape. In the layout grad_input is
// kSoftmaxInput.
//   softmax: p (g - sum g p)        log_softmax: g - exp(output) sum g
struct SoftmaxBackwardParams {
  bool log;
  const void* grad_output;
  const void* output;
  DType output_type;  // of grad_output too
  void* grad_input;
  DType grad_input_type;
};

// data[row, c] *= factor of the row, for every class c; operand 0 of the layout.
struct ScaleRowsParams {
  void* data;
  DType dtype;
  RowValues factor;
};

}  // namespace softmax_ext
