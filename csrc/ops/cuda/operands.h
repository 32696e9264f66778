// Operands as the CUDA kernels take them.
#pragma once

#include "../../cuda/kernels.h"
#include "../operators.h"

namespace softmax_ext {

constexpr LayoutRule kCudaLayoutRule{cuda::kSmallClasses, cuda::kMaxOuterDims};

}  // namespace softmax_ext
