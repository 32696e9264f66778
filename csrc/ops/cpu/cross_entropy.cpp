// The cross-entropy operators on CPU tensors: target scan, kernel, reduction.
//
// The targets are scanned before any output is touched: a class out of range is an IndexError, and the mean's
// denominator is known before the kernel runs, so that it can write final gradients in the same visit.
#include <cmath>

#include "../../cpu/dispatch.h"
#include "../../row_math.h"
#include "../kernel_params.h"
#include "non_temporal.h"
#include "parallel.h"
#include "values.h"

namespace softmax_ext {
namespace {

// The class weights in the type of the arithmetic, as the kernels read them.
template <typename T>
struct Weights {
  std::vector<T> weight;
  double sum;

  explicit Weights(const Call& call) : sum(static_cast<double>(call.all_classes)) {
    if (!call.weight) return;
    const Tensor source = as_contiguous(*call.weight);
    const void* data = source.const_data_ptr();
    const DType type = dtype_of(source, call.op, "weight");
    weight.assign(call.all_classes + kWeightPadding, 0);
    sum = 0;
    for (int64_t c = 0; c < call.all_classes; c++) {
      weight[c] = static_cast<T>(value_at(data, type, c));
      sum += weight[c];
    }
  }

  const T* weight_data() const { return weight.empty() ? nullptr : weight.data(); }
};

ClassScan scan_kernel(const int64_t* index, int64_t n, int64_t classes, int64_t ignore_index) {
  return kernels().scan_classes(index, n, classes, ignore_index);
}
ClassScan scan_kernel(const uint8_t* index, int64_t n, int64_t classes, int64_t ignore_index) {
  return kernels().scan_classes_u8(index, n, classes, ignore_index);
}

template <typename T>
const T* row_weights(const Call& call) {
  return call.row_weight ? const_values_of<T>(*call.row_weight) : nullptr;
}

// Checks every class and returns the sum of weight[target], times row_weight, over the rows not ignored.
template <typename T, typename Index>
double scan_classes(const Call& call, const Index* classes, const T* weight) {
  const T* const own = row_weights<T>(call);
  const Groups groups(call.rows, 1);
  std::vector<double> sums(groups.count());
  std::vector<int64_t> bad(groups.count(), call.rows);  // the first row of a class out of range
  groups.run(0, [&](int64_t group, int64_t begin, int64_t end, void*) {
    const auto ignored = [&](int64_t row) { return static_cast<int64_t>(classes[row]) == call.options.ignore_index; };
    const auto out_of_range = [&](int64_t row) {
      return static_cast<uint64_t>(classes[row]) >= static_cast<uint64_t>(call.all_classes) && !ignored(row);
    };
    const ClassScan found = scan_kernel(classes + begin, end - begin, call.all_classes, call.options.ignore_index);
    sums[group] = static_cast<double>(found.live);
    if (found.out_of_range) {
      for (bad[group] = begin; !out_of_range(bad[group]);) bad[group]++;
    } else if (weight || own) {
      double sum = 0;
      for (int64_t row = begin; row < end; row++)
        if (!ignored(row)) sum += (weight ? static_cast<double>(weight[classes[row]]) : 1) * (own ? own[row] : 1);
      sums[group] = sum;
    }
  });
  double total = 0;
  for (int64_t group = 0; group < groups.count(); group++) {
    if (bad[group] != call.rows) throw_bad_class(call, bad[group], classes[bad[group]]);
    total += sums[group];
  }
  return total;
}

// With probabilities: the number of rows, or the sum of their weights.
template <typename T>
double sum_of_rows(const Call& call) {
  const T* const own = row_weights<T>(call);
  if (!own) return static_cast<double>(call.rows);
  double sum = 0;
  for (int64_t row = 0; row < call.rows; row++) sum += own[row];
  return sum;
}

// Checks the target and returns the mean's denominator with these class weights, or without any.
template <typename T>
double scan_targets(const Call& call, const T* weight) {
  if (call.probabilities) return call.all_classes > 0 ? sum_of_rows<T>(call) : 0;
  const void* data = call.target.const_data_ptr();
  return call.byte_target ? scan_classes(call, static_cast<const uint8_t*>(data), weight)
                          : scan_classes(call, static_cast<const int64_t*>(data), weight);
}

// With what each addition rounds off added at the end (Neumaier, Zeitschrift für Angewandte Mathematik und Mechanik 54,
// 1974).
double compensated_sum(const std::vector<double>& values) {
  double sum = 0, rest = 0;
  for (double value : values) {
    const double next = sum + value;
    rest += std::abs(sum) >= std::abs(value) ? (sum - next) + value : (value - next) + sum;
    sum = next;
  }
  return std::isfinite(sum) ? sum + rest : sum;
}

template <typename T>
double run(const CrossEntropy<T>& k) {
  if (units(k.layout) == 0) return 0;
  const auto& kernel = kernels().of(k);
  const Groups groups(k.layout);
  std::vector<double> losses(groups.count());
  groups.run(kernel.scratch_bytes(k), [&](int64_t group, int64_t begin, int64_t end, void* scratch) {
    losses[group] = kernel.run(k, begin, end, scratch);
  });
  return compensated_sum(losses);
}

template <typename T>
double run(CrossEntropyParams<T> params, const Weights<T>& weights, const Layout& layout, bool non_temporal) {
  params.weight = weights.weight_data();
  if (params.weight) params.weight += params.first_class;
  params.weight_sum = &weights.sum;
  return run(CrossEntropy<T>{params, {layout, non_temporal}});
}

// Fills the outputs of a forward call with these parameters.
template <typename T>
void forward(const Call& call, const Forward& out, CrossEntropyParams<T> p, const Layout& layout, bool non_temporal) {
  const Weights<T> weights(call);
  double* const total = has_total(call, out) ? values_of<double>(out.total_weight) : nullptr;
  const double weight_of_targets = scan_targets(call, weights.weight_data());
  if (total && !out.total_is_given) {
    total[0] = weight_of_targets;
    if (p.z_factor) total[1] = z_factor_of(total[0], scan_targets<T>(call, nullptr));
  }
  p.loss_type = out.loss_type;
  if (call.options.reduction == kNone) p.loss = out.loss.data_ptr();
  if (out.grad) p.grad_loss = {nullptr, DType::kFloat64, 0, divides_by_total(call, out) ? total : nullptr, true};
  const double sum = run(p, weights, layout, non_temporal);
  if (call.options.reduction != kNone)
    set_value(out.loss.data_ptr(), out.loss_type, call.options.reduction == kMean ? sum / total[0] : sum);
}

template <typename T>
void forward(const Call& call, const Forward& out) {
  const JointLayout joint = cross_entropy_layout(call, out.grad, std::nullopt, kLayoutRule);
  forward(call, out, forward_params<T>(call, out), joint.layout(), out.grad && is_non_temporal(*out.grad, call.input));
}

template <typename T>
void part(const Call& call, bool stats, const std::optional<Tensor>& before, const Tensor& to) {
  const Weights<T> weights(call);
  scan_targets(call, weights.weight_data());
  const JointLayout joint = cross_entropy_layout(call, std::nullopt, std::nullopt, kLayoutRule);
  run(part_params<T>(call, before, stats, to), weights, joint.layout(), false);
}

template <typename T>
void of_parts(const Call& call, const Forward& out) {
  Layout rows{};
  rows.kind = LayoutKind::kRows;
  rows.inner = 1;
  rows.outer = call.rows;
  forward(call, out, parts_params<T>(call, out), rows, false);
}

template <typename T>
void backward(const Call& call, const Backward& operands) {
  const Weights<T> weights(call);
  scan_targets(call, weights.weight_data());
  const JointLayout joint = cross_entropy_layout(call, operands.grad_input, operands.grad_target, kLayoutRule);
  run(backward_params<T>(call, operands), weights, joint.layout(),
      operands.grad_input && is_non_temporal(*operands.grad_input, call.input));
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
