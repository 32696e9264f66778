// Where rows lie: a Layout as it travels with a kernel's arguments, and the place of one row in it.
#pragma once

#include <algorithm>

#include "numbers.cuh"

namespace softmax_ext {
namespace cuda {

// Rows have less than 2^31 classes, and a kernel less than 2^32 outer indices, so that these are divided in 32 bits.
struct DeviceLayout {
  int classes, outer_dims;
  int64_t inner, outer;
  OuterDim dims[kMaxOuterDims];
  int64_t class_stride[kOperands];
  int64_t inner_stride[kOperands];
};

inline DeviceLayout device_layout(const Layout& layout) {
  DeviceLayout copy{static_cast<int>(layout.classes), layout.outer_dims, layout.inner, layout.outer, {}, {}, {}};
  std::copy_n(layout.dims, layout.outer_dims, copy.dims);
  std::copy_n(layout.class_stride, kOperands, copy.class_stride);
  std::copy_n(layout.inner_stride, kOperands, copy.inner_stride);
  return copy;
}

// The offset of class 0 in each operand, and the number of the row.
struct Position {
  int64_t offset[kOperands];
};

DEVICE Position locate(const DeviceLayout& layout, unsigned outer, int64_t inner) {
  Position at;
#pragma unroll
  for (int i = 0; i < kOperands; i++) at.offset[i] = inner * layout.inner_stride[i];
#pragma unroll 1
  for (int d = layout.outer_dims - 1; d >= 0; d--) {
    const unsigned size = static_cast<unsigned>(layout.dims[d].size), rest = d == 0 ? 0 : outer / size;
    const int64_t index = outer - rest * size;
    outer = rest;
#pragma unroll
    for (int i = 0; i < kOperands; i++) at.offset[i] += index * layout.dims[d].stride[i];
  }
  return at;
}

// n rows further along the inner dimension.
DEVICE Position advanced(const DeviceLayout& layout, Position at, int n) {
#pragma unroll
  for (int i = 0; i < kOperands; i++) at.offset[i] += n * layout.inner_stride[i];
  return at;
}

}  // namespace cuda
}  // namespace softmax_ext
