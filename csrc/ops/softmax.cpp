// The softmax operators and the scaling of rows: checks and allocation.
#include "boxed.h"
#include "operators.h"

namespace softmax_ext {
namespace {

Tensor softmax(Tensor input, int64_t dim, bool log, std::optional<ScalarType> dtype) {
  dtype_of(input, "softmax", "input");
  const ScalarType output_type = dtype.value_or(input.scalar_type());
  dtype_of(output_type, "softmax", "dtype");
  dim = wrap_dim(input, dim, "softmax");
  const Tensor output = softmax_ext::empty_like(input, output_type);
  device::softmax(input, output, dim, log);
  return output;
}

Tensor softmax_backward(Tensor grad_output, Tensor output, int64_t dim, bool log, ScalarType dtype) {
  const char* op = "softmax_backward";
  dtype_of(output, op, "output");
  dtype_of(dtype, op, "dtype");
  check_device(grad_output, output, op, "grad_output");
  check_same_sizes(output, grad_output, op, "grad_output");
  STD_TORCH_CHECK(grad_output.scalar_type() == output.scalar_type(), op, ": grad_output must have the output's dtype.");
  dim = wrap_dim(output, dim, op);
  const Tensor grad_input = softmax_ext::empty_like(output, dtype);
  device::softmax_backward(grad_output, output, grad_input, dim, log);
  return grad_input;
}

// tensor *= factor, one value for all or one for each row of classes; nothing is touched where the one value is 1.
void scale_rows_(Tensor tensor, Tensor factor, int64_t dim) {
  const char* op = "scale_rows_";
  dtype_of(tensor, op, "tensor");
  dim = wrap_dim(tensor, dim, op);
  check_device(factor, tensor, op, "factor");
  const bool per_row = factor.numel() != 1 || sizes_of(factor) == batch_sizes(tensor, dim);
  STD_TORCH_CHECK(!per_row || sizes_of(factor) == batch_sizes(tensor, dim), op,
                  ": factor must be a single value or have one for each row.");
  const Tensor values = as_contiguous(factor);
  device::scale_rows(tensor, dim, row_values(values, dtype_of(factor, op, "factor"), per_row));
}

}  // namespace

void add_softmax(torch::stable::detail::StableLibrary& library) {
  library.impl("softmax", Boxed<&softmax>::call);
  library.impl("softmax_backward", Boxed<&softmax_backward>::call);
  library.impl("scale_rows_", Boxed<&scale_rows_>::call);
}

}  // namespace softmax_ext
