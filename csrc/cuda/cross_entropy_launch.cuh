// Launches the kernels of one kind of cross entropy, for all types of logits. Each kind is compiled in a unit of its own,
// beside the others.
#pragma once

#include "cross_entropy.cuh"
#include "dispatch.cuh"

namespace softmax_ext {
namespace cuda {

template <Kind kKind, typename S, typename T>
void launch_typed(const CrossEntropyParams<T>& params, const Layout& layout, const LossSum* sum, Stream stream) {
  CrossEntropyOp<S, T, kKind> op{};
  static_cast<CrossEntropyParams<T>&>(op) = params;
  op.layout = device_layout(layout);
  op.reduces = params.forward;
  op.transform = LogitTransform(params.options);
  op.share = static_cast<T>(params.options.label_smoothing / static_cast<double>(layout.classes));
  const bool writes = params.grad_logits || params.grad_probabilities;
  const char* const name = kKind == Kind::kPlain ? "cross_entropy" : "cross_entropy with options";
  launch_op(name, op, layout, writes, sum, stream);
}

template <Kind kKind, typename T>
void launch_kind(const CrossEntropyParams<T>& params, const Layout& layout, const LossSum* sum, Stream stream) {
  visit_dtype<Halves>(params.logits_type, [&](auto element) {
    using S = typename decltype(element)::Type;
    if constexpr (sizeof(S) > sizeof(T))
      throw std::logic_error("cross_entropy: float64 logits need arithmetic in double");
    else
      launch_typed<kKind, S>(params, layout, sum, stream);
  });
}

}  // namespace cuda
}  // namespace softmax_ext
