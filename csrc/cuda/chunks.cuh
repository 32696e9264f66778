// Chunks of adjacent elements: 16 bytes of the inputs, or one element. How a row is cut into them, and how they are
// loaded, read and stored.
#pragma once

#include "numbers.cuh"

namespace softmax_ext {
namespace cuda {

// What one load or store of so many bytes moves.
template <int kBytes>
using Moved = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, unsigned, unsigned short>>>;

// kSize adjacent elements, as the registers that hold them: an array of half types would be taken apart, and take twice
// as many.
template <typename E, int kSize>
struct Chunk {
  static constexpr int kBytes = kSize * sizeof(E);
  using M = Moved<(kBytes < 16 ? kBytes : 16)>;
  unsigned word[(kBytes + 3) / 4];

  DEVICE auto operator[](int i) const {
    if constexpr (sizeof(E) == 8)
      return __hiloint2double(static_cast<int>(word[2 * i + 1]), static_cast<int>(word[2 * i]));
    else if constexpr (sizeof(E) == 4)
      return __uint_as_float(word[i]);
    else
      return widen_half<E>(word[i / 2], i % 2);
  }
  template <typename T>
  DEVICE void set(int i, T value) {
    if constexpr (sizeof(E) == 2) {
      const unsigned bits = narrow_pair<E>(static_cast<float>(value), 0) & 0xffff;
      word[i / 2] = i % 2 ? (word[i / 2] & 0xffff) | bits << 16 : (word[i / 2] & 0xffff0000) | bits;
    } else {
      const E rounded = static_cast<E>(value);
      memcpy(word + i * (sizeof(E) / 4), &rounded, sizeof(E));
    }
  }
};

// kLast: nobody will read it again soon.
template <bool kLast, int kSize, typename E>
DEVICE Chunk<E, kSize> load_chunk(const E* from) {
  Chunk<E, kSize> chunk{};
  using M = typename Chunk<E, kSize>::M;
#pragma unroll
  for (unsigned i = 0; i < kSize * sizeof(E) / sizeof(M); i++) {
    const M* const place = reinterpret_cast<const M*>(from) + i;
    const M moved = kLast ? __ldcs(place) : *place;
    memcpy(chunk.word + i * 4, &moved, sizeof(M));
  }
  return chunk;
}

template <int kSize, typename E>
DEVICE void store_chunk(E* to, const Chunk<E, kSize>& chunk) {
  using M = typename Chunk<E, kSize>::M;
#pragma unroll
  for (unsigned i = 0; i < kSize * sizeof(E) / sizeof(M); i++) {
    M moved;
    memcpy(&moved, chunk.word + i * 4, sizeof(M));
    __stcs(reinterpret_cast<M*>(to) + i, moved);
  }
}

// Of values for an output of type E. Rounds pairs where the type has an instruction for that.
template <typename E, typename T, int kSize>
DEVICE Chunk<E, kSize> rounded(const T (&values)[kSize]) {
  Chunk<E, kSize> chunk{};
  if constexpr (sizeof(E) == 2 && kSize % 2 == 0 && sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kSize; i += 2) chunk.word[i / 2] = narrow_pair<E>(values[i], values[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; i++) chunk.set(i, values[i]);
  }
  return chunk;
}

// The first `count` of n values, `stride` apart, of an array whose type is known at run time; adjacent ones at once.
template <typename T, int n>
DEVICE void load_values(const void* data, DType type, int64_t first, int64_t stride, int count, T (&values)[n]) {
  visit_dtype<Halves>(type, [&](auto element) {
    using E = typename decltype(element)::Type;
    const E* const from = static_cast<const E*>(data) + first;
    if (stride == 1 && count == n && reinterpret_cast<uintptr_t>(from) % sizeof(typename Chunk<E, n>::M) == 0) {
      const Chunk<E, n> chunk = load_chunk<false, n>(from);
#pragma unroll
      for (int i = 0; i < n; i++) values[i] = static_cast<T>(chunk[i]);
    } else {
#pragma unroll
      for (int i = 0; i < n; i++)
        if (i < count) values[i] = static_cast<T>(widen(from[i * stride]));
    }
  });
}

// ---- how a row is cut ----------------------------------------------------------------------------------------------

// A row of n elements: `head` elements, `chunks` of kSize whose addresses are multiples of their size, and the rest.
// The elements before and behind the chunks are the loose ones, fewer than 2 kSize. All operands of a row are cut in
// the same places.
template <int kSize>
struct Cut {
  int head, chunks, loose;

  template <typename E>
  DEVICE Cut(const E* row, int n)
      : head(min(n, static_cast<int>(-(reinterpret_cast<uintptr_t>(row) / sizeof(E)) % kSize))) {
    chunks = (n - head) / kSize;
    loose = n - chunks * kSize;
  }
  // The number of a chunk's first element, and that of a loose element.
  DEVICE int of_chunk(int chunk) const { return head + chunk * kSize; }
  DEVICE int of_loose(int i) const { return i < head ? i : chunks * kSize + i; }
  // The chunk that holds an element; out of [0, chunks) if it is loose.
  DEVICE int chunk_of(int element) const { return element < head ? -1 : (element - head) / kSize; }
  DEVICE int loose_of(int element) const { return element < head ? element : element - chunks * kSize; }
};

// ---- what the kernels hold of a row --------------------------------------------------------------------------------

// The elements of one class in all inputs.
template <typename Op>
struct Elements {
  typename Op::T of[Op::kInputs];
};

// Adjacent classes of all inputs, as they are stored.
template <typename Op, int kSize>
struct InputChunk {
  using In = typename Op::In;
  static constexpr int kElements = kSize;
  Chunk<In, kSize> input[Op::kInputs];

  DEVICE Elements<Op> at(int i) const {
    Elements<Op> x;
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) x.of[j] = input[j][i];
    return x;
  }
  // Makes the compiler forget what it knows of the values, so that it widens them where they are used rather than keep
  // them in registers twice.
  DEVICE void hide() {
    if constexpr (sizeof(In) == 2)
#pragma unroll
      for (int j = 0; j < Op::kInputs; j++)
#pragma unroll
        for (unsigned& word : input[j].word) asm volatile("" : "+r"(word));
  }
};

// The same as numbers, for chunks whose elements come one by one.
template <typename Op, int kSize>
struct WideChunk {
  static constexpr int kElements = kSize;
  typename Op::T value[Op::kInputs][kSize];

  DEVICE Elements<Op> at(int i) const {
    Elements<Op> x;
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) x.of[j] = value[j][i];
    return x;
  }
};

// The largest logit in n chunks; a NaN is passed over. It is that of the largest element, or of the smallest.
template <int n, typename Op, int kSize>
DEVICE typename Op::T largest_logit(const Op& op, const InputChunk<Op, kSize>* chunks) {
  using In = typename Op::In;
  if constexpr (sizeof(In) == 2 && kSize % 2 == 0 && !Op::kPredicts) {
    unsigned pair = chunks[0].input[0].word[0];
#pragma unroll
    for (int i = 1; i < n * kSize / 2; i++)
      pair = larger_pair<In>(pair, chunks[2 * i / kSize].input[0].word[i % (kSize / 2)]);
    return larger(widen_half<In>(pair, 0), widen_half<In>(pair, 1));
  } else {
    const typename Op::T sign = op.sign();
    typename Op::T value = lowest<typename Op::T>();
#pragma unroll
    for (int i = 0; i < n * kSize; i++) value = larger(value, sign * chunks[i / kSize].input[0][i % kSize]);
    return op.logit(sign * value);
  }
}

}  // namespace cuda
}  // namespace softmax_ext
