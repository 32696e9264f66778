// The operators, which are the same for every device, and what a device gives to them.
//
// A library holds one device: it is linked from the sources of this folder, those of the device's own (cpu/ or cuda/),
// which define the functions of `device`, and the kernels. The sources of this folder check the arguments and allocate
// the outputs; the device computes.
#pragma once

#include <optional>
#include <vector>

#include "../params.h"
#include "tensors.h"

namespace softmax_ext {

// Registers the operators' schemas, which are the same for every device.
void define_operators(torch::stable::detail::StableLibrary& library);

// Registers the operators' implementations in the library of a device.
void add_cross_entropy(torch::stable::detail::StableLibrary& library);
void add_softmax(torch::stable::detail::StableLibrary& library);

// ---- cross entropy --------------------------------------------------------------------------------------------------

// The arguments that forward and backward share, checked.
struct Call {
  const char* op;
  Tensor input;
  Tensor target;  // contiguous where it holds class indices
  std::optional<Tensor> weight;
  Options options;  // dim counts from the front

  DType input_type{};
  bool probabilities = false;
  bool byte_target = false;            // class indices of uint8, otherwise of int64
  DType target_type{};                 // of probabilities
  std::optional<Tensor> row_weight{};  // contiguous, in the type of the arithmetic
  std::vector<int64_t> batch{};
  int64_t rows = 0, classes = 0;
  int64_t first_class = 0, all_classes = 0;  // of a row; the input has `classes` of them
};

// The outputs of a forward call, to be filled.
struct Forward {
  ScalarType arithmetic;
  DType loss_type;
  Tensor loss;                 // [*batch] or []
  Tensor state;                // [2, 3 or 4, *batch], or [0]: no backward follows
  Tensor total_weight;         // [] float64: the mean's denominator; [2]: and the factor of z_loss; [0]: there is none
  std::vector<Tensor> stats;   // none, or lse, nll, entropy, prediction: [*batch]
  std::optional<Tensor> grad;  // of the input's shape, for an upstream gradient of 1; may be the input
  bool saves_state;
  bool total_is_given;  // total_weight holds its value; otherwise it follows from the targets and is to be filled
};

// The operands of a backward call besides those of `Call`, checked, and the gradients to be filled.
struct Backward {
  ScalarType arithmetic;
  RowValues grad_loss, grad_lse, grad_nll, grad_entropy;  // not yet divided by the mean's denominator
  Tensor state;
  Tensor total_weight;
  std::optional<Tensor> entropy_values;  // where their gradient is given
  std::optional<Tensor> grad_input, grad_target;
};

// Whether there is a denominator: of the mean, or given for rows that are part of one.
inline bool has_total(const Call& call, const Forward& out) {
  return out.total_is_given || call.options.reduction == kMean;
}

// Whether the z terms of a mean have a denominator of their own, the rows that count without class weights.
inline bool scales_z_loss(const Call& call) {
  return call.options.reduction == kMean && call.options.z_loss != 0 && call.weight && !call.probabilities;
}

// The factor of z_loss in a total weight; null: 1.
inline const double* z_factor_in(const Tensor& total_weight) {
  return total_weight.numel() == 2 ? static_cast<const double*>(total_weight.const_data_ptr()) + 1 : nullptr;
}

// Whether a gradient that is written before its upstream gradient is known is divided by the mean's denominator. Not in
// float16, where small gradients would be lost to underflow before a loss scale can lift them.
inline bool divides_by_total(const Call& call, const Forward& out) {
  return out.grad && has_total(call, out) && call.input_type != DType::kFloat16;
}

// IndexError for the class y in the given row.
[[noreturn]] void throw_bad_class(const Call& call, int64_t row, int64_t y);

// ---- what a device defines ------------------------------------------------------------------------------------------

namespace device {

void cross_entropy(const Call& call, const Forward& out);
void cross_entropy_backward(const Call& call, const Backward& operands);

// What the input, a part of the classes, adds to the rows: fills `part`, [fields, *batch] float64 (row_part.h), with the
// classes of `before` too, if it is given.
void cross_entropy_part(const Call& call, ScalarType arithmetic, bool stats, const std::optional<Tensor>& before,
                        const Tensor& part);

// The same as cross_entropy, from such parts. They are the input of the call: [parts, fields, *batch].
void cross_entropy_of_parts(const Call& call, const Forward& out);

// output = softmax or log_softmax of input along dim; the types may differ.
void softmax(const Tensor& input, const Tensor& output, int64_t dim, bool log);

// grad_input from the upstream gradient and the saved output, whose types are the same.
void softmax_backward(const Tensor& grad_output, const Tensor& output, const Tensor& grad_input, int64_t dim, bool log);

// tensor *= factor; nothing is touched where the factor is 1 for all.
void scale_rows(const Tensor& tensor, int64_t dim, const RowValues& factor);

}  // namespace device
}  // namespace softmax_ext
