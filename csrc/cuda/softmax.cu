// Launches softmax, log-softmax and their backward: which types.
#include "dispatch.cuh"
#include "softmax.cuh"

namespace softmax_ext {
namespace cuda {

// Not without a name: nvcc would name it after the folder, and the library would have other bytes in another.
inline namespace softmax_cu {

template <typename S, typename O>
void launch_forward(const Softmax& call, Stream stream) {
  SoftmaxOp<S, O> op{};
  op.layout = device_layout(call.layout);
  op.log = call.log;
  op.from = call.input;
  op.to = call.output;
  launch_op("softmax", op, call.layout, false, stream);
}

template <typename S, typename O>
void launch_backward(const SoftmaxBackward& call, Stream stream) {
  SoftmaxBackwardOp<S, O> op{};
  op.layout = device_layout(call.layout);
  op.log = call.log;
  op.saved = call.output;
  op.gradient = call.grad_output;
  op.to = call.grad_input;
  launch_op("softmax_backward", op, call.layout, false, stream);
}

template <typename S>
void launch_forward_from(const Softmax& call, Stream stream) {
  if constexpr (sizeof(S) == 2)
    if (call.output_type == DType::kFloat32) return launch_forward<S, float>(call, stream);
  launch_forward<S, S>(call, stream);
}

template <typename O>
void launch_backward_to(const SoftmaxBackward& call, Stream stream) {
  if constexpr (sizeof(O) == 2)
    if (call.output_type == DType::kFloat32) return launch_backward<float, O>(call, stream);
  launch_backward<O, O>(call, stream);
}

}  // namespace softmax_cu

void softmax(const Softmax& call, Stream stream) {
  switch (call.input_type) {
    case DType::kFloat64: return launch_forward_from<double>(call, stream);
    case DType::kFloat32: return launch_forward_from<float>(call, stream);
    case DType::kBFloat16: return launch_forward_from<__nv_bfloat16>(call, stream);
    case DType::kFloat16: return launch_forward_from<__half>(call, stream);
  }
}

void softmax_backward(const SoftmaxBackward& call, Stream stream) {
  switch (call.grad_input_type) {
    case DType::kFloat64: return launch_backward_to<double>(call, stream);
    case DType::kFloat32: return launch_backward_to<float>(call, stream);
    case DType::kBFloat16: return launch_backward_to<__nv_bfloat16>(call, stream);
    case DType::kFloat16: return launch_backward_to<__half>(call, stream);
  }
}

}  // namespace cuda
}  // namespace softmax_ext
