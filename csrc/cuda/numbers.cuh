// The numbers of the kernels: the types of elements, their conversions, and arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "../row_math.h"
#include "kernels.h"

// Nearly every function of the kernels is so.
#define DEVICE __device__ __forceinline__

namespace softmax_ext {
namespace cuda {

// ---- element types -----------------------------------------------------------------------------------------------

DEVICE double widen(double x) { return x; }
DEVICE float widen(float x) { return x; }
DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
DEVICE float widen(__half x) { return __half2float(x); }

template <typename T, typename E>
DEVICE void narrow(T x, E& y) {
  y = static_cast<E>(x);
}
template <typename T>
DEVICE void narrow(T x, __nv_bfloat16& y) {
  y = __float2bfloat16(static_cast<float>(x));
}
template <typename T>
DEVICE void narrow(T x, __half& y) {
  y = __float2half_rn(static_cast<float>(x));
}

// ---- two elements of a half type in a register ---------------------------------------------------------------------

template <typename E>
constexpr bool kIsBFloat16 = std::is_same<E, __nv_bfloat16>::value;

// Element i of a pair.
template <typename E>
DEVICE float widen_half(unsigned pair, int i) {
  if constexpr (kIsBFloat16<E>) return __uint_as_float(i == 0 ? pair << 16 : pair & 0xffff0000);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(i == 0 ? pair : pair >> 16)));
}
template <typename E>
DEVICE unsigned narrow_pair(float x, float y) {
  unsigned bits;
  if constexpr (kIsBFloat16<E>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __half2 pair = __floats2half2_rn(x, y);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}
// Of each two the larger one; a NaN gives way to a number.
template <typename E>
DEVICE unsigned larger_pair(unsigned x, unsigned y) {
  std::conditional_t<kIsBFloat16<E>, __nv_bfloat162, __half2> a, b;
  memcpy(&a, &x, sizeof a);
  memcpy(&b, &y, sizeof b);
  a = __hmax2(a, b);
  memcpy(&x, &a, sizeof a);
  return x;
}

// The half types of visit_dtype().
struct Halves {
  using BFloat16 = __nv_bfloat16;
  using Float16 = __half;
};

// One element of an array whose type is known at run time.
template <typename T>
DEVICE T load_value(const void* data, DType type, int64_t i) {
  return visit_dtype<Halves>(type, [=](auto element) {
    using E = typename decltype(element)::Type;
    return static_cast<T>(widen(static_cast<const E*>(data)[i]));
  });
}

template <typename T>
DEVICE void store_value(T value, void* data, DType type, int64_t i) {
  visit_dtype<Halves>(type, [=](auto element) {
    using E = typename decltype(element)::Type;
    narrow(value, static_cast<E*>(data)[i]);
  });
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

template <typename T>
DEVICE T not_a_number() {
  return static_cast<T>(CUDART_NAN_F);
}

// The smallest finite number. A maximum begins with it, so that -inf less a maximum is -inf, and its exp 0.
template <typename T>
DEVICE T lowest() {
  return sizeof(T) == 8 ? static_cast<T>(-DBL_MAX) : static_cast<T>(-FLT_MAX);
}

constexpr float kLog2OfE = 1.44269504f;

// 2^x, of one instruction.
DEVICE float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x));
  return e;
#else
  const float e = exp2f(x);
  return e < FLT_MIN ? 0.0f : e;
#endif
}

// exp(d) for d <= 0; exp(0) is 1. In float it is two instructions, whose relative error is at most 2 + |d| times 2^-23;
// below 2^-126 it is 0.
DEVICE double exp_nonpositive(double d) { return exp(d); }
DEVICE float exp_nonpositive(float d) { return power_of_two(d * kLog2OfE); }

// Rounded, whatever is done with it: not contracted to a multiply-add.
DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
DEVICE double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// Within 2 ULP for a divisor between 2^-126 and 2^126.
DEVICE float divide(float a, float b) { return __fdividef(a, b); }
DEVICE double divide(double a, double b) { return a / b; }

// Ignores a NaN.
template <typename T>
DEVICE T larger(T a, T b) {
  return fmax(a, b);
}

// 0 where b is 0, b * d elsewhere: a class without target mass contributes nothing even where its logit is -inf.
template <typename T>
DEVICE T multiply_or_zero(T b, T d) {
  return b == 0 ? T(0) : b * d;
}

// The same where d too may be 0 beside an infinite b: d is relative to a maximum that may still grow.
template <typename T>
DEVICE T product_or_zero(T b, T d) {
  return b == 0 || d == 0 ? T(0) : b * d;
}

// The functions of row_math.h.
template <typename T>
struct ScalarMath {
  using Value = T;

  DEVICE static T select(bool condition, T yes, T no) { return condition ? yes : no; }
  DEVICE static T multiply_or_zero(T b, T d) { return cuda::multiply_or_zero(b, d); }
  DEVICE static T multiply_add(T a, T b, T c) { return fma(a, b, c); }
  DEVICE static T multiply_subtract(T a, T b, T c) { return fma(a, b, -c); }
  DEVICE static T divide(T a, T b) { return cuda::divide(a, b); }
  DEVICE static T abs(T x) { return ::fabs(x); }
  DEVICE static T exp(T x) { return ::exp(x); }
  DEVICE static T log1p(T x) { return ::log1p(x); }
  DEVICE static T tanh(T x) { return ::tanh(x); }
};

template <typename T>
DEVICE T row_value(const RowValues& values, int64_t row) {
  if (!values.given) return 0;
  const T value = values.data ? load_value<T>(values.data, values.dtype, row * values.stride) : T(1);
  return values.divisor ? divide(value, static_cast<T>(*values.divisor)) : value;
}

}  // namespace cuda
}  // namespace softmax_ext
