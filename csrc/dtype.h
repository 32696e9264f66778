// The types of elements, and the way from a type that is known at run time to one that the compiler knows.
#pragma once

#include <cstdint>

#include "inline.h"

namespace softmax_ext {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

SOFTMAX_EXT_INLINE constexpr int64_t size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

// Of the arithmetic's own type, double or float.
template <typename T>
constexpr DType kArithmeticType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// What a visitor is called with; typename decltype(element)::Type is the type.
template <typename E>
struct Element {
  using Type = E;
};

// visit(Element<E>()) for the type E of the elements. Halves::BFloat16 and Halves::Float16 are the half types.
SOFTMAX_EXT_CALLS_EITHER
template <typename Halves, typename Visit>
SOFTMAX_EXT_INLINE decltype(auto) visit_dtype(DType type, const Visit& visit) {
  switch (type) {
    case DType::kFloat64: return visit(Element<double>());
    case DType::kFloat32: return visit(Element<float>());
    case DType::kBFloat16: return visit(Element<typename Halves::BFloat16>());
    default: return visit(Element<typename Halves::Float16>());
  }
}

}  // namespace softmax_ext
