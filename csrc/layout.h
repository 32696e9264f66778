// The two layouts that every input shape is brought to, and the strides of each operand in them. Plain data.
//
//   kRows      [outer, classes]          every operand has unit class stride; SIMD lanes run along the classes
//   kColumns   [outer, classes, inner]   any strides; SIMD lanes run along `inner`, one row of classes per lane
//
// `outer` is a list of dimensions (row-major order of iteration), so that a view of any rank is read where it lies.
// All strides are in elements of the operand and 64-bit.
#pragma once

#include <cstdint>

namespace softmax_ext {

// Tensors of the input's shape come first (at most four in one kernel); the last slot is the index of the row
// itself, in the row-major order of the batch, which addresses everything that has one value per row.
constexpr int kOperands = 5;
constexpr int kRow = kOperands - 1;

// Rows that share one unit of work in the columns layout.
constexpr int64_t kTile = 128;

struct OuterDim {
  int64_t size;
  int64_t stride[kOperands];
};

enum class LayoutKind : int32_t { kRows, kColumns };

struct Layout {
  LayoutKind kind;
  int64_t classes;
  int64_t inner;  // 1 in the rows layout
  int64_t outer;  // product of the outer sizes
  int outer_dims;
  const OuterDim* dims;  // [outer_dims]
  int64_t class_stride[kOperands];
  int64_t inner_stride[kOperands];
};

}  // namespace softmax_ext
