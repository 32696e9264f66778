// The cross-entropy operators: checks and allocation.
#include <stdexcept>
#include <string>

#include "../row_part.h"
#include "boxed.h"
#include "operators.h"

namespace softmax_ext {

void throw_bad_class(const Call& call, int64_t row, int64_t y) {
  std::string index;
  for (size_t d = call.batch.size(), rest = row; d-- > 0; rest /= call.batch[d])
    index = std::to_string(rest % call.batch[d]) + (index.empty() ? "" : ", ") + index;
  throw std::out_of_range(std::string("cross_entropy: target must hold classes in [0, ") +
                          std::to_string(call.all_classes) + ") or ignore_index (" +
                          std::to_string(call.options.ignore_index) + "); got " + std::to_string(y) + " at position [" +
                          index + "]. Target " + std::to_string(y) + " is out of bounds.");
}

namespace {

// The classes of the input among those of a row; without them it has all.
struct ClassRange {
  int64_t first = 0;
  std::optional<int64_t> all = std::nullopt;
};

void check_reduction(const Call& call) {
  const int64_t reduction = call.options.reduction;
  STD_TORCH_CHECK(reduction >= kNone && reduction <= kSum, call.op, ": reduction must be 0, 1 or 2; got ", reduction,
                  ".");
}

// Makes class indices contiguous.
void check_target(Call& call) {
  check_device(call.target, call.input, call.op, "target");
  const ScalarType type = call.target.scalar_type();
  call.byte_target = type == ScalarType::Byte;
  call.probabilities = !call.byte_target && type != ScalarType::Long;
  if (call.probabilities) {
    call.target_type = dtype_of(type, call.op, "target (if not int64 or uint8)");
    check_same_sizes(call.input, call.target, call.op, "a target of class probabilities");
  } else {
    STD_TORCH_CHECK(sizes_of(call.target) == call.batch, call.op,
                    ": a target of class indices must have the input's shape without dim ", call.options.dim, ".");
    call.target = as_contiguous(call.target);
  }
}

void check_weight(const Call& call) {
  if (!call.weight) return;
  check_device(*call.weight, call.input, call.op, "weight");
  STD_TORCH_CHECK(call.weight->dim() == 1 && call.weight->size(0) == call.all_classes, call.op,
                  ": weight must have one value for each of the ", call.all_classes, " classes.");
  dtype_of(*call.weight, call.op, "weight");
}

// Takes the factors of the rows in the type of the arithmetic.
void set_row_weight(Call& call, const std::optional<Tensor>& row_weight, ScalarType arithmetic) {
  STD_TORCH_CHECK(!call.options.weighs_by_probability || (!call.probabilities && !row_weight), call.op,
                  ": weighs_by_probability needs class indices, and no row_weight.");
  if (!row_weight) return;
  check_device(*row_weight, call.input, call.op, "row_weight");
  STD_TORCH_CHECK(sizes_of(*row_weight) == call.batch, call.op, ": row_weight must have one value for each row.");
  dtype_of(*row_weight, call.op, "row_weight");
  call.row_weight = as_contiguous(converted(*row_weight, arithmetic));
}

Call checked_call(const char* op, const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                  const Options& options, const ClassRange& range = {}) {
  Call call{op, input, target, weight, options};
  const int64_t dim = call.options.dim = wrap_dim(input, options.dim, op);
  call.input_type = dtype_of(input, op, "input");
  call.batch = batch_sizes(input, dim);
  call.rows = product(call.batch);
  call.classes = input.size(dim);
  call.first_class = range.first;
  call.all_classes = range.all.value_or(call.classes);
  STD_TORCH_CHECK(range.first >= 0 && range.first <= call.all_classes - call.classes, op, ": a row has ",
                  call.all_classes, " classes; got ", call.classes, " from class ", range.first, " on.");
  check_reduction(call);
  check_target(call);
  check_weight(call);
  return call;
}

std::vector<int64_t> state_sizes(const Call& call) {
  std::vector<int64_t> sizes = call.batch;
  sizes.insert(sizes.begin(), call.probabilities ? 4 : call.options.weighs_by_probability ? 3 : 2);
  return sizes;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// The arithmetic for losses of type `dtype`, or of the input's.
ScalarType arithmetic_for(const Call& call, std::optional<ScalarType> dtype) {
  return arithmetic_type({call.input_type, dtype ? dtype_of(*dtype, call.op, "dtype") : call.input_type,
                          call.probabilities ? call.target_type : call.input_type});
}

// The gradient goes to `grad` if given. Where that is the input itself no backward can follow, and the state is empty.
Forward outputs(const Call& call, ScalarType loss_scalar, ScalarType arithmetic, bool stats,
                const std::optional<Tensor>& grad, const std::optional<Tensor>& denominator, bool overwrites) {
  if (denominator) {
    check_device(*denominator, call.input, call.op, "denominator");
    const bool has_sizes = denominator->dim() == 0 || (denominator->dim() == 1 && denominator->size(0) == 2);
    STD_TORCH_CHECK(has_sizes && denominator->scalar_type() == ScalarType::Double, call.op,
                    ": denominator must be a float64 scalar, or two with a factor of z_loss.");
    STD_TORCH_CHECK(call.options.reduction != kSum, call.op, ": a sum has no denominator; use reduction ", kMean, ".");
  }
  const DType loss_type = dtype_of(loss_scalar, call.op, "dtype");
  std::vector<int64_t> total_sizes;
  if (call.options.reduction != kMean) total_sizes = {0};
  if (scales_z_loss(call)) total_sizes = {2};
  const std::vector<int64_t> loss_sizes = call.options.reduction == kNone ? call.batch : std::vector<int64_t>{};
  Forward out{arithmetic,
              loss_type,
              empty(loss_sizes, loss_scalar, call.input),
              empty(overwrites ? std::vector<int64_t>{0} : state_sizes(call), arithmetic, call.input),
              denominator ? torch::stable::clone(*denominator) : empty(total_sizes, ScalarType::Double, call.input),
              {},
              grad,
              !overwrites,
              denominator.has_value()};
  if (stats) {
    for (int i = 0; i < 3; i++) out.stats.push_back(empty(call.batch, arithmetic, call.input));
    out.stats.push_back(empty(call.batch, ScalarType::Long, call.input));
  }
  return out;
}

std::vector<Tensor> results(const Forward& out) {
  std::vector<Tensor> tensors{out.loss, out.state, out.total_weight};
  tensors.insert(tensors.end(), out.stats.begin(), out.stats.end());
  if (out.grad) tensors.push_back(*out.grad);
  return tensors;
}

std::vector<Tensor> cross_entropy(Tensor input, Tensor target, std::optional<Tensor> weight, Options options,
                                  std::optional<ScalarType> dtype, bool stats, bool precompute_grad,
                                  std::optional<Tensor> denominator, std::optional<Tensor> row_weight) {
  Call call = checked_call("cross_entropy", input, target, weight, options);
  set_row_weight(call, row_weight, arithmetic_for(call, dtype));
  std::optional<Tensor> grad;
  if (precompute_grad) grad = softmax_ext::empty_like(input, input.scalar_type());
  const Forward out =
      outputs(call, dtype.value_or(input.scalar_type()), arithmetic_for(call, dtype), stats, grad, denominator, false);
  device::cross_entropy(call, out);
  return results(out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_(
    Tensor input, Tensor target, std::optional<Tensor> weight, Options options, std::optional<ScalarType> dtype,
    bool stats, std::optional<Tensor> denominator, std::optional<Tensor> row_weight) {
  Call call = checked_call("cross_entropy_", input, target, weight, options);
  set_row_weight(call, row_weight, arithmetic_for(call, dtype));
  std::vector<Tensor> none;  // before the input is written: allocations may fail. Results must not share memory.
  for (int i = 0; i < 4 && !stats; i++) none.push_back(empty({0}, input.scalar_type(), input));
  const Forward out =
      outputs(call, dtype.value_or(input.scalar_type()), arithmetic_for(call, dtype), stats, input, denominator, true);
  device::cross_entropy(call, out);
  const std::vector<Tensor>& stat = stats ? out.stats : none;
  return {out.loss, out.state, out.total_weight, stat[0], stat[1], stat[2], stat[3]};
}

// ---- a part of the classes ------------------------------------------------------------------------------------------

Tensor cross_entropy_part(Tensor input, Tensor target, std::optional<Tensor> weight, Options options,
                          std::optional<ScalarType> dtype, bool stats, int64_t first_class, int64_t all_classes,
                          std::optional<Tensor> before) {
  const Call call = checked_call("cross_entropy_part", input, target, weight, options, {first_class, all_classes});
  std::vector<int64_t> sizes = call.batch;
  const bool terms = call.probabilities || options.label_smoothing != 0;
  sizes.insert(sizes.begin(), PartFields{terms, call.probabilities, stats}.count());
  if (before) {
    check_device(*before, input, call.op, "before");
    STD_TORCH_CHECK(
        sizes_of(*before) == sizes && before->scalar_type() == ScalarType::Double && before->is_contiguous(), call.op,
        ": before must be a part of these rows, with the same options.");
  }
  const Tensor part = empty(sizes, ScalarType::Double, input);
  device::cross_entropy_part(call, arithmetic_for(call, dtype), stats, before, part);
  return part;
}

std::vector<Tensor> cross_entropy_of_parts(Tensor parts, std::optional<Tensor> target, std::optional<Tensor> weight,
                                           Options options, ScalarType dtype, bool wide, bool stats,
                                           std::optional<Tensor> denominator, int64_t all_classes,
                                           std::optional<Tensor> row_weight) {
  Call call{"cross_entropy_of_parts", parts, target.value_or(parts), weight, options};
  STD_TORCH_CHECK(
      parts.scalar_type() == ScalarType::Double && parts.is_contiguous() && parts.dim() >= 2 && parts.size(0) > 0,
      call.op, ": parts must be a contiguous float64 tensor [parts, fields, *batch].");
  call.batch = sizes_of(parts);
  call.batch.erase(call.batch.begin(), call.batch.begin() + 2);
  call.rows = product(call.batch);
  call.all_classes = all_classes;
  STD_TORCH_CHECK(all_classes >= 0, call.op, ": a row has ", all_classes, " classes.");
  check_reduction(call);
  if (target)
    check_target(call);
  else
    call.probabilities = true;
  STD_TORCH_CHECK(call.probabilities == !target, call.op, ": with probabilities, target must be None.");
  check_weight(call);
  const PartFields fields{call.probabilities || options.label_smoothing != 0, call.probabilities, stats};
  STD_TORCH_CHECK(parts.size(1) == fields.count(), call.op, ": these options make parts of ", fields.count(),
                  " fields; got ", parts.size(1), ".");
  set_row_weight(call, row_weight, wide ? ScalarType::Double : ScalarType::Float);
  const Forward out =
      outputs(call, dtype, wide ? ScalarType::Double : ScalarType::Float, stats, std::nullopt, denominator, false);
  device::cross_entropy_of_parts(call, out);
  return results(out);
}

// ---- backward -------------------------------------------------------------------------------------------------------

struct UpstreamGradients {
  std::optional<Tensor> loss, lse, nll, entropy;
};

// Makes `grad` contiguous, whose values are returned: it must outlive them.
RowValues checked_upstream(const Call& call, std::optional<Tensor>& grad, bool per_row, const char* argument) {
  if (!grad) return {};
  check_device(*grad, call.input, call.op, argument);
  STD_TORCH_CHECK(per_row ? sizes_of(*grad) == call.batch : grad->numel() == 1, call.op, ": ", argument,
                  " must have one value", per_row ? " for each row." : ".");
  grad = as_contiguous(*grad);
  return row_values(*grad, dtype_of(*grad, call.op, argument), per_row);
}

void backward(Call& call, UpstreamGradients grads, const Tensor& state, const Tensor& total_weight,
              const std::optional<Tensor>& entropy, const std::optional<Tensor>& grad_input,
              const std::optional<Tensor>& grad_target, const std::optional<Tensor>& row_weight) {
  check_device(state, call.input, call.op, "state");
  check_device(total_weight, call.input, call.op, "total_weight");
  const ScalarType arithmetic = state.scalar_type();
  STD_TORCH_CHECK(sizes_of(state) == state_sizes(call) && state.is_contiguous() &&
                      (arithmetic == ScalarType::Double || arithmetic == ScalarType::Float),
                  call.op, ": state must come from cross_entropy.");
  set_row_weight(call, row_weight, arithmetic);
  const bool has_total = total_weight.numel() == 1 || total_weight.numel() == 2;
  STD_TORCH_CHECK((call.options.reduction != kMean && total_weight.numel() == 0) ||
                      (has_total && total_weight.scalar_type() == ScalarType::Double && total_weight.is_contiguous()),
                  call.op, ": total_weight must come from cross_entropy.");
  if (grads.entropy) {
    STD_TORCH_CHECK(
        entropy && entropy->is_contiguous() && sizes_of(*entropy) == call.batch && entropy->scalar_type() == arithmetic,
        call.op, ": a gradient of the entropy needs the entropy itself.");
    check_device(*entropy, call.input, call.op, "entropy");
  }
  device::cross_entropy_backward(
      call, {arithmetic, checked_upstream(call, grads.loss, call.options.reduction == kNone, "grad_loss"),
             checked_upstream(call, grads.lse, true, "grad_lse"), checked_upstream(call, grads.nll, true, "grad_nll"),
             checked_upstream(call, grads.entropy, true, "grad_entropy"), state, total_weight,
             grads.entropy ? entropy : std::nullopt, grad_input, grad_target});
}

std::tuple<Tensor, Tensor> cross_entropy_backward(std::optional<Tensor> grad_loss, std::optional<Tensor> grad_lse,
                                                  std::optional<Tensor> grad_nll, std::optional<Tensor> grad_entropy,
                                                  Tensor input, Tensor target, std::optional<Tensor> weight,
                                                  Tensor state, Tensor total_weight, std::optional<Tensor> entropy,
                                                  Options options, bool needs_input, bool needs_target,
                                                  int64_t first_class, std::optional<int64_t> all_classes,
                                                  std::optional<Tensor> row_weight) {
  Call call = checked_call("cross_entropy_backward", input, target, weight, options, {first_class, all_classes});
  STD_TORCH_CHECK(call.probabilities || !needs_target, call.op, ": class indices have no gradient.");
  std::optional<Tensor> grad_input, grad_target;
  if (needs_input) grad_input = softmax_ext::empty_like(input, input.scalar_type());
  if (needs_target) grad_target = softmax_ext::empty_like(target, target.scalar_type());
  if (needs_input || needs_target)
    backward(call, {grad_loss, grad_lse, grad_nll, grad_entropy}, state, total_weight, entropy, grad_input, grad_target,
             row_weight);
  const auto or_empty = [](const std::optional<Tensor>& grad, const Tensor& like) {
    return grad ? *grad : empty({0}, like.scalar_type(), like);
  };
  return {or_empty(grad_input, input), or_empty(grad_target, target)};
}

void cross_entropy_backward_(std::optional<Tensor> grad_loss, std::optional<Tensor> grad_lse,
                             std::optional<Tensor> grad_nll, std::optional<Tensor> grad_entropy, Tensor input,
                             Tensor target, std::optional<Tensor> weight, Tensor state, Tensor total_weight,
                             std::optional<Tensor> entropy, Options options, int64_t first_class,
                             std::optional<int64_t> all_classes, std::optional<Tensor> row_weight) {
  Call call = checked_call("cross_entropy_backward_", input, target, weight, options, {first_class, all_classes});
  backward(call, {grad_loss, grad_lse, grad_nll, grad_entropy}, state, total_weight, entropy, input, std::nullopt,
           row_weight);
}

}  // namespace

void add_cross_entropy(torch::stable::detail::StableLibrary& library) {
  library.impl("cross_entropy", Boxed<&cross_entropy>::call);
  library.impl("cross_entropy_", Boxed<&cross_entropy_>::call);
  library.impl("cross_entropy_part", Boxed<&cross_entropy_part>::call);
  library.impl("cross_entropy_of_parts", Boxed<&cross_entropy_of_parts>::call);
  library.impl("cross_entropy_backward", Boxed<&cross_entropy_backward>::call);
  library.impl("cross_entropy_backward_", Boxed<&cross_entropy_backward_>::call);
}

}  // namespace softmax_ext
