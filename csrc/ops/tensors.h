// From tensors to what the kernels take: dtypes, allocation, and the joint layout of a call's operands.
// Everything here speaks torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../params.h"

namespace softmax_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float64, float32, bfloat16 or float16; anything else is an error that names `op` and `argument`.
DType dtype_of(const Tensor& tensor, const char* op, const char* argument);
DType dtype_of(ScalarType type, const char* op, const char* argument);

// double if any of the operands is.
ScalarType arithmetic_type(std::initializer_list<DType> types);

// The values of a contiguous tensor: one for each row, or one for all.
inline RowValues row_values(const Tensor& values, DType dtype, bool per_row) {
  return {values.const_data_ptr(), dtype, per_row ? 1 : 0, nullptr, true};
}

// Uninitialised and contiguous, on the device of `like`.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like);

// Uninitialised, of the shape and, where that is dense, the strides of `tensor`.
Tensor empty_like(const Tensor& tensor, ScalarType type);

// Uninitialised, from torch's allocator for the device of `like`.
Tensor torch_empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type,
                           const Tensor& like);

// Bytes of an element of the types that results and class indices have.
int64_t size_of(ScalarType type);

namespace device {

// What the device makes of torch_empty_strided: where the two functions above get their memory.
Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type,
                     const Tensor& like);

}  // namespace device

Tensor as_contiguous(const Tensor& tensor);

// The tensor itself where it has the type already, a copy otherwise.
inline Tensor converted(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

std::vector<int64_t> sizes_of(const Tensor& tensor);

// Sizes without dimension `dim`.
std::vector<int64_t> batch_sizes(const Tensor& tensor, int64_t dim);

int64_t product(const std::vector<int64_t>& sizes);

// A dimension counted from the front, checked against the rank.
int64_t wrap_dim(const Tensor& tensor, int64_t dim, const char* op);

void check_same_sizes(const Tensor& a, const Tensor& b, const char* op, const char* argument);
void check_device(const Tensor& tensor, const Tensor& input, const char* op, const char* argument);

// What a device's kernels take.
struct LayoutRule {
  int64_t small_classes;  // rows of at most this many go into the columns layout, whatever their strides
  int max_outer_dims;
};

// The layout shared by up to four tensors of one shape (null: slot unused), with its dimensions' storage.
class JointLayout {
 public:
  JointLayout(const Tensor& shape, int64_t dim, const std::vector<const Tensor*>& operands, const LayoutRule& rule);
  JointLayout(const JointLayout&) = delete;  // layout() points into dims_
  JointLayout& operator=(const JointLayout&) = delete;

  const Layout& layout() const { return layout_; }
  bool empty() const { return layout_.outer == 0 || layout_.classes == 0; }

 private:
  Layout layout_{};
  std::vector<OuterDim> dims_;
};

}  // namespace softmax_ext
