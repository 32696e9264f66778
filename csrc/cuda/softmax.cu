// Launches softmax, log-softmax and their backward: which types.
#include "dispatch.cuh"
#include "softmax.cuh"

namespace softmax_ext {
namespace cuda {

// Not without a name: nvcc would name it after the folder, and the library would have other bytes in another.
inline namespace softmax_cu {

template <typename S, typename O>
void launch_forward(const SoftmaxParams& params, const Layout& layout, Stream stream) {
  SoftmaxOp<S, O> op{};
  op.layout = device_layout(layout);
  op.params = params;
  launch_op("softmax", op, layout, true, nullptr, stream);
}

template <typename S, typename O>
void launch_backward(const SoftmaxBackwardParams& params, const Layout& layout, Stream stream) {
  SoftmaxBackwardOp<S, O> op{};
  op.layout = device_layout(layout);
  op.params = params;
  launch_op("softmax_backward", op, layout, true, nullptr, stream);
}

template <typename S>
void launch_forward_from(const SoftmaxParams& params, const Layout& layout, Stream stream) {
  if constexpr (sizeof(S) == 2)
    if (params.output_type == DType::kFloat32) return launch_forward<S, float>(params, layout, stream);
  launch_forward<S, S>(params, layout, stream);
}

template <typename O>
void launch_backward_to(const SoftmaxBackwardParams& params, const Layout& layout, Stream stream) {
  if constexpr (sizeof(O) == 2)
    if (params.output_type == DType::kFloat32) return launch_backward<float, O>(params, layout, stream);
  launch_backward<O, O>(params, layout, stream);
}

}  // namespace softmax_cu

void softmax(const SoftmaxParams& params, const Layout& layout, Stream stream) {
  visit_dtype<Halves>(params.input_type, [&](auto element) {
    launch_forward_from<typename decltype(element)::Type>(params, layout, stream);
  });
}

void softmax_backward(const SoftmaxBackwardParams& params, const Layout& layout, Stream stream) {
  visit_dtype<Halves>(params.grad_input_type, [&](auto element) {
    launch_backward_to<typename decltype(element)::Type>(params, layout, stream);
  });
}

}  // namespace cuda
}  // namespace softmax_ext
