// Vectors, their exponential, and the movement of blocks between memory of any dtype and L1 buffers of the
// arithmetic's type T. Included only by the units that are compiled once per instruction set; everything in it is
// internal to the unit, so that no code built for one set can be linked into another.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "layout.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
constexpr int64_t kLanes = Vec<T>::size();

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// An L1-resident buffer of a block: 16 KiB, whole vectors, aligned.
constexpr int64_t kBlockBytes = 16384;
template <typename T>
constexpr int64_t kBlock = kBlockBytes / sizeof(T);
template <typename T>
struct alignas(64) Block {
  T data[kBlock<T>];
};

// How many of the `remaining` classes of a row the next block takes. Where the row is used where it lies (`direct`), the
// last partial vector is a block of its own, so that only that is copied.
template <typename T>
inline int64_t next_block(int64_t remaining, bool direct) {
  const int64_t n = remaining < kBlock<T> ? remaining : kBlock<T>;
  return direct && n > kLanes<T> ? n / kLanes<T> * kLanes<T> : n;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// exp(x) for x <= 0 within 1.01 ULP (tests/test_kernels.py measures it over all of its range), 0 below the smallest
// normal number. x = n ln 2 + r with |r| <= ln 2 / 2 in two steps (Cody and Waite), exp(r) = 1 + r + r^2 P(r) with the
// minimax polynomial of degree 4 (relative error 3e-9). Float only: double takes Sleef's, within 1 ULP too.
constexpr float kLog2E = 1.44269504088896341f, kSmallestExponent = -87.3365402f;

inline Vec<float> exp_of_reduced(const Vec<float>& x, const Vec<float>& n) {
  using at::vec::fmadd;
  Vec<float> r = fmadd(n, Vec<float>(-0.693359375f), x);
  r = fmadd(n, Vec<float>(2.12194440e-4f), r);
  Vec<float> p(1.381459865e-3f);
  p = fmadd(p, r, Vec<float>(8.36871688e-3f));
  p = fmadd(p, r, Vec<float>(4.166838805e-2f));
  p = fmadd(p, r, Vec<float>(1.666652063e-1f));
  p = fmadd(p, r, Vec<float>(4.999999345e-1f));
  return fmadd(p, r * r, r) + Vec<float>(1.f);
}

#ifdef CPU_CAPABILITY_AVX512
inline Vec<float> exp_nonpositive(const Vec<float>& x) {
  const __m512 n = _mm512_roundscale_ps(x * Vec<float>(kLog2E), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kSmallestExponent), _CMP_NLT_UQ);  // or NaN
  return _mm512_maskz_scalef_ps(normal, exp_of_reduced(x, n), n);
}
#else
inline Vec<float> exp_nonpositive(const Vec<float>& x) {
  const Vec<float> round_to_integer(12582912.f);  // 1.5 * 2^23: the sum's low mantissa bits are the integer
  const Vec<float> shifted = at::vec::fmadd(x, Vec<float>(kLog2E), round_to_integer);
  const auto exponent = at::vec::cast<int32_t, float>(shifted) << Vec<int32_t>(23);
  const Vec<float> power = at::vec::cast<float, int32_t>(exponent + Vec<int32_t>(0x3f800000));
  const Vec<float> exp = exp_of_reduced(x, shifted - round_to_integer) * power;
  return Vec<float>::blendv(exp, Vec<float>(0.f), x < Vec<float>(kSmallestExponent));
}
#endif

inline Vec<double> exp_nonpositive(const Vec<double>& x) { return x.exp(); }

template <typename T>
inline double sum_lanes(const Vec<T>& v) {
  alignas(64) T lanes[kLanes<T>];
  v.store(lanes);
  double sum = 0;
  for (int64_t i = 0; i < kLanes<T>; i++) sum += lanes[i];
  return sum;
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

// 0 where b is 0, b * d elsewhere: a class without target mass contributes nothing even where its logit is -inf.
template <typename T>
inline Vec<T> multiply_or_zero(const Vec<T>& b, const Vec<T>& d) {
  const Vec<T> zero(0);
  return Vec<T>::blendv(b * d, zero, b == zero);
}

// ---- one value -----------------------------------------------------------------------------------------------

inline double load_value(const void* data, DType type, int64_t i) {
  switch (type) {
    case DType::kFloat64: return static_cast<const double*>(data)[i];
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kBFloat16: return static_cast<float>(static_cast<const c10::BFloat16*>(data)[i]);
    case DType::kFloat16: return static_cast<float>(static_cast<const c10::Half*>(data)[i]);
  }
  return 0;
}

inline void store_value(double value, void* data, DType type, int64_t i) {
  switch (type) {
    case DType::kFloat64: static_cast<double*>(data)[i] = value; break;
    case DType::kFloat32: static_cast<float*>(data)[i] = static_cast<float>(value); break;
    case DType::kBFloat16: static_cast<c10::BFloat16*>(data)[i] = static_cast<float>(value); break;
    case DType::kFloat16: static_cast<c10::Half*>(data)[i] = static_cast<float>(value); break;
  }
}

inline int64_t size_of(DType type) {
  switch (type) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    default: return 2;
  }
}

// Whether `type` is the type of the arithmetic itself.
template <typename T>
inline bool is_own(DType type) {
  return type == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
}

inline void* address(void* data, DType type, int64_t i) { return static_cast<char*>(data) + i * size_of(type); }

// ---- contiguous runs -----------------------------------------------------------------------------------------

template <typename T, typename S>
inline void load_run_as(const S* src, int64_t n, T* dst) {
  for (int64_t i = 0; i < n; i++) dst[i] = static_cast<T>(src[i]);
}

inline void load_vector(const c10::BFloat16* src, Vec<float>& v) { at::vec::load_fp32_from_bf16(src, v); }
inline void load_vector(const c10::Half* src, Vec<float>& v) { at::vec::load_fp32_from_fp16(src, v); }

// The half types, whose conversion the compiler does not vectorise by itself.
template <typename Half>
inline void load_halves(const Half* src, int64_t n, float* dst) {
  constexpr int64_t L = kLanes<float>;
  int64_t i = 0;
  Vec<float> v;
  for (; i + L <= n; i += L) {
    load_vector(src + i, v);
    v.store(dst + i);
  }
  if (i == n) return;
  Half tail[L] = {};
  std::memcpy(tail, src + i, (n - i) * sizeof(Half));
  load_vector(tail, v);
  v.store(dst + i, n - i);
}

inline void load_run_as(const c10::BFloat16* src, int64_t n, float* dst) { load_halves(src, n, dst); }
inline void load_run_as(const c10::Half* src, int64_t n, float* dst) { load_halves(src, n, dst); }

// dst[0, n) = src[at, at + n), converted.
template <typename T>
inline void load_run(const void* src, DType type, int64_t at, int64_t n, T* dst) {
  switch (type) {
    case DType::kFloat64: load_run_as(static_cast<const double*>(src) + at, n, dst); break;
    case DType::kFloat32: load_run_as(static_cast<const float*>(src) + at, n, dst); break;
    case DType::kBFloat16: load_run_as(static_cast<const c10::BFloat16*>(src) + at, n, dst); break;
    case DType::kFloat16: load_run_as(static_cast<const c10::Half*>(src) + at, n, dst); break;
  }
}

template <typename T, typename S>
inline void store_run_as(const T* src, int64_t n, S* dst) {
  for (int64_t i = 0; i < n; i++) dst[i] = static_cast<S>(src[i]);
}

inline auto to_halves(const Vec<float>& low, const Vec<float>& high, c10::BFloat16*) {
  return at::vec::convert_float_bfloat16(low, high);
}
inline auto to_halves(const Vec<float>& low, const Vec<float>& high, c10::Half*) {
  return at::vec::convert_float_half(low, high);
}

template <typename Half>
inline void store_halves(const float* src, int64_t n, Half* dst) {
  constexpr int64_t L = kLanes<float>;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L)
    to_halves(Vec<float>::loadu(src + i), Vec<float>::loadu(src + i + L), dst).store(dst + i);
  if (i == n) return;
  const auto low = Vec<float>::loadu(src + i, std::min(L, n - i));
  const auto high = n - i > L ? Vec<float>::loadu(src + i + L, n - i - L) : Vec<float>(0);
  to_halves(low, high, dst).store(dst + i, n - i);
}

inline void store_run_as(const float* src, int64_t n, c10::BFloat16* dst) { store_halves(src, n, dst); }
inline void store_run_as(const float* src, int64_t n, c10::Half* dst) { store_halves(src, n, dst); }

// dst[at, at + n) = src[0, n), rounded to nearest.
template <typename T>
inline void store_run(const T* src, int64_t n, void* dst, DType type, int64_t at) {
  switch (type) {
    case DType::kFloat64: store_run_as(src, n, static_cast<double*>(dst) + at); break;
    case DType::kFloat32: store_run_as(src, n, static_cast<float*>(dst) + at); break;
    case DType::kBFloat16: store_run_as(src, n, static_cast<c10::BFloat16*>(dst) + at); break;
    case DType::kFloat16: store_run_as(src, n, static_cast<c10::Half*>(dst) + at); break;
  }
}

// ---- tiles: [classes, kTile] in a buffer, one row per column ---------------------------------------------------

template <typename T, typename S>
inline void load_tile_as(const S* src, int64_t class_stride, int64_t inner_stride, int64_t classes, int64_t rows,
                         T* dst) {
  if (inner_stride == 1) {
    for (int64_t c = 0; c < classes; c++) load_run_as(src + c * class_stride, rows, dst + c * kTile);
    return;
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < classes; c++) dst[c * kTile + r] = static_cast<T>(src[c * class_stride + r * inner_stride]);
}

// dst[c, r] = src[at + c * class_stride + r * inner_stride] for r < rows; the columns beyond are left as they are.
template <typename T>
inline void load_tile(const void* src, DType type, int64_t at, int64_t class_stride, int64_t inner_stride,
                      int64_t classes, int64_t rows, T* dst) {
  switch (type) {
    case DType::kFloat64:
      load_tile_as(static_cast<const double*>(src) + at, class_stride, inner_stride, classes, rows, dst);
      break;
    case DType::kFloat32:
      load_tile_as(static_cast<const float*>(src) + at, class_stride, inner_stride, classes, rows, dst);
      break;
    case DType::kBFloat16:
      load_tile_as(static_cast<const c10::BFloat16*>(src) + at, class_stride, inner_stride, classes, rows, dst);
      break;
    case DType::kFloat16:
      load_tile_as(static_cast<const c10::Half*>(src) + at, class_stride, inner_stride, classes, rows, dst);
      break;
  }
}

template <typename T, typename S>
inline void store_tile_as(const T* src, int64_t class_stride, int64_t inner_stride, int64_t classes, int64_t rows,
                          S* dst) {
  if (inner_stride == 1) {
    for (int64_t c = 0; c < classes; c++) store_run_as(src + c * kTile, rows, dst + c * class_stride);
    return;
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < classes; c++) dst[c * class_stride + r * inner_stride] = static_cast<S>(src[c * kTile + r]);
}

template <typename T>
inline void store_tile(const T* src, void* dst, DType type, int64_t at, int64_t class_stride, int64_t inner_stride,
                       int64_t classes, int64_t rows) {
  switch (type) {
    case DType::kFloat64:
      store_tile_as(src, class_stride, inner_stride, classes, rows, static_cast<double*>(dst) + at);
      break;
    case DType::kFloat32:
      store_tile_as(src, class_stride, inner_stride, classes, rows, static_cast<float*>(dst) + at);
      break;
    case DType::kBFloat16:
      store_tile_as(src, class_stride, inner_stride, classes, rows, static_cast<c10::BFloat16*>(dst) + at);
      break;
    case DType::kFloat16:
      store_tile_as(src, class_stride, inner_stride, classes, rows, static_cast<c10::Half*>(dst) + at);
      break;
  }
}

// Classes of a tile that are held in a block at a time.
template <typename T>
constexpr int64_t kTileClasses = kBlock<T> / kTile;

// ---- where a unit of work lies ---------------------------------------------------------------------------------

// Offsets of each operand for one unit: a row, or a tile of up to kTile rows along `inner`.
struct Position {
  int64_t offset[kOperands];
  int64_t rows;
};

inline Position locate(const Layout& layout, int64_t unit) {
  Position at{};
  const int64_t tiles = layout.rows ? 1 : (layout.inner + kTile - 1) / kTile;
  int64_t outer = unit / tiles;
  const int64_t first = (unit % tiles) * kTile;
  at.rows = layout.rows ? 1 : (layout.inner - first < kTile ? layout.inner - first : kTile);
  for (int i = 0; i < kOperands; i++) at.offset[i] = layout.rows ? 0 : first * layout.inner_stride[i];
  for (int d = layout.outer_dims - 1; d >= 0; d--) {
    const OuterDim& dim = layout.dims[d];
    const int64_t index = outer % dim.size;
    outer /= dim.size;
    for (int i = 0; i < kOperands; i++) at.offset[i] += index * dim.stride[i];
  }
  return at;
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
