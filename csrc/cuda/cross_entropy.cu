// Launches cross entropy: which types, and whether the plain kernels do.
#include "cross_entropy.cuh"
#include "dispatch.cuh"

namespace softmax_ext {
namespace cuda {

// Not without a name: nvcc would name it after the folder, and the library would have other bytes in another.
inline namespace cross_entropy_cu {

template <typename T>
CrossEntropyArguments<T> arguments(const CrossEntropy& call) {
  CrossEntropyArguments<T> a{};
  a.layout = device_layout(call.layout);
  a.reduces = call.forward;
  a.writes = call.grad_logits;
  a.has_extra = call.grad_probabilities;
  a.logits = call.logits;
  a.grad_logits = call.grad_logits;
  a.index = call.index;
  a.index_u8 = call.index_u8;
  a.probabilities = call.probabilities;
  a.probabilities_type = call.probabilities_type;
  a.grad_probabilities = call.grad_probabilities;
  a.weight = static_cast<const T*>(call.weight);
  a.weight_sum = call.weight_sum;
  a.ignore_index = call.ignore_index;
  a.label_smoothing = static_cast<T>(call.label_smoothing);
  a.share = static_cast<T>(call.label_smoothing / static_cast<double>(call.layout.classes));
  a.z_loss = static_cast<T>(call.z_loss);
  a.softcap = static_cast<T>(call.softcap);
  a.inverse_softcap = static_cast<T>(1 / call.softcap);
  a.logit_scale = static_cast<T>(call.logit_scale);
  a.rows = call.rows;
  a.loss = call.loss;
  a.loss_type = call.loss_type;
  a.state = static_cast<T*>(call.state);
  a.has_probabilities = call.has_probabilities;
  a.stats = call.stats;
  a.lse = static_cast<T*>(call.lse);
  a.nll = static_cast<T*>(call.nll);
  a.entropy = static_cast<T*>(call.entropy);
  a.prediction = call.prediction;
  a.grad_loss = call.grad_loss;
  a.grad_lse = call.grad_lse;
  a.grad_nll = call.grad_nll;
  a.grad_entropy = call.grad_entropy;
  return a;
}

// Whether the sum of exponentials is all that a row needs of its classes.
bool is_plain(const CrossEntropy& call) {
  const bool smoothing = call.label_smoothing != 0 && (call.forward || call.weight);
  return !call.has_probabilities && !call.stats && !call.grad_entropy.given && !smoothing && call.softcap == 0 &&
         call.logit_scale == 1;
}

template <typename S, typename T, bool kGeneral>
void launch_as(const CrossEntropy& call, Stream stream) {
  CrossEntropyOp<S, T, kGeneral> op;
  static_cast<CrossEntropyArguments<T>&>(op) = arguments<T>(call);
  launch_op(kGeneral ? "cross_entropy with options" : "cross_entropy", op, call.layout, call.has_probabilities, stream);
}

// Arithmetic in double is general alone: what it is for is not speed.
template <typename S>
void launch_typed(const CrossEntropy& call, Stream stream) {
  if (sizeof(S) == 8 || call.is_double) return launch_as<S, double, true>(call, stream);
  if constexpr (sizeof(S) != 8) {
    if (is_plain(call)) return launch_as<S, float, false>(call, stream);
    launch_as<S, float, true>(call, stream);
  }
}

}  // namespace cross_entropy_cu

void cross_entropy(const CrossEntropy& call, Stream stream) {
  switch (call.logits_type) {
    case DType::kFloat64: return launch_typed<double>(call, stream);
    case DType::kFloat32: return launch_typed<float>(call, stream);
    case DType::kBFloat16: return launch_typed<__nv_bfloat16>(call, stream);
    case DType::kFloat16: return launch_typed<__half>(call, stream);
  }
}

std::string kernel_for(int64_t classes, DType type, bool has_probabilities) {
  const int bytes = type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
  using Plain = CrossEntropyOp<float, float, false>;
  const int kept = has_probabilities || bytes == 8 ? 0 : Plain::kKeptChunks;
  const Choice choice = choose_for<Plain>({classes > kSmallClasses, classes, bytes, kept}, current_device());
  std::string name = name_of(choice.kernel);
  return choice.kernel == Kernel::kCluster ? name + " of " + std::to_string(choice.cluster) : name;
}

}  // namespace cuda
}  // namespace softmax_ext
