// What every kernel uses: element types and their conversions, 16-byte packs, arithmetic, and where rows lie.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

#include <cstdint>
#include <type_traits>

#include "../row_math.h"
#include "kernels.h"

namespace softmax_ext {
namespace cuda {

// The dynamic shared memory of the block; there is no other.
#ifdef __CUDACC__
template <typename V>
__device__ __forceinline__ V* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<V*>(bytes);
}
#endif

// ---- element types -----------------------------------------------------------------------------------------------

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(double x, double& y) { y = x; }
__device__ __forceinline__ void narrow(double x, float& y) { y = static_cast<float>(x); }
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(float x, double& y) { y = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16(x); }
__device__ __forceinline__ void narrow(float x, __half& y) { y = __float2half_rn(x); }
__device__ __forceinline__ void narrow(double x, __nv_bfloat16& y) { y = __float2bfloat16(static_cast<float>(x)); }
__device__ __forceinline__ void narrow(double x, __half& y) { y = __float2half_rn(static_cast<float>(x)); }

template <typename E>
__device__ __forceinline__ void clear(E& element) {
  narrow(decltype(widen(element))(0), element);
}

// The half types of visit_dtype().
struct Halves {
  using BFloat16 = __nv_bfloat16;
  using Float16 = __half;
};

// One element of an array whose type is known at run time.
template <typename T>
__device__ __forceinline__ T load_value(const void* data, DType type, int64_t i) {
  return visit_dtype<Halves>(type, [=](auto element) {
    using E = typename decltype(element)::Type;
    return static_cast<T>(widen(static_cast<const E*>(data)[i]));
  });
}

template <typename T>
__device__ __forceinline__ void store_value(T value, void* data, DType type, int64_t i) {
  visit_dtype<Halves>(type, [=](auto element) {
    using E = typename decltype(element)::Type;
    narrow(value, static_cast<E*>(data)[i]);
  });
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ T infinity() {
  return static_cast<T>(CUDART_INF_F);
}

template <typename T>
__device__ __forceinline__ T not_a_number() {
  return static_cast<T>(CUDART_NAN_F);
}

// exp(d) of elements stored as S, for d <= 0: within 2 ULP, or 2 + |d| where S has at most 11 bits.
template <typename S>
__device__ __forceinline__ double exp_nonpositive(double d) {
  return exp(d);
}
template <typename S>
__device__ __forceinline__ float exp_nonpositive(float d) {
  return sizeof(S) == 2 ? __expf(d) : expf(d);
}

__device__ __forceinline__ float log1p_of(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_of(double x) { return log1p(x); }
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Within 2 ULP for a divisor between 2^-126 and 2^126.
__device__ __forceinline__ float divide(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double divide(double a, double b) { return a / b; }

// Ignores a NaN.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// 0 where b is 0, b * d elsewhere: a class without target mass contributes nothing even where its logit is -inf.
template <typename T>
__device__ __forceinline__ T multiply_or_zero(T b, T d) {
  return b == 0 ? T(0) : b * d;
}

// The functions of row_math.h.
template <typename T>
struct ScalarMath {
  using Value = T;

  __device__ __forceinline__ static T select(bool condition, T yes, T no) { return condition ? yes : no; }
  __device__ __forceinline__ static T multiply_or_zero(T b, T d) { return cuda::multiply_or_zero(b, d); }
  __device__ __forceinline__ static T multiply_add(T a, T b, T c) { return cuda::multiply_add(a, b, c); }
  __device__ __forceinline__ static T multiply_subtract(T a, T b, T c) { return cuda::multiply_add(a, b, -c); }
  __device__ __forceinline__ static T divide(T a, T b) { return cuda::divide(a, b); }
  __device__ __forceinline__ static T log1p(T x) { return log1p_of(x); }
  __device__ __forceinline__ static T tanh(T x) { return tanh_of(x); }
};

template <typename T>
__device__ __forceinline__ T row_value(const RowValues& values, int64_t row) {
  if (!values.given) return 0;
  const T value = values.data ? load_value<T>(values.data, values.dtype, row * values.stride) : T(1);
  return values.divisor ? divide(value, static_cast<T>(*values.divisor)) : value;
}

// ---- chunks of 16 bytes ------------------------------------------------------------------------------------------

// kSize adjacent elements: a multiple of 16 bytes, or 8 where the elements are half as wide as those that cut the row.
template <typename E, int kSize>
struct alignas(kSize * sizeof(E) % 16 == 0 ? 16 : 8) Chunk {
  E element[kSize];

  // Makes the compiler forget what it knows of the values, so that it widens them where they are used rather than keep
  // them in registers twice.
  __device__ __forceinline__ void hide() {
    unsigned* const words = reinterpret_cast<unsigned*>(element);
#pragma unroll
    for (unsigned i = 0; i < sizeof(element) / 4; i++) asm volatile("" : "+r"(words[i]));
  }
};

// How a row of n elements of type S is cut: `head` elements, `chunks` of 16 bytes that are aligned in memory, and the
// rest. The elements before and behind the chunks are the loose ones, fewer than 2 kSize.
template <typename S>
struct Cut {
  static constexpr int kSize = 16 / sizeof(S);
  int n, head, chunks, loose;

  __device__ __forceinline__ Cut(const S* row, int n)
      : n(n), head(min(n, static_cast<int>(-(reinterpret_cast<uintptr_t>(row) / sizeof(S)) % kSize))) {
    chunks = (n - head) / kSize;
    loose = n - chunks * kSize;
  }
  // The number of a chunk's first element, and that of a loose element.
  __device__ __forceinline__ int of_chunk(int chunk) const { return head + chunk * kSize; }
  __device__ __forceinline__ int of_loose(int i) const { return i < head ? i : chunks * kSize + i; }
};

// A row of elements E, in chunks cut by a row of elements S.
template <typename E, typename S>
struct Row {
  static constexpr int kSize = Cut<S>::kSize;
  using Chunks = Chunk<std::remove_const_t<E>, kSize>;
  using Word = std::conditional_t<sizeof(Chunks) % 16 == 0, int4, int2>;
  static constexpr int kWords = sizeof(Chunks) / sizeof(Word);
  static_assert(sizeof(Chunks) == kSize * sizeof(E) && sizeof(Chunks) % sizeof(Word) == 0, "words of the chunk alone");
  E* data;
  bool aligned;  // its own chunks too begin at multiples of a word

  Row() = default;
  __device__ __forceinline__ Row(E* data, const Cut<S>& cut)
      : data(data), aligned(reinterpret_cast<uintptr_t>(data + cut.head) % sizeof(Word) == 0) {}

  // The chunk of elements from number `at` on. kAgain: they will be read again soon.
  template <bool kAgain>
  __device__ __forceinline__ Chunks load(int at) const {
    Chunks chunk;
    if (aligned) {
      const Word* const from = reinterpret_cast<const Word*>(data + at);
      Word* const to = reinterpret_cast<Word*>(&chunk);
#pragma unroll
      for (int i = 0; i < kWords; i++) to[i] = kAgain ? from[i] : __ldcs(from + i);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; i++) chunk.element[i] = data[at + i];
    }
    return chunk;
  }

  __device__ __forceinline__ void store(int at, const Chunks& chunk) const {
    if (aligned) {
      Word* const to = reinterpret_cast<Word*>(data + at);
      const Word* const from = reinterpret_cast<const Word*>(&chunk);
#pragma unroll
      for (int i = 0; i < kWords; i++) __stcs(to + i, from[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; i++) data[at + i] = chunk.element[i];
    }
  }
};

// ---- layouts -----------------------------------------------------------------------------------------------------

// A Layout as it travels with a kernel's arguments. Rows have less than 2^31 classes, and a kernel less than 2^31
// blocks of one outer index each, so that indices are divided in 32 bits.
struct DeviceDim {
  unsigned size;
  int64_t stride[kOperands];
};

struct DeviceLayout {
  int classes, outer_dims;
  int64_t inner, outer;
  DeviceDim dims[kMaxOuterDims];
  int64_t class_stride[kOperands];
  int64_t inner_stride[kOperands];
};

inline DeviceLayout device_layout(const Layout& layout) {
  DeviceLayout copy{};
  copy.classes = static_cast<int>(layout.classes);
  copy.inner = layout.inner;
  copy.outer = layout.outer;
  copy.outer_dims = layout.outer_dims;
  for (int d = 0; d < layout.outer_dims; d++) {
    copy.dims[d].size = static_cast<unsigned>(layout.dims[d].size);
    for (int i = 0; i < kOperands; i++) copy.dims[d].stride[i] = layout.dims[d].stride[i];
  }
  for (int i = 0; i < kOperands; i++) {
    copy.class_stride[i] = layout.class_stride[i];
    copy.inner_stride[i] = layout.inner_stride[i];
  }
  return copy;
}

// The offset of class 0 in each operand, and the number of the row.
struct Position {
  int64_t offset[kOperands];
};

__device__ __forceinline__ Position locate(const DeviceLayout& layout, unsigned outer, int64_t inner) {
  Position at;
#pragma unroll
  for (int i = 0; i < kOperands; i++) at.offset[i] = inner * layout.inner_stride[i];
  for (int d = layout.outer_dims - 1; d >= 0; d--) {
    const unsigned rest = outer / layout.dims[d].size;
    const int64_t index = outer - rest * layout.dims[d].size;
    outer = rest;
#pragma unroll
    for (int i = 0; i < kOperands; i++) at.offset[i] += index * layout.dims[d].stride[i];
  }
  return at;
}

}  // namespace cuda
}  // namespace softmax_ext
