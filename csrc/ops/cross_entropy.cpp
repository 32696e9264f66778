// The cross-entropy operators: checks and allocation.
#include <stdexcept>
#include <string>

#include "boxed.h"
#include "operators.h"

namespace softmax_ext {

void throw_bad_class(const Call& call, int64_t row, int64_t y) {
  std::string index;
  for (size_t d = call.batch.size(), rest = row; d-- > 0; rest /= call.batch[d])
    index = std::to_string(rest % call.batch[d]) + (index.empty() ? "" : ", ") + index;
  throw std::out_of_range(std::string("cross_entropy: target must hold classes in [0, ") +
                          std::to_string(call.classes) + ") or ignore_index (" +
                          std::to_string(call.options.ignore_index) + "); got " + std::to_string(y) + " at position [" +
                          index + "].");
}

namespace {

Call checked_call(const char* op, const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                  const Options& options) {
  Call call{op, input, target, weight, options};
  const int64_t dim = call.options.dim = wrap_dim(input, options.dim, op), reduction = options.reduction;
  call.input_type = dtype_of(input, op, "input");
  call.batch = batch_sizes(input, dim);
  call.rows = product(call.batch);
  call.classes = input.size(dim);
  check_device(target, input, op, "target");
  STD_TORCH_CHECK(reduction >= kNone && reduction <= kSum, op, ": reduction must be 0, 1 or 2; got ", reduction, ".");
  const ScalarType target_type = target.scalar_type();
  call.byte_target = target_type == ScalarType::Byte;
  call.probabilities = !call.byte_target && target_type != ScalarType::Long;
  if (call.probabilities) {
    call.target_type = dtype_of(target_type, op, "target (if not int64 or uint8)");
    check_same_sizes(input, target, op, "a target of class probabilities");
  } else {
    STD_TORCH_CHECK(sizes_of(target) == call.batch, op,
                    ": a target of class indices must have the input's shape without dim ", dim, ".");
    call.target = as_contiguous(target);
  }
  if (weight) {
    check_device(*weight, input, op, "weight");
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == call.classes, op,
                    ": weight must have one value for each of the ", call.classes, " classes.");
    dtype_of(*weight, op, "weight");
  }
  return call;
}

std::vector<int64_t> state_sizes(const Call& call) {
  std::vector<int64_t> sizes = call.batch;
  sizes.insert(sizes.begin(), call.probabilities ? 4 : 2);
  return sizes;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// The gradient goes to `grad` if given. Where that is the input itself no backward can follow, and the state is empty.
Forward forward(const Call& call, std::optional<ScalarType> dtype, bool stats, const std::optional<Tensor>& grad,
                const std::optional<Tensor>& denominator, bool overwrites) {
  if (denominator) {
    check_device(*denominator, call.input, call.op, "denominator");
    STD_TORCH_CHECK(denominator->dim() == 0 && denominator->scalar_type() == ScalarType::Double, call.op,
                    ": denominator must be a float64 scalar.");
    STD_TORCH_CHECK(call.options.reduction != kSum, call.op, ": a sum has no denominator; use reduction ", kMean, ".");
  }
  const ScalarType loss_scalar = dtype.value_or(call.input.scalar_type());
  const DType loss_type = dtype_of(loss_scalar, call.op, "dtype");
  const ScalarType arithmetic =
      arithmetic_type({call.input_type, loss_type, call.probabilities ? call.target_type : call.input_type});
  const std::vector<int64_t> total_sizes =
      call.options.reduction == kMean ? std::vector<int64_t>{} : std::vector<int64_t>{0};
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
  device::cross_entropy(call, out);
  return out;
}

std::vector<Tensor> cross_entropy(Tensor input, Tensor target, std::optional<Tensor> weight, Options options,
                                  std::optional<ScalarType> dtype, bool stats, bool precompute_grad,
                                  std::optional<Tensor> denominator) {
  const Call call = checked_call("cross_entropy", input, target, weight, options);
  std::optional<Tensor> grad;
  if (precompute_grad) grad = softmax_ext::empty_like(input, input.scalar_type());
  const Forward out = forward(call, dtype, stats, grad, denominator, false);
  std::vector<Tensor> outputs{out.loss, out.state, out.total_weight};
  outputs.insert(outputs.end(), out.stats.begin(), out.stats.end());
  if (grad) outputs.push_back(*grad);
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_(
    Tensor input, Tensor target, std::optional<Tensor> weight, Options options, std::optional<ScalarType> dtype,
    bool stats, std::optional<Tensor> denominator) {
  const Call call = checked_call("cross_entropy_", input, target, weight, options);
  std::vector<Tensor> none;  // before the input is written: allocations may fail. Results must not share memory.
  for (int i = 0; i < 4 && !stats; i++) none.push_back(empty({0}, input.scalar_type(), input));
  const Forward out = forward(call, dtype, stats, input, denominator, true);
  const std::vector<Tensor>& stat = stats ? out.stats : none;
  return {out.loss, out.state, out.total_weight, stat[0], stat[1], stat[2], stat[3]};
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

void backward(const Call& call, UpstreamGradients grads, const Tensor& state, const Tensor& total_weight,
              const std::optional<Tensor>& entropy, const std::optional<Tensor>& grad_input,
              const std::optional<Tensor>& grad_target) {
  check_device(state, call.input, call.op, "state");
  check_device(total_weight, call.input, call.op, "total_weight");
  const ScalarType arithmetic = state.scalar_type();
  STD_TORCH_CHECK(sizes_of(state) == state_sizes(call) && state.is_contiguous() &&
                      (arithmetic == ScalarType::Double || arithmetic == ScalarType::Float),
                  call.op, ": state must come from cross_entropy.");
  STD_TORCH_CHECK(call.options.reduction != kMean ||
                      (total_weight.numel() == 1 && total_weight.scalar_type() == ScalarType::Double),
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
                                                  Options options, bool needs_input, bool needs_target) {
  const Call call = checked_call("cross_entropy_backward", input, target, weight, options);
  STD_TORCH_CHECK(call.probabilities || !needs_target, call.op, ": class indices have no gradient.");
  std::optional<Tensor> grad_input, grad_target;
  if (needs_input) grad_input = softmax_ext::empty_like(input, input.scalar_type());
  if (needs_target) grad_target = softmax_ext::empty_like(target, target.scalar_type());
  if (needs_input || needs_target)
    backward(call, {grad_loss, grad_lse, grad_nll, grad_entropy}, state, total_weight, entropy, grad_input,
             grad_target);
  const auto or_empty = [](const std::optional<Tensor>& grad, const Tensor& like) {
    return grad ? *grad : empty({0}, like.scalar_type(), like);
  };
  return {or_empty(grad_input, input), or_empty(grad_target, target)};
}

void cross_entropy_backward_(std::optional<Tensor> grad_loss, std::optional<Tensor> grad_lse,
                             std::optional<Tensor> grad_nll, std::optional<Tensor> grad_entropy, Tensor input,
                             Tensor target, std::optional<Tensor> weight, Tensor state, Tensor total_weight,
                             std::optional<Tensor> entropy, Options options) {
  const Call call = checked_call("cross_entropy_backward_", input, target, weight, options);
  backward(call, {grad_loss, grad_lse, grad_nll, grad_entropy}, state, total_weight, entropy, input, std::nullopt);
}

}  // namespace

void add_cross_entropy(torch::stable::detail::StableLibrary& library) {
  library.impl("cross_entropy", Boxed<&cross_entropy>::call);
  library.impl("cross_entropy_", Boxed<&cross_entropy_>::call);
  library.impl("cross_entropy_backward", Boxed<&cross_entropy_backward>::call);
  library.impl("cross_entropy_backward_", Boxed<&cross_entropy_backward_>::call);
}

}  // namespace softmax_ext
