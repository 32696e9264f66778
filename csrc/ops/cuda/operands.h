// Operands as the CUDA kernels take them.
#pragma once

#include "../../cuda/kernels.h"
#include "../operators.h"

namespace softmax_ext {

constexpr LayoutRule kCudaLayoutRule{cuda::kSmallClasses, cuda::kMaxOuterDims};

// The tensor itself where it has the type already, a copy otherwise.
inline Tensor converted(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

}  // namespace softmax_ext
