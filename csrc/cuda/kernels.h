// What the CUDA kernels are given and the functions that launch them: plain structs of device pointers, strides and
// options, and a stream. No tensors, no allocation; nothing here waits for the device, so that all of it can be captured
// in a CUDA graph. A launch that fails throws std::runtime_error with the name of the kernel and its grid.
//
// All pointers are to device memory of the current device. T is the type of the arithmetic: double if any operand is
// float64 (`is_double`), float otherwise.
#pragma once

#include <string>

#include "../layout.h"

struct CUstream_st;

namespace softmax_ext {
namespace cuda {

using Stream = CUstream_st*;

// The most dimensions of a layout's `dims`: more, of two or more rows each, would be 2^32 rows.
constexpr int kMaxOuterDims = 32;

// Rows of at most this many classes are put into the columns layout, whatever their strides: a thread takes a row.
constexpr int64_t kSmallClasses = 64;

// An upstream gradient, one value for each row or one for all: data[row * stride] / *divisor.
struct Upstream {
  bool given;        // otherwise zero
  const void* data;  // null: 1
  DType type;
  int64_t stride;
  const double* divisor;  // null: 1
};

enum CrossEntropyOperand { kLogits, kGradLogits, kProbabilities, kGradProbabilities };

// Softmax cross entropy of the rows of `logits`, its gradient, or both (docs/math.md has the formulas):
//
//   forward            reads the logits; writes loss, state and the statistics that are asked for
//   with grad_logits   writes the gradient in the same visit, from the row kept on the chip where it fits
//   backward           (not forward) reads the logits and the state, writes the gradients
//
// The state of a row is (max, rest) with sum_c exp(z_c) = exp(max) (1 + rest); with probabilities two more: sum of b,
// sum of q. A class index out of range that is not ignore_index makes the loss and the gradient of its row NaN.
struct CrossEntropy {
  Layout layout;
  bool is_double;

  const void* logits;
  void* grad_logits;  // null: not wanted. May be `logits` itself.
  DType logits_type;

  // The target: class indices of one of two types, or probabilities.
  bool has_probabilities;
  const int64_t* index;       // [rows]
  const uint8_t* index_u8;    // [rows]
  const void* probabilities;  // of the logits' shape
  DType probabilities_type;
  void* grad_probabilities;  // null: not wanted. Of probabilities_type.

  const void* weight;        // [classes] of T, null: ones
  const double* weight_sum;  // sum of weight; null without
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;  // 0: none
  double logit_scale;

  bool forward;
  int64_t rows;
  void* loss;  // forward: [rows] of loss_type, which is T where they are to be summed
  DType loss_type;
  void* state;          // [2 or 4, rows] of T; forward writes it unless null, backward reads it
  bool stats;           // forward: write the four below
  void* lse;            // [rows] of T
  void* nll;            // [rows] of T
  void* entropy;        // [rows] of T; backward reads it where grad_entropy is given
  int64_t* prediction;  // [rows]

  Upstream grad_loss, grad_lse, grad_nll, grad_entropy;
};

enum SoftmaxOperand { kSoftmaxInput, kSoftmaxOutput, kSoftmaxGrad };

// output = softmax(input) or log_softmax(input) over the classes. The types are the same, or the input's is a half type
// and the output's float32.
struct Softmax {
  Layout layout;
  bool log;
  const void* input;
  DType input_type;
  void* output;
  DType output_type;
};

// grad_input from the upstream gradient and the saved output, all of the input's shape; types as above.
//   softmax: p (g - sum g p)        log_softmax: g - exp(output) sum g
struct SoftmaxBackward {
  Layout layout;  // operands: kSoftmaxInput is grad_input
  bool log;
  const void* grad_output;
  const void* output;
  DType output_type;  // of grad_output too
  void* grad_input;
  DType grad_input_type;
};

// data[row, c] *= factor of the row, for every class c; operand 0 of the layout. Nothing is touched where the factor is 1.
struct ScaleRows {
  Layout layout;
  void* data;
  DType type;
  Upstream factor;
};

void cross_entropy(const CrossEntropy& call, Stream stream);
void softmax(const Softmax& call, Stream stream);
void softmax_backward(const SoftmaxBackward& call, Stream stream);
void scale_rows(const ScaleRows& call, Stream stream);

// ---- sums, in double and in an order that depends on the sizes alone -------------------------------------------------

// Doubles of device memory that the sums below need for their partial results, two for each share of a long sum.
constexpr int64_t kMostShares = 1024;
constexpr int64_t kSumScratch = 2 * kMostShares;

// *sum = the sum of n weights of T.
void sum_weights(const void* weight, bool is_double, int64_t n, double* sum, double* scratch, Stream stream);

// *sum = the sum of weight[target] (1 each without weights) over the rows that are not ignored, the mean's denominator.
// With probabilities, the number of rows.
void sum_targets(const CrossEntropy& call, int64_t classes, double* sum, double* scratch, Stream stream);

// What becomes of the losses of a call.
struct LossSum {
  void* loss;  // of loss_type
  DType loss_type;
  bool mean;             // otherwise the sum
  double* denominator;   // of the mean
  bool has_denominator;  // it is there; otherwise it is taken in the same pass, as by sum_targets, and written
};

// *to.loss = the sum or the mean of the call's losses.
void sum_losses(const CrossEntropy& call, int64_t classes, const LossSum& to, double* scratch, Stream stream);

// *first = the first row whose class is neither in [0, classes) nor ignore_index, or `rows`.
void find_bad_class(const CrossEntropy& call, int64_t classes, int64_t* first, Stream stream);

// ---- what was chosen, for reports and tests --------------------------------------------------------------------------

// The kernel that cross_entropy would launch for rows of unit class stride on the current device: "tile", "warp",
// "block", "cluster of 4" or "stream".
std::string kernel_for(int64_t classes, DType type, bool has_probabilities);

// The architectures compiled into the library, as nvcc names them: "75;80;86".
const char* compiled_architectures();

}  // namespace cuda
}  // namespace softmax_ext
