// The functions that launch the CUDA kernels, each of parameters (params.h), a layout and a stream. No tensors, no
// allocation. Nothing here waits for the device, so that all of it can be captured in a CUDA graph. A launch that fails
// throws std::runtime_error with the name of the kernel and its grid.
//
// All pointers are to device memory of the current device. What is a template is there for T = float and double.
#pragma once

#include <string>

#include "../params.h"

struct CUstream_st;

namespace softmax_ext {
namespace cuda {

using Stream = CUstream_st*;

// The most dimensions of a layout's `dims`: more, of two or more rows each, would be 2^32 rows.
constexpr int kMaxOuterDims = 32;

// Rows of at most this many classes are put into the columns layout, whatever their strides: a thread takes a row.
constexpr int64_t kSmallClasses = 64;

// What becomes of the losses of all rows: their sum or mean, in double and in an order that depends on the sizes alone.
struct LossSum {
  void* loss;  // of loss_type
  DType loss_type;
  bool mean;             // otherwise the sum
  double* denominator;   // of the mean
  bool has_denominator;  // it is there; otherwise it is summed with the losses, as by sum_targets, and written
  void* scratch;         // of loss_scratch_bytes()
};
// Of the call with these parameters.
template <typename T>
int64_t loss_scratch_bytes(const CrossEntropyParams<T>& params, const Layout& layout);

// A class index out of range that is not ignore_index makes the loss and the gradient of its row NaN. `sum`, in forward:
// null where losses of single rows are wanted.
template <typename T>
void cross_entropy(const CrossEntropyParams<T>& params, const Layout& layout, const LossSum* sum, Stream stream);

// The same from parts of the classes (row_part.h). The layout has the rows, adjacent and without classes.
template <typename T>
void cross_entropy_of_parts(const CrossEntropyParams<T>& params, const Layout& layout, const LossSum* sum,
                            Stream stream);

// The input's and the output's types are the same, or the input's is a half type and the output's float32.
void softmax(const SoftmaxParams& params, const Layout& layout, Stream stream);

// The types of grad_input and output as those above.
void softmax_backward(const SoftmaxBackwardParams& params, const Layout& layout, Stream stream);

// Nothing is touched where the factor is 1. It has no divisor.
void scale_rows(const ScaleRowsParams& params, const Layout& layout, Stream stream);

// ---- sums, in double and in an order that depends on the sizes alone ------------------------------------------------

// Doubles of device memory that the sums below need for their partial results.
constexpr int64_t kMostShares = 1024;
constexpr int64_t kSumScratch = kMostShares;

// *sum = the sum of n weights.
template <typename T>
void sum_weights(const T* weight, int64_t n, double* sum, double* scratch, Stream stream);

// *sum = the sum of weight[target] (1 each without weights), times the row's own weight, over the rows that are not
// ignored: the mean's denominator. With probabilities, the number of rows, or the sum of their weights.
template <typename T>
void sum_targets(const CrossEntropyParams<T>& params, int64_t classes, double* sum, double* scratch, Stream stream);

// total[1] = z_factor_of(total[0], total[1]): of the weights' sum and the rows'.
void set_z_factor(double* total, Stream stream);

// *to.loss = 0, or 0 / *to.denominator: of no rows.
void sum_no_losses(const LossSum& to, Stream stream);

// *first = the first row whose class is neither in [0, classes) nor ignore_index, or more than any row.
template <typename T>
void find_bad_class(const CrossEntropyParams<T>& params, int64_t classes, int64_t* first, Stream stream);

// ---- what was chosen, for reports and tests -------------------------------------------------------------------------

// The kernel that cross_entropy would launch for rows of unit class stride on the current device: "thread", "warp",
// "block", "cluster of 8" or "stream", where the gradient is written in forward.
std::string kernel_for(int64_t classes, DType type);

// The architectures compiled into the library, as nvcc names them: "75;80;86".
const char* compiled_architectures();

}  // namespace cuda
}  // namespace softmax_ext
