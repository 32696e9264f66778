// What the kernels are given and the table through which they are called: plain structs of pointers, strides and
// options. One table per instruction set; dispatch.h chooses. No tensors, no threads, no allocations: the caller splits
// the units of work [0, units) and calls a kernel with a range of them and memory to work in.
//
// T is the type of the arithmetic: double if any operand is float64, float otherwise.
#pragma once

#include <cstddef>

#include "../layout.h"

namespace softmax_ext {

// One value per row, of any floating type: an upstream gradient, say. Value = scale * data[row * stride].
struct RowValues {
  const void* data;  // null: all zero
  DType type;
  int64_t stride;  // 0: one value for all rows
  double scale;
};

// Readable values behind the last class of `weight`, so that whole vectors can be loaded.
constexpr int64_t kWeightPadding = 64;

enum CrossEntropyOperand { kLogits, kGradLogits, kProbabilities, kGradProbabilities };

// Softmax cross entropy of the rows of `logits`, its gradient, or both (docs/math.md has the formulas):
//
//   forward    reads the logits once; writes loss, state and the statistics that are asked for; with grad_logits
//              the row is visited again while it is in cache, and its gradient written
//   backward   reads the logits and the state, writes the gradients
//
// The state of a row is (max, rest) with sum_c exp(z_c) = exp(max) (1 + rest): log-sum-exp is max + log1p(rest), which
// would round at the magnitude of the maximum. With probabilities two more: sum of b, sum of q.
template <typename T>
struct CrossEntropy {
  Layout layout;

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

  bool streams;  // the gradients are stored past the caches

  const T* weight;  // [classes], null: ones
  T weight_sum;     // sum of weight, `classes` without
  int64_t ignore_index;
  T label_smoothing;
  T z_loss;
  T softcap;  // 0: none
  T logit_scale;

  bool forward;
  void* loss;  // forward: [rows] of loss_type, null where only the sum is wanted
  DType loss_type;
  T* state;  // [2 or 4, rows]; forward writes it unless null, backward reads it
  int64_t rows;
  bool stats;           // forward: write the four below
  T* lse;               // [rows]
  T* nll;               // [rows]
  T* entropy;           // [rows]; backward reads it where grad_entropy is given
  int64_t* prediction;  // [rows]

  RowValues grad_loss, grad_lse, grad_nll, grad_entropy;
};

enum SoftmaxOperand { kSoftmaxInput, kSoftmaxOutput, kSoftmaxGrad };

// output = softmax(input) or log_softmax(input) over the classes.
template <typename T>
struct Softmax {
  Layout layout;
  bool log;
  const void* input;
  DType input_type;
  void* output;
  DType output_type;
  bool streams = false;  // the output is stored past the caches
};

// grad_input from the upstream gradient and the saved output, all of the input's shape.
//   softmax: p (g - sum g p)        log_softmax: g - exp(output) sum g
template <typename T>
struct SoftmaxBackward {
  Layout layout;  // operands: kSoftmaxInput is grad_input
  bool log;
  const void* grad_output;
  const void* output;
  DType output_type;  // of grad_output too
  void* grad_input;
  DType grad_input_type;
  bool streams = false;  // the gradient is stored past the caches
};

// data[row, c] *= factor[row], for every class c; operand 0 of the layout.
struct ScaleRows {
  Layout layout;
  void* data;
  DType type;
  RowValues factor;
};

// A look at class indices: how many are not ignored, and whether one of those is not in [0, classes).
struct ClassScan {
  int64_t live;
  bool out_of_range;
};

// scratch: of scratch_bytes, which are the same for every range, aligned as scratch.h says; of no other call at that time.
template <typename Params, typename Result>
struct Kernel {
  size_t (*scratch_bytes)(const Params&);
  Result (*run)(const Params&, int64_t begin, int64_t end, void* scratch);
};

struct KernelTable {
  const char* isa;
  // Forward: the sum of the losses of the range, in a fixed order. Backward: 0.
  Kernel<CrossEntropy<float>, double> cross_entropy_float;
  Kernel<CrossEntropy<double>, double> cross_entropy_double;
  Kernel<Softmax<float>, void> softmax_float;
  Kernel<Softmax<double>, void> softmax_double;
  Kernel<SoftmaxBackward<float>, void> softmax_backward_float;
  Kernel<SoftmaxBackward<double>, void> softmax_backward_double;
  ClassScan (*scan_classes)(const int64_t* index, int64_t n, int64_t classes, int64_t ignore_index);
  ClassScan (*scan_classes_u8)(const uint8_t* index, int64_t n, int64_t classes, int64_t ignore_index);
  void (*scale_rows)(const ScaleRows&, int64_t begin, int64_t end);
  // y[i] = exp(x[i]) with the kernels' own exponential, for the test of its error.
  void (*exp_float)(const float* x, float* y, int64_t n);

  const auto& of(const CrossEntropy<float>&) const { return cross_entropy_float; }
  const auto& of(const CrossEntropy<double>&) const { return cross_entropy_double; }
  const auto& of(const Softmax<float>&) const { return softmax_float; }
  const auto& of(const Softmax<double>&) const { return softmax_double; }
  const auto& of(const SoftmaxBackward<float>&) const { return softmax_backward_float; }
  const auto& of(const SoftmaxBackward<double>&) const { return softmax_backward_double; }
};

}  // namespace softmax_ext
