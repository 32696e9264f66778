// The kernel for rows of few classes: a thread takes a row, and holds all of it in registers.
//
// Where the rows follow one another in memory (kStaged) a block first copies its rows, as they lie, into shared memory,
// 16 bytes at a time, and copies the output from there in the same way. Where the classes are apart (images: [batch,
// classes, height, width]) adjacent threads read adjacent rows, and a thread of half types takes two, so that a load is
// of 4 bytes. Any other strides come here too, one element at a time.
//
// kMost: the most classes. What an Op is: op.cuh.
#pragma once

#include "op.cuh"

namespace softmax_ext {
namespace cuda {

constexpr int kRowThreads = 128;  // of a block
constexpr int kQuad = 4;          // classes that are worked on at once

// ---- rows through shared memory ------------------------------------------------------------------------------------

// Where a row of the tile begins, in bytes. Rows of whole 16 bytes are an odd number of them apart, so that the threads
// of a warp do not meet in a few banks; others follow one another. `skip`: the first byte's place within 16 of memory.
struct Tile {
  char* bytes;
  int skip, pitch;

  DEVICE Tile(char* memory, const void* data, int row_bytes)
      : bytes(memory), skip(static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16)), pitch(row_bytes) {
    if (row_bytes % 32 == 0 && skip == 0) pitch += 16;
  }
  // Of so many rows, at most.
  __host__ __device__ static int size(int rows, int row_bytes) { return rows * (row_bytes + 16) + 32; }
  template <typename E>
  DEVICE E* row(int r) const {
    return reinterpret_cast<E*>(bytes + skip + r * pitch);
  }
};

// Copies so many elements of memory to the tile or back: 16 bytes at a time, and those one by one that are in no chunk.
// copy(in the tile, in memory).
template <typename E, typename Copy>
DEVICE void each_word(const Tile& tile, E* data, int elements, int row_bytes, const Copy& copy) {
  using Word = std::conditional_t<std::is_const<E>::value, const int4, int4>;
  const Cut<16 / sizeof(E)> cut(data, elements);
  const bool padded = tile.pitch != row_bytes;
  const float words_of_row = static_cast<float>(row_bytes / 16);
#pragma unroll 4
  for (int i = threadIdx.x; i < cut.chunks; i += kRowThreads) {
    const int padding = padded ? 16 * static_cast<int>(__fdividef(i + 0.5f, words_of_row)) : 0;
    const int at = tile.skip + cut.head * static_cast<int>(sizeof(E)) + 16 * i + padding;
    copy(reinterpret_cast<int4*>(tile.bytes + at), reinterpret_cast<Word*>(data + cut.of_chunk(i)));
  }
  const int i = cut.of_loose(threadIdx.x);
  if (static_cast<int>(threadIdx.x) < cut.loose) copy(tile.row<std::remove_const_t<E>>(0) + i, data + i);
}

// ---- one row -------------------------------------------------------------------------------------------------------

// The classes of a thread's row, four in a chunk.
template <typename Op, int kMost>
struct ThreadRow {
  static constexpr int kQuads = kMost / kQuad;
  WideChunk<Op, kQuad> quad[kQuads];

  // visit(quad, class, how many) for those that there are.
  template <typename Visit>
  DEVICE void each(int classes, const Visit& visit) {
#pragma unroll
    for (int k = 0; k < kQuads; k++)
      if (k * kQuad < classes) visit(quad[k], k * kQuad, min(kQuad, classes - k * kQuad));
  }

  // Reduces the row; returns its coefficients.
  DEVICE typename Op::Coefficients finish(const Op& op, const typename Op::Row& row, typename Op::T target_element,
                                          bool exists, Totals& total) {
    using T = typename Op::T;
    typename Op::Sums sums;
    Outcome<T> outcome;
    if (op.reduces && !op.is_skipped(row)) {
      T max = lowest<T>();
      if constexpr (Op::kMaximum)
        each(op.layout.classes, [&](const auto& held, int, int count) {
#pragma unroll
          for (int i = 0; i < kQuad; i++)
            if (i < count) max = larger(max, op.sign() * held.at(i).of[0]);
        });
      max = op.logit(op.sign() * max);
      each(op.layout.classes, [&](const auto& held, int c, int count) { op.add(sums, max, row, held, c, count); });
      if constexpr (Op::kMaximum) {
        outcome = {max, rest_of(sums.sum), 0};
        if (is_peaked(sums.sum)) {
          outcome.rest = 0;
          each(op.layout.classes,
               [&](const auto& held, int, int count) { outcome.rest += sum_without_max(op, held, max, count); });
        }
        if constexpr (Op::kPredicts) {
          First first;
          const Prediction<T> prediction{max};
          if (op.wants_prediction())
            each(op.layout.classes,
                 [&](const auto& held, int c, int count) { first.merge(prediction.in(op, held, c, count)); });
          outcome.prediction = prediction.of(first);
        }
      }
    }
    Totals share;
    const auto coefficients = op.finish(row, sums, outcome, target_element, exists, share);
    total.merge(share);
    return coefficients;
  }
};

// ---- the elements of a thread's rows -------------------------------------------------------------------------------

// Adjacent rows that a thread takes at once.
template <typename Op, bool kStaged>
constexpr int kThreadRows = !kStaged && sizeof(typename Op::In) == 2 ? 2 : 1;

// Class c of kRows rows, of which the first `count` exist; `stride` elements to the next class.
template <typename E, int kRows>
struct RowAccess {
  E* row[kRows];
  int64_t stride;
  int count;
  bool paired;  // both rows exist and are adjacent: one load or store takes both

  DEVICE RowAccess(E* first, int64_t row_stride, int64_t stride, int count) : stride(stride), count(count) {
#pragma unroll
    for (int m = 0; m < kRows; m++) row[m] = first + (m < count ? m * row_stride : 0);
    paired = kRows > 1 && count == kRows && row_stride == 1 && stride % kRows == 0 &&
             reinterpret_cast<uintptr_t>(first) % (kRows * sizeof(E)) == 0;
  }
  DEVICE Chunk<std::remove_const_t<E>, kRows> load(int c) const {
    if (paired) return load_chunk<true, kRows>(row[0] + c * stride);
    Chunk<std::remove_const_t<E>, kRows> x{};
#pragma unroll
    for (int m = 0; m < kRows; m++) x.set(m, widen(row[m][c * stride]));
    return x;
  }
  DEVICE void store(int c, const Chunk<E, kRows>& x) const {
    if (paired) return store_chunk(row[0] + c * stride, x);
#pragma unroll
    for (int m = 0; m < kRows; m++)
      if (m < count) narrow(x[m], row[m][c * stride]);
  }
};

// ---- the kernel ----------------------------------------------------------------------------------------------------

// `rows` of a block, of which there are `tiles` for each outer index.
template <typename Op, int kMost, bool kStaged>
__global__ void __launch_bounds__(kRowThreads, (kMost * kThreadRows<Op, kStaged> * Op::kInputs > 32 ? 2 : 3))
    thread_rows(const __grid_constant__ Op op, int rows, unsigned tiles) {
  using In = typename Op::In;
  using Out = typename Op::Out;
  constexpr int kRows = kThreadRows<Op, kStaged>;
  if (op.is_done()) return;
  const DeviceLayout& layout = op.layout;
  const int classes = layout.classes;
  const unsigned outer = blockIdx.x / tiles;
  const int64_t first = static_cast<int64_t>(blockIdx.x - outer * tiles) * rows;
  const int here = static_cast<int>(min(layout.inner - first, static_cast<int64_t>(rows)));
  const Position begin = locate(layout, outer, first);
  const auto input = [&](int j) { return op.input(j) + begin.offset[Op::input_operand(j)]; };
  Out* const output = op.output() + begin.offset[Op::kOutputOperand];
  const int input_bytes = classes * static_cast<int>(sizeof(In)), tile_bytes = Tile::size(rows, input_bytes);
  const auto input_tile = [&](int j) { return Tile(shared_memory<char>() + j * tile_bytes, input(j), input_bytes); };
  const int output_bytes = classes * static_cast<int>(sizeof(Out));
  const Tile output_tile(shared_memory<char>() + Op::kInputs * tile_bytes, output, output_bytes);

  if constexpr (kStaged) {
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++)
      each_word(input_tile(j), input(j), here * classes, input_bytes, [](auto* to, const auto* from) { *to = *from; });
    __syncthreads();
  }

  Totals total;
  for (int r = threadIdx.x * kRows; r < here; r += kRowThreads * kRows) {
    const auto access = [&](auto* memory, const Tile& tile, int operand) {
      using E = std::remove_pointer_t<decltype(memory)>;
      if constexpr (kStaged) return RowAccess<E, kRows>(tile.template row<E>(r), 0, 1, 1);
      return RowAccess<E, kRows>(memory + r * layout.inner_stride[operand], layout.inner_stride[operand],
                                 layout.class_stride[operand], min(kRows, here - r));
    };

    // Load.
    ThreadRow<Op, kMost> held[kRows];
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) {
      const auto from = access(input(j), input_tile(j), Op::input_operand(j));
#pragma unroll
      for (int c = 0; c < kMost; c++) {
        if (c / kQuad * kQuad >= classes) break;
        if (c >= classes) continue;
        const Chunk<In, kRows> x = from.load(c);
#pragma unroll
        for (int m = 0; m < kRows; m++) held[m].quad[c / kQuad].value[j][c % kQuad] = x[m];
      }
    }

    // Reduce.
    typename Op::Row row[kRows];
    typename Op::Coefficients coefficients[kRows];
    const auto logits = access(input(0), input_tile(0), Op::input_operand(0));
#pragma unroll
    for (int m = 0; m < kRows; m++) {
      const bool exists = r + m < here;
      row[m] = op.row(advanced(layout, begin, r + (exists ? m : 0)));
      const int target = op.target(row[m]);
      const auto target_element = target < 0 ? typename Op::T(0) : widen(logits.row[m][target * logits.stride]);
      coefficients[m] = held[m].finish(op, row[m], target_element, exists, total);
    }

    // Write.
    if (!op.writes_anything()) continue;
    const auto to = access(output, output_tile, Op::kOutputOperand);
#pragma unroll
    for (int k = 0; k < kMost / kQuad; k++) {
      if (k * kQuad >= classes) break;
      const int count = min(kQuad, classes - k * kQuad);
      typename Op::T values[kRows][kQuad] = {};
#pragma unroll
      for (int m = 0; m < kRows; m++)
        if (!op.is_zero(row[m])) op.compute(row[m], coefficients[m], held[m].quad[k], k * kQuad, count, values[m]);
#pragma unroll
      for (int i = 0; i < kQuad; i++) {
        if (i >= count || !op.output()) break;
        Chunk<Out, kRows> out{};
#pragma unroll
        for (int m = 0; m < kRows; m++) out.set(m, values[m][i]);
        to.store(k * kQuad + i, out);
      }
    }
#pragma unroll
    for (int m = 0; m < kRows; m++) {
      const int target = op.target(row[m]);
      if (m < to.count && target >= 0) op.write_target(row[m], coefficients[m], to.row[m] + target * to.stride);
    }
  }

  if constexpr (kStaged) {
    __syncthreads();
    if (op.output())
      each_word(output_tile, output, here * classes, output_bytes, [](const auto* from, auto* to) { *to = *from; });
  }
  if (op.has_total()) {
    __syncthreads();
    reduce_block(total, shared_memory<Totals>());
    if (threadIdx.x < kWarp) op.add_to_total(total, blockIdx.x, threadIdx.x == 0);
  }
}

}  // namespace cuda
}  // namespace softmax_ext
