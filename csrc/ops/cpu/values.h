// Single values in CPU memory, of any of the four types.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../../cpu/kernels.h"
#include "../operators.h"

namespace softmax_ext {

// One element of a contiguous array.
inline double value_at(const void* data, DType type, int64_t i) {
  switch (type) {
    case DType::kFloat64: return static_cast<const double*>(data)[i];
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kBFloat16: return static_cast<const torch::headeronly::BFloat16*>(data)[i];
    default: return static_cast<const torch::headeronly::Half*>(data)[i];
  }
}

inline void set_value(void* data, DType type, double value) {
  switch (type) {
    case DType::kFloat64: *static_cast<double*>(data) = value; break;
    case DType::kFloat32: *static_cast<float*>(data) = static_cast<float>(value); break;
    case DType::kBFloat16: *static_cast<torch::headeronly::BFloat16*>(data) = static_cast<float>(value); break;
    default: *static_cast<torch::headeronly::Half*>(data) = static_cast<float>(value); break;
  }
}

inline RowValues row_values(const Factor& factor, double scale = 1) {
  return {factor.data(), factor.type, factor.stride, scale};
}

}  // namespace softmax_ext
