// Stands in for CUDA's header of this name: float16, rounded to nearest even. See cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
typedef __half half;
typedef __half2 half2;

inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  // As a float the exponent is 112 too small, subnormal numbers included: a product with 2^112 is exact.
  const float magnitude =
      rest >= 0x7c00 ? __uint_as_float(0x7f800000u | rest << 13) : __uint_as_float(rest << 13) * 0x1p112f;
  return __uint_as_float(sign | __float_as_uint(magnitude));
}
inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned result;
  if (magnitude > 0x7f800000u) {
    return {0x7fff};
  } else if (magnitude >= 0x477ff000u) {  // 65520 rounds to infinity
    result = 0x7c00;
  } else if (magnitude >= 0x38800000u) {
    result = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  } else {  // subnormal: the sum with 1/2 rounds to multiples of 2^-24
    result = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
  }
  return {static_cast<unsigned short>(sign | result)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }

inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__float2half_rn(v.x), __float2half_rn(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

// The larger of each two; a NaN gives way to a number.
inline __half2 __hmax2(__half2 a, __half2 b) {
  const auto larger = [](__half x, __half y) { return __float2half(fmaxf(__half2float(x), __half2float(y))); };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
