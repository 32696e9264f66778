// Launches cross entropy: which types, and whether the plain kernels do.
#include "cross_entropy.cuh"
#include "dispatch.cuh"

namespace softmax_ext {
namespace cuda {

// Not without a name: nvcc would name it after the folder, and the library would have other bytes in another.
inline namespace cross_entropy_cu {

// Whether the sum of exponentials is all that a row needs of its classes.
template <typename T>
bool needs_exponentials_alone(const CrossEntropyParams<T>& p) {
  const bool smoothing = p.options.label_smoothing != 0 && (p.forward || p.weight);
  return !p.has_probabilities && !p.stats && !p.grad_entropy.given && !smoothing &&
         LogitTransform(p.options).is_identity();
}

template <typename S, typename T, bool kGeneral>
void launch_as(const CrossEntropyParams<T>& params, const Layout& layout, Stream stream) {
  CrossEntropyOp<S, T, kGeneral> op;
  static_cast<CrossEntropyParams<T>&>(op) = params;
  op.layout = device_layout(layout);
  op.reduces = params.forward;
  op.writes = params.grad_logits;
  op.writes_second = params.grad_probabilities;
  op.transform = LogitTransform(params.options);
  op.share = static_cast<T>(params.options.label_smoothing / static_cast<double>(layout.classes));
  launch_op(kGeneral ? "cross_entropy with options" : "cross_entropy", op, layout, params.has_probabilities, stream);
}

// Arithmetic in double is general alone: what it is for is not speed.
template <typename S, typename T>
void launch_typed(const CrossEntropyParams<T>& params, const Layout& layout, Stream stream) {
  if constexpr (sizeof(T) == 8)
    launch_as<S, T, true>(params, layout, stream);
  else if constexpr (sizeof(S) == 8)
    throw std::logic_error("cross_entropy: float64 logits need arithmetic in double");
  else if (needs_exponentials_alone(params))
    launch_as<S, T, false>(params, layout, stream);
  else
    launch_as<S, T, true>(params, layout, stream);
}

}  // namespace cross_entropy_cu

template <typename T>
void cross_entropy(const CrossEntropyParams<T>& params, const Layout& layout, Stream stream) {
  visit_dtype<Halves>(params.logits_type,
                      [&](auto element) { launch_typed<typename decltype(element)::Type>(params, layout, stream); });
}
template void cross_entropy(const CrossEntropyParams<float>&, const Layout&, Stream);
template void cross_entropy(const CrossEntropyParams<double>&, const Layout&, Stream);

std::string kernel_for(int64_t classes, DType type, bool has_probabilities) {
  const int bytes = static_cast<int>(size_of(type));
  using Plain = CrossEntropyOp<float, float, false>;
  const int chunks = has_probabilities || bytes == 8 ? 0 : Plain::kRegisterChunks;
  const Choice choice = choose_for<Plain>(
      {classes > kSmallClasses ? LayoutKind::kRows : LayoutKind::kColumns, classes, bytes, chunks}, current_device());
  std::string name = name_of(choice.kernel);
  return choice.kernel == Kernel::kCluster ? name + " of " + std::to_string(choice.cluster) : name;
}

}  // namespace cuda
}  // namespace softmax_ext
