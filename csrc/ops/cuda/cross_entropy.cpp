// The cross-entropy operators on CUDA tensors: sums, kernel, reduction, all queued on the current stream.
//
// The host waits for nothing: the mean's denominator stays on the device, and every kernel that divides by it reads it
// there. A class out of range makes the loss of its row NaN; with SOFTMAX_EXT_CHECK_TARGETS=1 the host asks first, waits
// for the answer, and raises the CPU's IndexError.
#include <cstdlib>
#include <limits>
#include <string>

#include "../kernel_calls.h"
#include "operands.h"
#include "stream.h"

namespace softmax_ext {
namespace {

double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }

// What a call of the kernels needs in device memory besides its operands. Freed on return, while the kernels may still
// be queued: torch hands the memory out again in the order of the stream.
struct Workspace {
  Tensor scratch;
  std::optional<Tensor> weight;      // in the type of the arithmetic
  std::optional<Tensor> weight_sum;  // [], for smoothing

  Workspace(const Call& call, ScalarType arithmetic, cuda::Stream stream)
      : scratch(empty({cuda::kSumScratch}, ScalarType::Double, call.input)) {
    if (!call.weight) return;
    weight = as_contiguous(converted(*call.weight, arithmetic));
    if (call.label_smoothing == 0) return;
    weight_sum = empty({}, ScalarType::Double, call.input);
    cuda::sum_weights(weight->const_data_ptr(), arithmetic == ScalarType::Double, call.classes, doubles(*weight_sum),
                      doubles(scratch), stream);
  }

  void add_to(cuda::CrossEntropy& k, ScalarType arithmetic) const {
    k.is_double = arithmetic == ScalarType::Double;
    if (!weight) return;
    k.weight = weight->const_data_ptr();
    if (weight_sum) k.weight_sum = doubles(*weight_sum);
  }
};

// Set, and neither empty nor 0. The same in softmax_ext/chunks.py.
bool targets_are_checked() {
  const char* value = std::getenv("SOFTMAX_EXT_CHECK_TARGETS");
  return value && *value && std::string(value) != "0";
}

void check_classes(const Call& call, const cuda::CrossEntropy& k, cuda::Stream stream) {
  if (call.probabilities || !targets_are_checked()) return;
  const auto on_host = [](const Tensor& tensor) {
    return torch::stable::to(tensor, torch::headeronly::DeviceType::CPU);
  };
  const Tensor first = empty({}, ScalarType::Long, call.input);
  cuda::find_bad_class(k, call.classes, static_cast<int64_t*>(first.data_ptr()), stream);
  const Tensor first_on_host = on_host(first);
  const int64_t row = *static_cast<const int64_t*>(first_on_host.const_data_ptr());
  if (row >= call.rows) return;
  const Tensor target = on_host(call.target);
  const void* classes = target.const_data_ptr();
  throw_bad_class(
      call, row,
      call.byte_target ? static_cast<const uint8_t*>(classes)[row] : static_cast<const int64_t*>(classes)[row]);
}

// The mean's denominator, for a gradient that is to be divided by it; without one it comes with the sum of the losses.
void sum_targets(const Call& call, const cuda::CrossEntropy& k, const Tensor& total, const Workspace& workspace,
                 cuda::Stream stream) {
  if (call.probabilities)
    torch::stable::fill_(total, static_cast<double>(call.classes > 0 ? call.rows : 0));  // numel / classes
  else
    cuda::sum_targets(k, call.classes, doubles(total), doubles(workspace.scratch), stream);
}

// Of no rows: a mean is 0 / 0.
void fill_empty(const Call& call, const Forward& out) {
  if (call.reduction == kMean) torch::stable::fill_(out.total_weight, 0);
  if (call.reduction != kNone)
    torch::stable::fill_(out.loss, call.reduction == kMean ? std::numeric_limits<double>::quiet_NaN() : 0);
}

}  // namespace

void device::cross_entropy(const Call& call, const Forward& out) {
  if (call.rows == 0) return fill_empty(call, out);
  const OnDevice on(call.input);
  const cuda::Stream stream = on.stream();
  const Workspace workspace(call, out.arithmetic, stream);
  const JointLayout joint = cross_entropy_layout(call, out.grad, std::nullopt, kCudaLayoutRule);
  auto k = forward_call<cuda::CrossEntropy>(call, out, joint.layout());
  workspace.add_to(k, out.arithmetic);
  check_classes(call, k, stream);

  const bool is_mean = call.reduction == kMean, divides = divides_by_total(call, out);
  double* total = is_mean ? doubles(out.total_weight) : nullptr;
  if (divides) sum_targets(call, k, out.total_weight, workspace, stream);
  const double* divisor = out.grad_divisor ? doubles(*out.grad_divisor) : divides ? total : nullptr;
  if (out.grad) k.grad_loss = {true, nullptr, DType::kFloat64, 0, divisor};
  const Tensor losses = call.reduction == kNone ? out.loss : empty(call.batch, out.arithmetic, call.input);
  k.loss = losses.data_ptr();
  k.loss_type = dtype_of(losses, call.op, "dtype");
  cuda::cross_entropy(k, stream);
  if (call.reduction != kNone)
    cuda::sum_losses(k, call.classes, {out.loss.data_ptr(), out.loss_type, is_mean, total, divides},
                     doubles(workspace.scratch), stream);
}

void device::cross_entropy_backward(const Call& call, const Backward& operands) {
  if (call.rows == 0) return;
  const OnDevice on(call.input);
  const Workspace workspace(call, operands.arithmetic, on.stream());
  const JointLayout joint = cross_entropy_layout(call, operands.grad_input, operands.grad_target, kCudaLayoutRule);
  auto k = backward_call<cuda::CrossEntropy>(call, operands, joint.layout());
  workspace.add_to(k, operands.arithmetic);
  check_classes(call, k, on.stream());
  k.grad_loss = upstream(operands.loss, call.reduction == kMean ? doubles(operands.total_weight) : nullptr);
  k.grad_lse = upstream(operands.lse);
  k.grad_nll = upstream(operands.nll);
  k.grad_entropy = upstream(operands.entropy);
  cuda::cross_entropy(k, on.stream());
}

}  // namespace softmax_ext
