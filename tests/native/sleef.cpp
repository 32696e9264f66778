// The functions of Sleef that the x86-64 kernels take from libtorch_cpu, by libm, lane for lane: a program without
// libtorch runs on any CPU, and the sanitizers see all of it. Kernels for other CPUs call libm themselves.
#ifdef __x86_64__
#include <immintrin.h>

#include <cmath>

#define SOFTMAX_EXT_BY_LIBM(name, isa, Vector, Scalar, function)              \
  extern "C" __attribute__((target(isa))) Vector name(Vector x) {             \
    for (unsigned i = 0; i < sizeof(Vector) / sizeof(Scalar); i++) {          \
      Scalar lane = reinterpret_cast<const Scalar*>(&x)[i];                   \
      reinterpret_cast<Scalar*>(&x)[i] = static_cast<Scalar>(function(lane)); \
    }                                                                         \
    return x;                                                                 \
  }

SOFTMAX_EXT_BY_LIBM(Sleef_expd4_u10, "avx2", __m256d, double, std::exp)
SOFTMAX_EXT_BY_LIBM(Sleef_log1pd4_u10, "avx2", __m256d, double, std::log1p)
SOFTMAX_EXT_BY_LIBM(Sleef_tanhd4_u10, "avx2", __m256d, double, std::tanh)
SOFTMAX_EXT_BY_LIBM(Sleef_expd8_u10, "avx512f", __m512d, double, std::exp)
SOFTMAX_EXT_BY_LIBM(Sleef_log1pd8_u10, "avx512f", __m512d, double, std::log1p)
SOFTMAX_EXT_BY_LIBM(Sleef_tanhd8_u10, "avx512f", __m512d, double, std::tanh)
#endif
