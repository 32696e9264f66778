// The cross-entropy operators on CUDA tensors: sums, kernel, reduction, all queued on the current stream.
//
// The host waits for nothing: the mean's denominator stays on the device, and every kernel that divides by it reads it
// there. A class out of range makes the loss of its row NaN; with SOFTMAX_EXT_CHECK_TARGETS=1 the host asks first,
// waits for the answer, and raises the CPU's IndexError.
#include <cstdlib>
#include <string>

#include "../kernel_params.h"
#include "cuda_stream.h"
#include "operands.h"

namespace softmax_ext {
namespace {

// What a call of the kernels needs in device memory besides its operands. Freed on return, while the kernels may still
// be queued: torch hands the memory out again in the order of the stream.
template <typename T>
struct Workspace {
  Tensor scratch;
  std::optional<Tensor> weight;      // of T
  std::optional<Tensor> weight_sum;  // [], for smoothing

  Workspace(const Call& call, cuda::Stream stream)
      : scratch(empty({cuda::kSumScratch}, ScalarType::Double, call.input)) {
    if (!call.weight) return;
    weight = as_contiguous(converted(*call.weight, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float));
    if (call.options.label_smoothing == 0) return;
    weight_sum = empty({}, ScalarType::Double, call.input);
    cuda::sum_weights(values_of<T>(*weight), call.all_classes, values_of<double>(*weight_sum), doubles(), stream);
  }

  double* doubles() const { return values_of<double>(scratch); }

  void add_to(CrossEntropyParams<T>& p) const {
    if (weight) p.weight = values_of<T>(*weight) + p.first_class;
    if (weight_sum) p.weight_sum = values_of<double>(*weight_sum);
  }
};

// Set, and neither empty nor 0. The same in softmax_ext/operands.py.
bool targets_are_checked() {
  const char* value = std::getenv("SOFTMAX_EXT_CHECK_TARGETS");
  return value && *value && std::string(value) != "0";
}

template <typename T>
void check_classes(const Call& call, const CrossEntropyParams<T>& p, cuda::Stream stream) {
  if (call.probabilities || !targets_are_checked()) return;
  const auto on_host = [](const Tensor& tensor) {
    return torch::stable::to(tensor, torch::headeronly::DeviceType::CPU);
  };
  const Tensor first = empty({}, ScalarType::Long, call.input);
  cuda::find_bad_class(p, call.all_classes, static_cast<int64_t*>(first.data_ptr()), stream);
  const Tensor first_on_host = on_host(first);
  const int64_t row = *static_cast<const int64_t*>(first_on_host.const_data_ptr());
  if (row >= call.rows) return;
  const Tensor target = on_host(call.target);
  const void* classes = target.const_data_ptr();
  throw_bad_class(
      call, row,
      call.byte_target ? static_cast<const uint8_t*>(classes)[row] : static_cast<const int64_t*>(classes)[row]);
}

// The total weight from the targets, where it is needed beforehand; otherwise it comes with the sum of the losses.
template <typename T>
void sum_targets(const Call& call, const CrossEntropyParams<T>& p, const Tensor& total, const Workspace<T>& workspace,
                 cuda::Stream stream) {
  if (call.probabilities && !call.row_weight)
    torch::stable::fill_(total, static_cast<double>(call.all_classes > 0 ? call.rows : 0));  // numel / classes
  else
    cuda::sum_targets(p, call.all_classes, values_of<double>(total), workspace.doubles(), stream);
  if (!p.z_factor) return;
  CrossEntropyParams<T> unweighted = p;
  unweighted.weight = nullptr;
  cuda::sum_targets(unweighted, call.all_classes, values_of<double>(total) + 1, workspace.doubles(), stream);
  cuda::set_z_factor(values_of<double>(total), stream);
}

// Of no rows: the sum is 0, and a mean 0 / 0 or 0 / denominator.
void fill_empty(const Call& call, const Forward& out) {
  if (call.options.reduction == kNone) return;
  const OnDevice on(call.input);
  const bool is_mean = call.options.reduction == kMean;
  if (is_mean && !out.total_is_given) torch::stable::fill_(out.total_weight, 0);
  double* total = is_mean ? values_of<double>(out.total_weight) : nullptr;
  cuda::sum_no_losses({out.loss.data_ptr(), out.loss_type, is_mean, total, true, nullptr}, on.stream());
}

// The losses' results of a forward call, as a kernel is told of them: `launch` gets the parameters and the sum, or null.
template <typename T, typename Launch>
void with_losses(const Call& call, const Forward& out, CrossEntropyParams<T>& p, const Layout& layout,
                 bool has_denominator, const Launch& launch) {
  if (call.options.reduction == kNone) {
    p.loss = out.loss.data_ptr();
    p.loss_type = out.loss_type;
    return launch(p, nullptr);
  }
  double* const total = has_total(call, out) ? values_of<double>(out.total_weight) : nullptr;
  const Tensor scratch = empty({cuda::loss_scratch_bytes(p, layout)}, ScalarType::Byte, call.input);
  const cuda::LossSum sum{out.loss.data_ptr(), out.loss_type,     call.options.reduction == kMean, total,
                          has_denominator,     scratch.data_ptr()};
  launch(p, &sum);
}

template <typename T>
void forward(const Call& call, const Forward& out) {
  if (call.rows == 0) return fill_empty(call, out);
  const OnDevice on(call.input);
  const cuda::Stream stream = on.stream();
  const Workspace<T> workspace(call, stream);
  const JointLayout joint = cross_entropy_layout(call, out.grad, std::nullopt, kCudaLayoutRule);
  CrossEntropyParams<T> p = forward_params<T>(call, out);
  workspace.add_to(p);
  check_classes(call, p, stream);

  const bool divides = divides_by_total(call, out), sums_first = (divides || p.z_factor) && !out.total_is_given;
  double* total = has_total(call, out) ? values_of<double>(out.total_weight) : nullptr;
  if (sums_first) sum_targets(call, p, out.total_weight, workspace, stream);
  if (out.grad) p.grad_loss = {nullptr, DType::kFloat64, 0, divides ? total : nullptr, true};
  with_losses(call, out, p, joint.layout(), sums_first || out.total_is_given,
              [&](const CrossEntropyParams<T>& params, const cuda::LossSum* sum) {
                cuda::cross_entropy(params, joint.layout(), sum, stream);
              });
}

template <typename T>
void part(const Call& call, bool stats, const std::optional<Tensor>& before, const Tensor& to) {
  if (call.rows == 0) return;
  const OnDevice on(call.input);
  const Workspace<T> workspace(call, on.stream());
  const JointLayout joint = cross_entropy_layout(call, std::nullopt, std::nullopt, kCudaLayoutRule);
  CrossEntropyParams<T> p = part_params<T>(call, before, stats, to);
  workspace.add_to(p);
  check_classes(call, p, on.stream());
  cuda::cross_entropy(p, joint.layout(), nullptr, on.stream());
}

template <typename T>
void of_parts(const Call& call, const Forward& out) {
  if (call.rows == 0) return fill_empty(call, out);
  const OnDevice on(call.input);
  const Workspace<T> workspace(call, on.stream());
  Layout rows{};
  rows.kind = LayoutKind::kRows;
  rows.inner = 1;
  rows.outer = call.rows;
  CrossEntropyParams<T> p = parts_params<T>(call, out);
  workspace.add_to(p);
  const bool sums_first = p.z_factor && !out.total_is_given;
  if (sums_first) sum_targets(call, p, out.total_weight, workspace, on.stream());
  with_losses(call, out, p, rows, sums_first || out.total_is_given,
              [&](const CrossEntropyParams<T>& params, const cuda::LossSum* sum) {
                cuda::cross_entropy_of_parts(params, rows, sum, on.stream());
              });
}

template <typename T>
void backward(const Call& call, const Backward& operands) {
  if (call.rows == 0) return;
  const OnDevice on(call.input);
  const Workspace<T> workspace(call, on.stream());
  const JointLayout joint = cross_entropy_layout(call, operands.grad_input, operands.grad_target, kCudaLayoutRule);
  CrossEntropyParams<T> p = backward_params<T>(call, operands);
  workspace.add_to(p);
  check_classes(call, p, on.stream());
  cuda::cross_entropy(p, joint.layout(), nullptr, on.stream());
}

}  // namespace

void device::cross_entropy(const Call& call, const Forward& out) {
  out.arithmetic == ScalarType::Double ? forward<double>(call, out) : forward<float>(call, out);
}

void device::cross_entropy_part(const Call& call, ScalarType arithmetic, bool stats,
                                const std::optional<Tensor>& before, const Tensor& to) {
  arithmetic == ScalarType::Double ? part<double>(call, stats, before, to) : part<float>(call, stats, before, to);
}

void device::cross_entropy_of_parts(const Call& call, const Forward& out) {
  out.arithmetic == ScalarType::Double ? of_parts<double>(call, out) : of_parts<float>(call, out);
}

void device::cross_entropy_backward(const Call& call, const Backward& operands) {
  operands.arithmetic == ScalarType::Double ? backward<double>(call, operands) : backward<float>(call, operands);
}

}  // namespace softmax_ext
