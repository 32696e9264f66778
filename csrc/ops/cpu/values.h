// Single values in CPU memory, of any of the four types.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "../../dtype.h"

namespace softmax_ext {

// The half types of visit_dtype().
struct HeaderHalves {
  using BFloat16 = torch::headeronly::BFloat16;
  using Float16 = torch::headeronly::Half;
};

// One element of a contiguous array.
inline double value_at(const void* data, DType type, int64_t i) {
  return visit_dtype<HeaderHalves>(type, [=](auto element) -> double {
    using E = typename decltype(element)::Type;
    using Wide = std::conditional_t<std::is_same_v<E, double>, double, float>;  // a half passes through float
    return static_cast<Wide>(static_cast<const E*>(data)[i]);
  });
}

inline void set_value(void* data, DType type, double value) {
  visit_dtype<HeaderHalves>(type, [=](auto element) {
    using E = typename decltype(element)::Type;
    using Wide = std::conditional_t<std::is_same_v<E, double>, double, float>;
    *static_cast<E*>(data) = static_cast<Wide>(value);
  });
}

}  // namespace softmax_ext
