// The cross-entropy operators on CPU tensors: checks, target scan, allocation, kernel, reduction.
//
// The targets are scanned before any output is allocated: a class out of range is an IndexError, and the mean's
// denominator is known before the kernel runs, so that it can write final gradients in the same visit.
#include <stdexcept>
#include <string>

#include "../cpu/dispatch.h"
#include "tensors.h"

namespace softmax_ext {
namespace {

enum Reduction { kNone = 0, kMean = 1, kSum = 2 };

// The arguments that forward and backward share.
struct Call {
  const char* op;
  Tensor input;
  Tensor target;  // contiguous where it holds class indices
  std::optional<Tensor> weight;
  int64_t dim;
  int64_t reduction;
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap, logit_scale;

  DType input_type{};
  bool probabilities = false;
  DType target_type{};  // of probabilities
  std::vector<int64_t> batch{};
  int64_t rows = 0, classes = 0;
};

bool is_index_type(ScalarType type) { return type == ScalarType::Long || type == ScalarType::Byte; }

Call checked_call(const char* op, const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                  int64_t dim, int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss,
                  std::optional<double> softcap, double logit_scale) {
  Call call{op,         input,        target,          weight, wrap_dim(input, dim, op),
            reduction,  ignore_index, label_smoothing, z_loss, softcap.value_or(0),
            logit_scale};
  call.input_type = dtype_of(input, op, "input");
  call.batch = batch_sizes(input, call.dim);
  call.rows = product(call.batch);
  call.classes = input.size(call.dim);
  check_cpu(target, op, "target");
  STD_TORCH_CHECK(reduction >= kNone && reduction <= kSum, op, ": reduction must be 0, 1 or 2; got ", reduction, ".");
  call.probabilities = !is_index_type(target.scalar_type());
  if (call.probabilities) {
    call.target_type = dtype_of(target, op, "target (if not int64 or uint8)");
    check_same_sizes(input, target, op, "a target of class probabilities");
  } else {
    STD_TORCH_CHECK(sizes_of(target) == call.batch, op,
                    ": a target of class indices must have the input's shape without dim ", call.dim, ".");
    call.target = as_contiguous(target);
  }
  if (weight) {
    check_cpu(*weight, op, "weight");
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == call.classes, op,
                    ": weight must have one value for each of the ", call.classes, " classes.");
    dtype_of(*weight, op, "weight");
  }
  return call;
}

// The class weights in the type of the arithmetic, as the kernels read them.
template <typename T>
struct Weights {
  std::vector<T> weight;
  double sum;

  explicit Weights(const Call& call) : sum(static_cast<double>(call.classes)) {
    if (!call.weight) return;
    const Tensor source = as_contiguous(*call.weight);
    const void* data = source.const_data_ptr();
    const DType type = dtype_of(source, call.op, "weight");
    weight.assign(call.classes + kWeightPadding, 0);
    sum = 0;
    for (int64_t c = 0; c < call.classes; c++) {
      weight[c] = static_cast<T>(value_at(data, type, c));
      sum += weight[c];
    }
  }

  const T* weight_data() const { return weight.empty() ? nullptr : weight.data(); }
};

[[noreturn]] void throw_bad_class(const Call& call, int64_t row, int64_t y) {
  std::string index;
  for (size_t d = call.batch.size(), rest = row; d-- > 0; rest /= call.batch[d])
    index = std::to_string(rest % call.batch[d]) + (index.empty() ? "" : ", ") + index;
  throw std::out_of_range(std::string("cross_entropy: target must hold classes in [0, ") +
                          std::to_string(call.classes) + ") or ignore_index (" + std::to_string(call.ignore_index) +
                          "); got " + std::to_string(y) + " at position [" + index + "].");
}

ClassScan scan_kernel(const int64_t* index, int64_t n, int64_t classes, int64_t ignore_index) {
  return kernels().scan_classes(index, n, classes, ignore_index);
}
ClassScan scan_kernel(const uint8_t* index, int64_t n, int64_t classes, int64_t ignore_index) {
  return kernels().scan_classes_u8(index, n, classes, ignore_index);
}

// Checks every class and returns the sum of weight[target] over the rows not ignored.
template <typename T, typename Index>
double scan_classes(const Call& call, const Index* classes, const T* weight) {
  const Groups groups(call.rows, 1);
  std::vector<double> sums(groups.count());
  std::vector<int64_t> bad(groups.count(), call.rows);  // the first row of a class out of range
  groups.run([&](int64_t group, int64_t begin, int64_t end) {
    const auto ignored = [&](int64_t row) { return static_cast<int64_t>(classes[row]) == call.ignore_index; };
    const auto out_of_range = [&](int64_t row) {
      return static_cast<uint64_t>(classes[row]) >= static_cast<uint64_t>(call.classes) && !ignored(row);
    };
    const ClassScan found = scan_kernel(classes + begin, end - begin, call.classes, call.ignore_index);
    sums[group] = static_cast<double>(found.live);
    if (found.out_of_range) {
      for (bad[group] = begin; !out_of_range(bad[group]);) bad[group]++;
    } else if (weight) {
      double sum = 0;
      for (int64_t row = begin; row < end; row++)
        if (!ignored(row)) sum += weight[classes[row]];
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

// Checks the target and returns the mean's denominator.
template <typename T>
double scan_targets(const Call& call, const Weights<T>& weights) {
  if (call.probabilities) return static_cast<double>(call.classes > 0 ? call.rows : 0);  // numel / classes
  const void* data = call.target.const_data_ptr();
  return call.target.scalar_type() == ScalarType::Long
             ? scan_classes(call, static_cast<const int64_t*>(data), weights.weight_data())
             : scan_classes(call, static_cast<const uint8_t*>(data), weights.weight_data());
}

// What is the same in a forward and a backward call of the kernel.
template <typename T>
CrossEntropy<T> kernel_call(const Call& call, const Layout& layout, const Weights<T>& weights, const Tensor& state) {
  CrossEntropy<T> k{};
  k.layout = layout;
  k.logits = call.input.const_data_ptr();
  k.logits_type = call.input_type;
  const void* target = call.target.const_data_ptr();
  k.has_probabilities = call.probabilities;
  if (call.probabilities)
    k.probabilities = target;
  else if (call.target.scalar_type() == ScalarType::Long)
    k.index = static_cast<const int64_t*>(target);
  else
    k.index_u8 = static_cast<const uint8_t*>(target);
  k.probabilities_type = call.target_type;
  k.weight = weights.weight_data();
  k.weight_sum = static_cast<T>(weights.sum);
  k.ignore_index = call.ignore_index;
  k.label_smoothing = static_cast<T>(call.label_smoothing);
  k.z_loss = static_cast<T>(call.z_loss);
  k.softcap = static_cast<T>(call.softcap);
  k.logit_scale = static_cast<T>(call.logit_scale);
  k.state = static_cast<T*>(state.data_ptr());
  k.rows = call.rows;
  return k;
}

double run_kernel(const CrossEntropy<float>& k, int64_t begin, int64_t end) {
  return kernels().cross_entropy_float(k, begin, end);
}
double run_kernel(const CrossEntropy<double>& k, int64_t begin, int64_t end) {
  return kernels().cross_entropy_double(k, begin, end);
}

template <typename T>
double run(const CrossEntropy<T>& k, const JointLayout& joint) {
  const int64_t units = joint.units();
  if (units == 0) return 0;
  const Groups groups(units, k.layout.classes * (k.layout.rows ? 1 : kTile));
  std::vector<double> losses(groups.count());
  groups.run([&](int64_t group, int64_t begin, int64_t end) { losses[group] = run_kernel(k, begin, end); });
  double sum = 0;
  for (double loss : losses) sum += loss;
  return sum;
}

const Tensor* operand(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

// What a gradient is multiplied by that is written before its upstream gradient is known. The mean's 1 / total_weight,
// except in float16, where small gradients would be lost to underflow before a loss scale can lift them.
double precomputed_scale(const Call& call, double total_weight) {
  return call.reduction == kMean && call.input_type != DType::kFloat16 ? 1 / total_weight : 1.0;
}

// [loss, state, total_weight] + [lse, nll, entropy, prediction] with stats; the gradient goes to `grad` if given. Where
// that is the input itself no backward can follow, and the state is empty.
template <typename T>
std::vector<Tensor> forward(const Call& call, ScalarType arithmetic, ScalarType loss_type, bool stats,
                            const std::optional<Tensor>& grad, bool overwrites) {
  const Weights<T> weights(call);
  const double total_weight = scan_targets(call, weights);

  std::vector<int64_t> state_sizes = call.batch;
  state_sizes.insert(state_sizes.begin(), call.probabilities ? 4 : 2);
  const Tensor loss = empty(call.reduction == kNone ? call.batch : std::vector<int64_t>{}, loss_type, call.input);
  const Tensor state = empty(overwrites ? std::vector<int64_t>{0} : state_sizes, arithmetic, call.input);
  const Tensor total = empty({}, ScalarType::Double, call.input);
  std::vector<Tensor> outputs{loss, state, total};
  if (stats) {
    for (int i = 0; i < 3; i++) outputs.push_back(empty(call.batch, arithmetic, call.input));
    outputs.push_back(empty(call.batch, ScalarType::Long, call.input));
  }

  const JointLayout joint(call.input, call.dim,
                          {&call.input, operand(grad), call.probabilities ? &call.target : nullptr});
  CrossEntropy<T> k = kernel_call<T>(call, joint.layout(), weights, state);
  k.forward = true;
  if (overwrites) k.state = nullptr;
  k.loss_type = dtype_of(loss_type, call.op, "dtype");
  if (call.reduction == kNone) k.loss = loss.data_ptr();
  k.stats = stats;
  if (stats) {
    k.lse = static_cast<T*>(outputs[3].data_ptr());
    k.nll = static_cast<T*>(outputs[4].data_ptr());
    k.entropy = static_cast<T*>(outputs[5].data_ptr());
    k.prediction = static_cast<int64_t*>(outputs[6].data_ptr());
  }
  const double one = 1;
  if (grad) {
    k.grad_logits = grad->data_ptr();
    k.grad_loss = {&one, DType::kFloat64, 0, precomputed_scale(call, total_weight)};
  }
  const double sum = run(k, joint);
  *static_cast<double*>(total.data_ptr()) = total_weight;
  if (call.reduction != kNone)
    set_value(loss.data_ptr(), k.loss_type, call.reduction == kMean ? sum / total_weight : sum);
  return outputs;
}

std::vector<Tensor> dispatch_forward(const Call& call, std::optional<ScalarType> dtype, bool stats,
                                     const std::optional<Tensor>& grad, bool overwrites = false) {
  const ScalarType loss_type = dtype.value_or(call.input.scalar_type());
  const ScalarType arithmetic = arithmetic_type({call.input_type, dtype_of(loss_type, call.op, "dtype"),
                                                 call.probabilities ? call.target_type : call.input_type});
  return arithmetic == ScalarType::Double ? forward<double>(call, arithmetic, loss_type, stats, grad, overwrites)
                                          : forward<float>(call, arithmetic, loss_type, stats, grad, overwrites);
}

std::vector<Tensor> cross_entropy(Tensor input, Tensor target, std::optional<Tensor> weight, int64_t dim,
                                  int64_t reduction, int64_t ignore_index, double label_smoothing,
                                  std::optional<ScalarType> dtype, double z_loss, std::optional<double> softcap,
                                  double logit_scale, bool stats, bool precompute_grad) {
  const Call call = checked_call("cross_entropy", input, target, weight, dim, reduction, ignore_index, label_smoothing,
                                 z_loss, softcap, logit_scale);
  std::optional<Tensor> grad;
  if (precompute_grad) grad = softmax_ext::empty_like(input, input.scalar_type());
  std::vector<Tensor> outputs = dispatch_forward(call, dtype, stats, grad);
  if (grad) outputs.push_back(*grad);
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_(
    Tensor input, Tensor target, std::optional<Tensor> weight, int64_t dim, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::optional<ScalarType> dtype, double z_loss, std::optional<double> softcap,
    double logit_scale, bool stats) {
  const Call call = checked_call("cross_entropy_", input, target, weight, dim, reduction, ignore_index, label_smoothing,
                                 z_loss, softcap, logit_scale);
  const std::vector<Tensor> r = dispatch_forward(call, dtype, stats, input, true);
  const auto stat = [&](size_t i) { return stats ? r[i] : empty({0}, input.scalar_type(), input); };
  return {r[0], r[1], r[2], stat(3), stat(4), stat(5), stat(6)};
}

// An upstream gradient: one value for every row, or one for each. `holder` keeps a contiguous copy alive.
RowValues upstream(const Call& call, const std::optional<Tensor>& grad, bool per_row, double scale,
                   const char* argument, Tensor& holder) {
  if (!grad) return {};
  check_cpu(*grad, call.op, argument);
  STD_TORCH_CHECK(per_row ? sizes_of(*grad) == call.batch : grad->numel() == 1, call.op, ": ", argument,
                  " must have one value", per_row ? " for each row." : ".");
  holder = as_contiguous(*grad);
  return {holder.const_data_ptr(), dtype_of(*grad, call.op, argument), per_row ? 1 : 0, scale};
}

struct Upstream {
  std::optional<Tensor> loss, lse, nll, entropy;
};

template <typename T>
void backward(const Call& call, const Upstream& grads, const Tensor& state, const Tensor& total_weight,
              const std::optional<Tensor>& entropy, const std::optional<Tensor>& grad_input,
              const std::optional<Tensor>& grad_target) {
  const Weights<T> weights(call);
  scan_targets(call, weights);
  const JointLayout joint(
      call.input, call.dim,
      {&call.input, operand(grad_input), call.probabilities ? &call.target : nullptr, operand(grad_target)});
  CrossEntropy<T> k = kernel_call<T>(call, joint.layout(), weights, state);
  Tensor holders[4];
  const double scale = call.reduction == kMean ? 1 / *static_cast<const double*>(total_weight.const_data_ptr()) : 1.0;
  k.grad_loss = upstream(call, grads.loss, call.reduction == kNone, scale, "grad_loss", holders[0]);
  k.grad_lse = upstream(call, grads.lse, true, 1, "grad_lse", holders[1]);
  k.grad_nll = upstream(call, grads.nll, true, 1, "grad_nll", holders[2]);
  k.grad_entropy = upstream(call, grads.entropy, true, 1, "grad_entropy", holders[3]);
  if (grads.entropy) {
    STD_TORCH_CHECK(entropy && entropy->is_contiguous() && sizes_of(*entropy) == call.batch &&
                        entropy->scalar_type() == state.scalar_type(),
                    call.op, ": a gradient of the entropy needs the entropy itself.");
    k.entropy = static_cast<T*>(entropy->data_ptr());
  }
  if (grad_input) k.grad_logits = grad_input->data_ptr();
  if (grad_target) k.grad_probabilities = grad_target->data_ptr();
  run(k, joint);
}

void dispatch_backward(const Call& call, const Upstream& grads, const Tensor& state, const Tensor& total_weight,
                       const std::optional<Tensor>& entropy, const std::optional<Tensor>& grad_input,
                       const std::optional<Tensor>& grad_target) {
  std::vector<int64_t> state_sizes = call.batch;
  state_sizes.insert(state_sizes.begin(), call.probabilities ? 4 : 2);
  check_cpu(state, call.op, "state");
  check_cpu(total_weight, call.op, "total_weight");
  const bool is_double = state.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(sizes_of(state) == state_sizes && state.is_contiguous() &&
                      (is_double || state.scalar_type() == ScalarType::Float),
                  call.op, ": state must come from cross_entropy.");
  STD_TORCH_CHECK(total_weight.numel() == 1 && total_weight.scalar_type() == ScalarType::Double, call.op,
                  ": total_weight must come from cross_entropy.");
  if (is_double)
    backward<double>(call, grads, state, total_weight, entropy, grad_input, grad_target);
  else
    backward<float>(call, grads, state, total_weight, entropy, grad_input, grad_target);
}

std::tuple<Tensor, Tensor> cross_entropy_backward(std::optional<Tensor> grad_loss, std::optional<Tensor> grad_lse,
                                                  std::optional<Tensor> grad_nll, std::optional<Tensor> grad_entropy,
                                                  Tensor input, Tensor target, std::optional<Tensor> weight,
                                                  Tensor state, Tensor total_weight, std::optional<Tensor> entropy,
                                                  int64_t dim, int64_t reduction, int64_t ignore_index,
                                                  double label_smoothing, double z_loss, std::optional<double> softcap,
                                                  double logit_scale, bool needs_input, bool needs_target) {
  const Call call = checked_call("cross_entropy_backward", input, target, weight, dim, reduction, ignore_index,
                                 label_smoothing, z_loss, softcap, logit_scale);
  STD_TORCH_CHECK(call.probabilities || !needs_target, call.op, ": class indices have no gradient.");
  std::optional<Tensor> grad_input, grad_target;
  if (needs_input) grad_input = softmax_ext::empty_like(input, input.scalar_type());
  if (needs_target) grad_target = softmax_ext::empty_like(target, target.scalar_type());
  if (needs_input || needs_target)
    dispatch_backward(call, {grad_loss, grad_lse, grad_nll, grad_entropy}, state, total_weight, entropy, grad_input,
                      grad_target);
  const auto or_empty = [](const std::optional<Tensor>& grad, const Tensor& like) {
    return grad ? *grad : empty({0}, like.scalar_type(), like);
  };
  return {or_empty(grad_input, input), or_empty(grad_target, target)};
}

void cross_entropy_backward_(std::optional<Tensor> grad_loss, std::optional<Tensor> grad_lse,
                             std::optional<Tensor> grad_nll, std::optional<Tensor> grad_entropy, Tensor input,
                             Tensor target, std::optional<Tensor> weight, Tensor state, Tensor total_weight,
                             std::optional<Tensor> entropy, int64_t dim, int64_t reduction, int64_t ignore_index,
                             double label_smoothing, double z_loss, std::optional<double> softcap, double logit_scale) {
  const Call call = checked_call("cross_entropy_backward_", input, target, weight, dim, reduction, ignore_index,
                                 label_smoothing, z_loss, softcap, logit_scale);
  dispatch_backward(call, {grad_loss, grad_lse, grad_nll, grad_entropy}, state, total_weight, entropy, input,
                    std::nullopt);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softmax_ext, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_traced", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&cross_entropy_backward_));
}

}  // namespace softmax_ext
