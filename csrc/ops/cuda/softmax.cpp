// The softmax operators on CUDA tensors, queued on the current stream.
//
// The kernels are compiled for equal types and for a half type beside float32, in which it is computed. Other pairs,
// which are rare, go through a copy in the type of the arithmetic.
#include "../kernel_params.h"
#include "cuda_stream.h"
#include "operands.h"

namespace softmax_ext {
namespace {

bool is_half(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

// Whether there are kernels for logits (and their gradient) of one type and probabilities (and theirs) of another.
bool has_kernel(ScalarType logits, ScalarType probabilities) {
  return logits == probabilities || (is_half(logits) && probabilities == ScalarType::Float);
}

// The types to compute in, for operands of these.
struct Types {
  ScalarType logits, probabilities;

  Types(ScalarType logits_type, ScalarType probabilities_type)
      : logits(logits_type), probabilities(probabilities_type) {
    if (has_kernel(logits, probabilities)) return;
    const bool is_double = logits == ScalarType::Double || probabilities == ScalarType::Double;
    probabilities = is_double ? ScalarType::Double : ScalarType::Float;
    if (!has_kernel(logits, probabilities)) logits = probabilities;
  }
};

// An output that a kernel writes in a type of its choice; `finish` converts.
struct Output {
  Tensor result, written;

  Output(const Tensor& tensor, ScalarType type)
      : result(tensor), written(tensor.scalar_type() == type ? tensor : empty_like(tensor, type)) {}

  void finish() {
    if (written.get() != result.get()) torch::stable::copy_(result, written);
  }
};

}  // namespace

void device::softmax(const Tensor& input, const Tensor& output, int64_t dim, bool log) {
  const Types types(input.scalar_type(), output.scalar_type());
  const Tensor source = converted(input, types.logits);
  Output out(output, types.probabilities);
  const JointLayout joint(source, dim, {&source, &out.written}, kCudaLayoutRule);
  if (joint.empty()) return;
  const OnDevice on(input);
  cuda::softmax(softmax_params(source, out.written, log), joint.layout(), on.stream());
  out.finish();
}

void device::softmax_backward(const Tensor& grad_output, const Tensor& output, const Tensor& grad_input, int64_t dim,
                              bool log) {
  const Types types(grad_input.scalar_type(), output.scalar_type());
  const Tensor grad = converted(grad_output, types.probabilities), saved = converted(output, types.probabilities);
  Output out(grad_input, types.logits);
  const JointLayout joint(saved, dim, {&out.written, &saved, &grad}, kCudaLayoutRule);
  if (joint.empty()) return;
  const OnDevice on(output);
  cuda::softmax_backward(softmax_backward_params(grad, saved, out.written, log), joint.layout(), on.stream());
  out.finish();
}

void device::scale_rows(const Tensor& tensor, int64_t dim, const RowValues& factor) {
  const JointLayout joint(tensor, dim, {&tensor}, kCudaLayoutRule);
  if (joint.empty()) return;
  const OnDevice on(tensor);
  cuda::scale_rows(scale_rows_params(tensor, factor), joint.layout(), on.stream());
}

}  // namespace softmax_ext
