// Vectors, their exponential, and the movement of runs between memory of any dtype and L1 buffers of the
// arithmetic's type T. Included only by the units that are compiled once per instruction set; everything in it is
// internal to the unit, so that no code built for one set can be linked into another.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "../params.h"

#ifdef CPU_CAPABILITY_AVX512
#include <immintrin.h>
#endif

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
constexpr int64_t kLanes = Vec<T>::size();

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// An aligned buffer for a block of classes: 8 KiB, and a vector that may be read behind them. Two blocks and what is
// fetched ahead fit into L1.
constexpr int64_t kBlockBytes = 8192;
template <typename T>
constexpr int64_t kBlock = kBlockBytes / sizeof(T);
template <typename T>
struct alignas(64) BlockBuffer {
  T data[kBlock<T> + kLanes<T>];
};

// The most elements of a buffer that is to stay in cache: with 1 MiB of float it is still in L2 or close to it.
constexpr int64_t kCachedElements = 262144;

// Rows of up to this many classes that do not fill their vectors are copied whole, so that they are one block.
constexpr int64_t kCopiedClasses = 1024;

// How many of the `remaining` classes of a row the next block takes. Where a long row is used where it lies (`direct`),
// the last partial vector is a block of its own, so that only that is copied.
template <typename T>
inline int64_t next_block(int64_t remaining, int64_t classes, bool direct) {
  const int64_t n = remaining < kBlock<T> ? remaining : kBlock<T>;
  return direct && classes > kCopiedClasses && n > kLanes<T> ? n / kLanes<T> * kLanes<T> : n;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// What a loop is to fetch ahead: with its first vector the line at `at`, with the next the one `step` bytes further.
// Without it the memory would rest while a block is computed. An address beyond the tensor does no harm.
struct Ahead {
  const char* at;
  int64_t step;

  // Nothing: what is in cache already.
  static Ahead nothing(const void* in_cache) { return {static_cast<const char*>(in_cache), 0}; }

  void fetch(int64_t vector) const { __builtin_prefetch(at + vector * step); }
};

// exp(x) for x <= 0 within 1.01 ULP (tests/unit/test_kernels.py measures it over all of its range), 0 below the smallest
// normal number. Float only: double takes Sleef's, within 1 ULP too.
constexpr float kLog2E = 1.44269504088896341f, kSmallestExponent = -87.3365402f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // Cody and Waite

#ifdef CPU_CAPABILITY_AVX512
// x = m ln 2 + r with m a multiple of 1/16 and |r| <= ln 2 / 32: exp(x) = 2^floor(m) 2^(j/16) exp(r), j the low bits of
// 16 m. The sixteen powers are one register; exp(r) = 1 + r (1 + r (c + r / 6)), c close to 1/2 so that no value falls
// at a turn.
inline Vec<float> exp_nonpositive(const Vec<float>& x) {
  using at::vec::fmadd;
  const __m512 powers = _mm512_setr_ps(1.0f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                                       1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                       1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f);
  const Vec<float> round_to_sixteenth(786432.f);  // 1.5 * 2^19: the sum's lowest mantissa bit is worth 1/16
  const Vec<float> shifted = fmadd(x, Vec<float>(kLog2E), round_to_sixteenth);
  const Vec<float> m = shifted - round_to_sixteenth;
  const Vec<float> r = fmadd(m, Vec<float>(-kLn2Low), fmadd(m, Vec<float>(-kLn2High), x));
  const Vec<float> power = _mm512_permutexvar_ps(_mm512_castps_si512(shifted), powers);
  const Vec<float> slope = fmadd(fmadd(r, Vec<float>(1.6666667e-1f), Vec<float>(5.0002068e-1f)), r, Vec<float>(1.f));
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kSmallestExponent), _CMP_NLT_UQ);  // or NaN
  return _mm512_maskz_scalef_ps(normal, fmadd(power * r, slope, power), m);
}
#else
// x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) = 1 + r + r^2 P(r) with the minimax polynomial of degree 4 (relative
// error 3e-9).
inline Vec<float> exp_nonpositive(const Vec<float>& argument) {
  using at::vec::fmadd;
  const Vec<float> smallest(kSmallestExponent), round_to_integer(12582912.f);
  // Clamped so that the exponent does not overflow; a NaN stays one.
  const Vec<float> x = Vec<float>::blendv(argument, smallest, argument < smallest);
  const Vec<float> shifted =
      fmadd(x, Vec<float>(kLog2E), round_to_integer);  // + 1.5 * 2^23: its low bits are the integer
  const Vec<float> n = shifted - round_to_integer;
  const Vec<float> r = fmadd(n, Vec<float>(-kLn2Low), fmadd(n, Vec<float>(-kLn2High), x));
  Vec<float> p(1.381459865e-3f);
  p = fmadd(p, r, Vec<float>(8.36871688e-3f));
  p = fmadd(p, r, Vec<float>(4.166838805e-2f));
  p = fmadd(p, r, Vec<float>(1.666652063e-1f));
  p = fmadd(p, r, Vec<float>(4.999999345e-1f));
  const auto exponent = at::vec::cast<int32_t, float>(shifted) << Vec<int32_t>(23);
  const Vec<float> power = at::vec::cast<float, int32_t>(exponent + Vec<int32_t>(0x3f800000));
  const Vec<float> exp = (fmadd(p, r * r, r) + Vec<float>(1.f)) * power;
  return Vec<float>::blendv(exp, Vec<float>(0.f), argument < smallest);
}
#endif

inline Vec<double> exp_nonpositive(const Vec<double>& x) { return x.exp(); }

// tanh(u) within 1.2 ULP: below 1 u + u^3 P(u^2) with the minimax polynomial of degree 6 (relative error 5e-9), beyond
// that 1 - 2 e / (1 + e) with e = exp(-2 |u|), whose error counts the less the nearer it is to 1. Float only: double
// takes Sleef's.
inline Vec<float> tanh_of(const Vec<float>& u) {
  using at::vec::fmadd;
  const Vec<float> size = u.abs(), square = size * size, one(1.f), minus_two(-2.f);
  Vec<float> p(-3.5845002e-4f);
  p = fmadd(p, square, Vec<float>(2.3013577e-3f));
  p = fmadd(p, square, Vec<float>(-7.946096e-3f));
  p = fmadd(p, square, Vec<float>(2.1486651e-2f));
  p = fmadd(p, square, Vec<float>(-5.38798e-2f));
  p = fmadd(p, square, Vec<float>(1.3332345e-1f));
  p = fmadd(p, square, Vec<float>(-3.3333296e-1f));
  const Vec<float> small = fmadd(p * square, size, size), e = exp_nonpositive(minus_two * size);
  const Vec<float> large = fmadd(minus_two, e / (one + e), one);
  return Vec<float>::blendv(large, small, size < one) | (u & Vec<float>(-0.f));
}

inline Vec<double> tanh_of(const Vec<double>& u) { return u.tanh(); }

// The larger of the two; a NaN in x is passed over (on some machines it wins).
template <typename T>
inline Vec<T> larger(const Vec<T>& best, const Vec<T>& x) {
  return at::vec::clamp_min(best, x);
}

// NaN if any lane is.
template <typename T>
inline T max_lanes(const Vec<T>& v) {
  alignas(64) T lanes[kLanes<T>];
  v.store(lanes);
  T best = lanes[0];
  for (int64_t i = 1; i < kLanes<T>; i++)
    if (!(lanes[i] <= best) && !std::isnan(best)) best = lanes[i];
  return best;
}

template <typename T>
inline double sum_lanes(const Vec<T>& v) {
  alignas(64) T lanes[kLanes<T>];
  v.store(lanes);
  double sum = 0;
  for (int64_t i = 0; i < kLanes<T>; i++) sum += lanes[i];
  return sum;
}

// A bit for each lane where x equals y.
template <typename T>
inline int equal_lanes(const Vec<T>& x, const Vec<T>& y) {
  return ~(x == y).zero_mask() & ((1 << kLanes<T>)-1);
}
// A bit for each lane where x is NaN.
template <typename T>
inline int nan_lanes(const Vec<T>& x) {
  return ~(x != x).zero_mask() & ((1 << kLanes<T>)-1);
}

#ifdef CPU_CAPABILITY_AVX512
inline int equal_lanes(const Vec<float>& x, const Vec<float>& y) { return _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ); }
inline int nan_lanes(const Vec<float>& x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
#endif

// Of values that are not NaN.
template <typename T>
inline T max_number(const Vec<T>& v) {
  return max_lanes(v);
}

#ifdef CPU_CAPABILITY_AVX512
inline float max_number(const Vec<float>& v) { return _mm512_reduce_max_ps(v); }

inline double sum_lanes(const Vec<float>& v) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}
#endif

// ---- vectors of double, from and to arrays of either type --------------------------------------------------------

using DoubleVec = Vec<double>;

inline DoubleVec load_double(const double* values) { return DoubleVec::loadu(values); }
inline void store_double(const DoubleVec& v, double* out) { v.store(out); }

#ifdef CPU_CAPABILITY_AVX512
inline DoubleVec load_double(const float* values) { return _mm512_cvtps_pd(_mm256_loadu_ps(values)); }
inline void store_double(const DoubleVec& v, float* out) { _mm256_storeu_ps(out, _mm512_cvtpd_ps(v)); }
#else
inline DoubleVec load_double(const float* values) {
  alignas(64) double wide[kLanes<double>];
  for (int64_t i = 0; i < kLanes<double>; i++) wide[i] = values[i];
  return DoubleVec::loadu(wide);
}
inline void store_double(const DoubleVec& v, float* out) {
  alignas(64) double wide[kLanes<double>];
  v.store(wide);
  for (int64_t i = 0; i < kLanes<double>; i++) out[i] = static_cast<float>(wide[i]);
}
#endif

// What rounding took from sum = a + b (Knuth, The Art of Computer Programming 2, 4.2.2, theorem B).
template <typename V>
inline V lost_in(const V& a, const V& b, const V& sum) {
  const V of_b = sum - a;
  return (a - (sum - of_b)) + (b - of_b);
}

// A sum in double. Where T is double too it has no more digits than T: what rounding takes from it is then summed in
// `lost`.
template <typename T>
struct LongSum {
  double sum = 0, lost = 0;

  void add(double more) {
    const double before = sum;
    sum = before + more;
    if constexpr (std::is_same_v<T, double>) lost += lost_in(before, more, sum);
  }

  // Of a sum that is not finite nothing is lost.
  double value() const { return std::isfinite(sum) ? sum + lost : sum; }
};

// sums[i] += v[i], or = v[i] if it is the first. Where T is double, what rounding takes from the sums joins lost[i].
template <typename T>
inline void add_to(double* sums, double* lost, const Vec<T>& v, bool first) {
  alignas(64) T lanes[kLanes<T>];
  v.store(lanes);
  for (int64_t i = 0; i < kLanes<T>; i += kLanes<double>) {
    const DoubleVec wide = load_double(lanes + i);
    if (first) {
      wide.store(sums + i);
      continue;
    }
    const DoubleVec before = DoubleVec::loadu(sums + i), sum = before + wide;
    if constexpr (std::is_same_v<T, double>) (DoubleVec::loadu(lost + i) + lost_in(before, wide, sum)).store(lost + i);
    sum.store(sums + i);
  }
}

// 0 where b is 0, b * d elsewhere: a class without target mass contributes nothing even where its logit is -inf.
template <typename T>
inline Vec<T> multiply_or_zero(const Vec<T>& b, const Vec<T>& d) {
  const Vec<T> zero(0);
  return Vec<T>::blendv(b * d, zero, b == zero);
}

// The functions of row_math.h.
template <typename T>
struct VectorMath {
  using Value = Vec<T>;

  SOFTMAX_EXT_INLINE static Vec<T> select(const Vec<T>& condition, const Vec<T>& yes, const Vec<T>& no) {
    return Vec<T>::blendv(no, yes, condition);
  }
  SOFTMAX_EXT_INLINE static Vec<T> multiply_or_zero(const Vec<T>& b, const Vec<T>& d) {
    return CPU_CAPABILITY::multiply_or_zero(b, d);
  }
  SOFTMAX_EXT_INLINE static Vec<T> multiply_add(const Vec<T>& a, const Vec<T>& b, const Vec<T>& c) {
    return at::vec::fmadd(a, b, c);
  }
  SOFTMAX_EXT_INLINE static Vec<T> multiply_subtract(const Vec<T>& a, const Vec<T>& b, const Vec<T>& c) {
    return at::vec::fmsub(a, b, c);
  }
  SOFTMAX_EXT_INLINE static Vec<T> divide(const Vec<T>& a, const Vec<T>& b) { return a / b; }
  SOFTMAX_EXT_INLINE static Vec<T> abs(const Vec<T>& x) { return x.abs(); }
  SOFTMAX_EXT_INLINE static Vec<T> exp(const Vec<T>& x) { return exp_nonpositive(x); }
  SOFTMAX_EXT_INLINE static Vec<T> log1p(const Vec<T>& x) { return x.log1p(); }
  SOFTMAX_EXT_INLINE static Vec<T> tanh(const Vec<T>& x) { return tanh_of(x); }
};

// Adds e to `sum` where x is not `max`, and 1 to `ties` where it is.
template <typename T>
inline void add_apart(Vec<T>& sum, Vec<T>& ties, const Vec<T>& e, const Vec<T>& x, const Vec<T>& max) {
  const Vec<T> tie = x == max, zero(0);
  sum = sum + Vec<T>::blendv(e, zero, tie);
  ties = ties + Vec<T>::blendv(zero, Vec<T>(1), tie);
}

#ifdef CPU_CAPABILITY_AVX512
inline Vec<float> multiply_or_zero(const Vec<float>& b, const Vec<float>& d) {
  return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(b, _mm512_setzero_ps(), _CMP_NEQ_UQ), b, d);
}

inline void add_apart(Vec<float>& sum, Vec<float>& ties, const Vec<float>& e, const Vec<float>& x,
                      const Vec<float>& max) {
  const __mmask16 tie = _mm512_cmp_ps_mask(x, max, _CMP_EQ_OQ);
  sum = _mm512_mask_add_ps(sum, _knot_mask16(tie), sum, e);
  ties = _mm512_mask_add_ps(ties, tie, ties, _mm512_set1_ps(1.f));
}
#endif

// ---- one value -----------------------------------------------------------------------------------------------

// The half types of visit_dtype().
struct Halves {
  using BFloat16 = c10::BFloat16;
  using Float16 = c10::Half;
};

template <typename Visit>
inline decltype(auto) with_type(DType type, const Visit& visit) {
  return visit_dtype<Halves>(type, visit);
}

// A half passes through float: it has no other conversion.
template <typename S>
using Wider = std::conditional_t<std::is_same_v<S, double>, double, float>;

inline double load_value(const void* data, DType type, int64_t i) {
  return with_type(type, [=](auto element) -> double {
    using S = typename decltype(element)::Type;
    return static_cast<Wider<S>>(static_cast<const S*>(data)[i]);
  });
}

inline void store_value(double value, void* data, DType type, int64_t i) {
  with_type(type, [=](auto element) {
    using S = typename decltype(element)::Type;
    static_cast<S*>(data)[i] = static_cast<Wider<S>>(value);
  });
}

// Value = load_row_value(values, row) * inverse_divisor(values).
inline double load_row_value(const RowValues& values, int64_t row) {
  return values.data ? load_value(values.data, values.dtype, row * values.stride) : 1.0;
}
inline double inverse_divisor(const RowValues& values) { return values.divisor ? 1 / *values.divisor : 1.0; }

// Whether `type` is the type of the arithmetic itself.
template <typename T>
inline bool is_own(DType type) {
  return type == kArithmeticType<T>;
}

inline void* address(void* data, DType type, int64_t i) { return static_cast<char*>(data) + i * size_of(type); }

// For a loop over vectors of data that is followed by element `next`.
template <typename T>
Ahead ahead_of(const void* data, DType type, int64_t next) {
  return {static_cast<const char*>(data) + next * size_of(type), kLanes<T> * size_of(type)};
}

// ---- contiguous runs -----------------------------------------------------------------------------------------

template <typename T, typename S>
inline void load_run_as(const S* src, int64_t n, T* dst) {
  for (int64_t i = 0; i < n; i++) dst[i] = static_cast<T>(src[i]);
}

inline void load_vector(const c10::BFloat16* src, Vec<float>& v) { at::vec::load_fp32_from_bf16(src, v); }
inline void load_vector(const c10::Half* src, Vec<float>& v) { at::vec::load_fp32_from_fp16(src, v); }

// `count` elements, converted; the lanes beyond are 0.
template <typename T, typename S>
inline Vec<T> load_converted(const S* src, int64_t count) {
  if constexpr (std::is_same_v<S, T>) {
    return count == kLanes<T> ? Vec<T>::loadu(src) : Vec<T>::loadu(src, count);
  } else if constexpr (sizeof(S) == 2 && std::is_same_v<T, float>) {
    Vec<float> v;
    if (count == kLanes<float>) {
      load_vector(src, v);
      return v;
    }
    S padded[kLanes<float>] = {};
    std::memcpy(padded, src, count * sizeof(S));
    load_vector(padded, v);
    return v;
  } else {
    alignas(64) T padded[kLanes<T>] = {};
    for (int64_t i = 0; i < count; i++) padded[i] = static_cast<T>(src[i]);
    return Vec<T>::loadu(padded);
  }
}

// The half types, whose conversion the compiler does not vectorise by itself.
template <typename Half>
inline void load_halves(const Half* src, int64_t n, float* dst) {
  constexpr int64_t L = kLanes<float>;
  int64_t i = 0;
  for (; i + L <= n; i += L) load_converted<float>(src + i, L).store(dst + i);
  if (i < n) load_converted<float>(src + i, n - i).store(dst + i, n - i);
}

inline void load_run_as(const c10::BFloat16* src, int64_t n, float* dst) { load_halves(src, n, dst); }
inline void load_run_as(const c10::Half* src, int64_t n, float* dst) { load_halves(src, n, dst); }

// dst[0, n) = src[at, at + n), converted.
template <typename T>
inline void load_run(const void* src, DType type, int64_t at, int64_t n, T* dst) {
  with_type(type, [&](auto element) {
    using S = typename decltype(element)::Type;
    load_run_as(static_cast<const S*>(src) + at, n, dst);
  });
}

#ifdef CPU_CAPABILITY_AVX512
// Rounded to nearest even in the upper halves of the words; a NaN stays one.
inline __m512i round_to_bfloat16(const Vec<float>& x) {
  const __m512i bits = _mm512_castps_si512(x),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}

inline Vec<c10::BFloat16> to_halves(const Vec<float>& low, const Vec<float>& high, c10::BFloat16*) {
  const __m512i upper_halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,  //
                                                31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(round_to_bfloat16(low), upper_halves, round_to_bfloat16(high));
}
#else
inline auto to_halves(const Vec<float>& low, const Vec<float>& high, c10::BFloat16*) {
  return at::vec::convert_float_bfloat16(low, high);
}
#endif
inline auto to_halves(const Vec<float>& low, const Vec<float>& high, c10::Half*) {
  return at::vec::convert_float_half(low, high);
}

// ---- results, vector by vector --------------------------------------------------------------------------------

// How a result is stored: into the caches, or past them. Past them saves reading the lines that it replaces, and is for
// results too large to be found in a cache again.
enum class Store { kCached, kNonTemporal };

template <typename Params>
inline Store store_of(const Params& p) {
  return p.non_temporal ? Store::kNonTemporal : Store::kCached;
}

#if defined(CPU_CAPABILITY_AVX512)
inline void store_non_temporal(const Vec<float>& v, float* dst) { _mm512_stream_ps(dst, v); }
inline void store_non_temporal(const Vec<double>& v, double* dst) { _mm512_stream_pd(dst, v); }
template <typename Half>
inline void store_non_temporal(const Vec<Half>& v, Half* dst) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), v);
}
#elif defined(CPU_CAPABILITY_AVX2)
inline void store_non_temporal(const Vec<float>& v, float* dst) { _mm256_stream_ps(dst, v); }
inline void store_non_temporal(const Vec<double>& v, double* dst) { _mm256_stream_pd(dst, v); }
template <typename Half>
inline void store_non_temporal(const Vec<Half>& v, Half* dst) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(dst), v);
}
#else
template <typename S>
inline void store_non_temporal(const Vec<S>& v, S* dst) {
  v.store(dst);
}
#endif

// Orders the non-temporal stores before what tells another thread that they are done.
inline void fence_non_temporal() {
#ifdef __x86_64__
  __builtin_ia32_sfence();
#endif
}

// The elements before the first place for a non-temporal store, which must be aligned.
template <typename S>
inline int64_t elements_to_alignment(const S* dst) {
  constexpr uintptr_t kBytes = sizeof(Vec<S>);
  return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(dst) % kBytes / sizeof(S));
}

// dst[i] = value(i, count) for i < n. value(i, count) is the vector of S at i, of which `count` lanes are used: all of
// them, except in the first vector and the last.
template <typename S, typename Value>
__attribute__((flatten)) inline void store_vectors(S* dst, int64_t n, Store how, Value value) {
  constexpr int64_t L = Vec<S>::size();
  int64_t i = 0;
  if (how == Store::kNonTemporal) {
    i = std::min(elements_to_alignment(dst), n);
    if (i > 0) value(0, i).store(dst, i);
    for (; i + L <= n; i += L) store_non_temporal(value(i, L), dst + i);
  } else {
    for (; i + L <= n; i += L) value(i, L).store(dst + i);
  }
  if (i < n) value(i, n - i).store(dst + i, n - i);
}

// The same for values of float, two vectors to one of the half type.
template <typename Half, typename Value>
__attribute__((flatten)) inline void store_as_halves(Half* dst, int64_t n, Store how, Value value) {
  constexpr int64_t L = kLanes<float>;
  const auto some = [&](int64_t i, int64_t count) {
    const Vec<float> low = value(i, std::min(L, count)), high = count > L ? value(i + L, count - L) : Vec<float>(0);
    to_halves(low, high, dst).store(dst + i, count);
  };
  int64_t i = 0;
  if (how == Store::kNonTemporal) {
    i = std::min(elements_to_alignment(dst), n);
    if (i > 0) some(0, i);
    for (; i + 2 * L <= n; i += 2 * L)
      store_non_temporal(Vec<Half>(to_halves(value(i, L), value(i + L, L), dst)), dst + i);
  } else {
    for (; i + 2 * L <= n; i += 2 * L) to_halves(value(i, L), value(i + L, L), dst).store(dst + i);
  }
  if (i < n) some(i, n - i);
}

// dst[0, n) = src[0, n), rounded to nearest.
template <typename T, typename S>
inline void store_run_as(const T* src, int64_t n, S* dst, Store how) {
  const auto load = [src](int64_t i, int64_t count) { return load_converted<T>(src + i, count); };
  if constexpr (std::is_same_v<S, T>)
    store_vectors(dst, n, how, load);
  else if constexpr (sizeof(S) == 2 && std::is_same_v<T, float>)
    store_as_halves(dst, n, how, load);
  else
    for (int64_t i = 0; i < n; i++) dst[i] = static_cast<S>(src[i]);
}

// dst[at, at + n) = src[0, n).
template <typename T>
inline void store_run(const T* src, int64_t n, void* dst, DType type, int64_t at, Store how = Store::kCached) {
  with_type(type, [&](auto element) {
    using S = typename decltype(element)::Type;
    store_run_as(src, n, static_cast<S*>(dst) + at, how);
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
