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

inline cuda::Upstream upstream(const Factor& factor, const double* divisor = nullptr) {
  return {factor.values.has_value(), factor.data(), factor.type, factor.stride, divisor};
}

}  // namespace softmax_ext
