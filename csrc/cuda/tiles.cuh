// The kernel for rows of few classes, wherever these lie: tile_rows takes a tile of rows through shared memory, each
// row by one thread. Op is as in rows.cuh.
#pragma once

#include "rows.cuh"

namespace softmax_ext {
namespace cuda {

constexpr int kTileThreads = 128;
constexpr int kTileBlocks = 7;      // that are to fit on a multiprocessor
constexpr int kSummedClasses = 16;  // between two merges of a row's sums, so that roundings do not add up

// How the rows of a tile lie in one operand, from class 0 of its first row on.
struct TilePlace {
  int64_t class_stride, row_stride;
  int classes, rows;

  // All elements follow one another.
  __device__ __forceinline__ bool linear() const { return class_stride == 1 && row_stride == classes; }
  __device__ __forceinline__ bool rows_are_nearer() const { return row_stride < class_stride; }
};

// ---- the tile in shared memory -------------------------------------------------------------------------------------

// Elements from one row to the next in a tile whose classes are adjacent. That a tile can be copied as it lies, the
// rows follow one another, unless the threads of a warp would meet in a few banks then.
__host__ __device__ inline int tile_pitch(int64_t classes) {
  return static_cast<int>(classes % 4 == 0 ? classes + 1 : classes);
}

// Of T, for as many rows as `capacity`, a multiple of kWarp. Classes are adjacent, or rows where those are in memory.
template <typename T>
struct Tile {
  T* data;
  int row_pitch, class_pitch;

  __device__ __forceinline__ Tile(T* data, bool rows_adjacent, int classes, int capacity)
      : data(data), row_pitch(rows_adjacent ? 1 : tile_pitch(classes)), class_pitch(rows_adjacent ? capacity : 1) {}

  __device__ __forceinline__ int at(int r, int c) const { return r * row_pitch + c * class_pitch; }
  __device__ __forceinline__ bool linear(int classes) const { return class_pitch == 1 && row_pitch == classes; }
};

// kCount adjacent elements of the tile, from a multiple of kCount on.
template <int kCount, typename E, typename T>
__device__ __forceinline__ void put(T* to, const Chunk<E, kCount>& from) {
  Chunk<T, kCount> wide;
#pragma unroll
  for (int i = 0; i < kCount; i++) wide.element[i] = widen(from.element[i]);
  *reinterpret_cast<Chunk<T, kCount>*>(to) = wide;
}

template <int kCount, typename E, typename T>
__device__ __forceinline__ Chunk<E, kCount> take(const T* from) {
  const Chunk<T, kCount> wide = *reinterpret_cast<const Chunk<T, kCount>*>(from);
  Chunk<E, kCount> narrowed;
#pragma unroll
  for (int i = 0; i < kCount; i++) narrow(wide.element[i], narrowed.element[i]);
  return narrowed;
}

// ---- between memory and the tile -----------------------------------------------------------------------------------

// Loads that a thread has under way before it uses the first: of 16 bytes, or of one element.
constexpr int kTileLoads = 4;
constexpr int kElementLoads = 8;

// A thread's way over the elements of a tile, blockDim.x at a time, the nearer ones in memory first; with kRows > 1, of
// kRows adjacent rows each. Without a division for each element, which would take longer than its load.
template <int kRows>
class TileWalk {
 public:
  int r, c;  // the first row

  __device__ __forceinline__ explicit TileWalk(const TilePlace& place)
      : along_rows_(kRows > 1 || place.rows_are_nearer()),
        place_(place),
        fast_(max(1, along_rows_ ? place.rows / kRows : place.classes)),
        slow_step_(blockDim.x / fast_),
        fast_step_(blockDim.x - slow_step_ * fast_) {
    const int slow = threadIdx.x / fast_;
    move_to(slow, threadIdx.x - slow * fast_);
  }

  __device__ __forceinline__ bool inside() const { return r < place_.rows && c < place_.classes; }
  __device__ __forceinline__ int64_t offset() const { return c * place_.class_stride + r * place_.row_stride; }
  __device__ __forceinline__ void advance() {
    const int fast = (along_rows_ ? r / kRows : c) + fast_step_, over = fast >= fast_;
    move_to((along_rows_ ? c : r) + slow_step_ + over, over ? fast - fast_ : fast);
  }

 private:
  __device__ __forceinline__ void move_to(int slow, int fast) {
    r = along_rows_ ? fast * kRows : slow;
    c = along_rows_ ? slow : fast;
  }

  bool along_rows_;
  TilePlace place_;
  int fast_, slow_step_, fast_step_;
};

// Whether rows are adjacent in memory and in the tile, and 16 bytes of a class begin where 16 bytes do.
template <typename E, typename T>
__device__ __forceinline__ bool rows_in_chunks(const E* data, const TilePlace& place, const Tile<T>& tile) {
  constexpr int kSize = Cut<E>::kSize;
  return place.row_stride == 1 && tile.row_pitch == 1 && place.rows % kSize == 0 && place.class_stride % kSize == 0 &&
         reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Calls visit(i, row, class) for n adjacent elements of a linear tile, of which the first is number `at`.
template <int kCount, typename Visit>
__device__ __forceinline__ void each_adjacent(int at, int classes, const Visit& visit) {
  int r = at / classes, c = at - r * classes;
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    visit(i, r, c);
    if (++c == classes) {
      c = 0;
      r++;
    }
  }
}

// All elements follow one another in memory.
template <typename E, typename T>
__device__ __forceinline__ void load_linear(const E* data, const TilePlace& place, const Tile<T>& tile) {
  constexpr int kSize = Cut<E>::kSize;
  const Cut<E> cut(data, place.rows * place.classes);
  const Row<const E, E> row(data, cut);
  const bool copies = tile.linear(place.classes) && cut.head == 0;
  const int step = blockDim.x;
  for (int first = threadIdx.x; first < cut.chunks; first += kTileLoads * step) {
    Chunk<E, kSize> x[kTileLoads];
#pragma unroll
    for (int k = 0; k < kTileLoads; k++)
      if (first + k * step < cut.chunks) x[k] = row.template load<false>(cut.of_chunk(first + k * step));
#pragma unroll
    for (int k = 0; k < kTileLoads; k++) {
      const int chunk = first + k * step;
      if (chunk >= cut.chunks) break;
      if (copies)
        put<kSize>(tile.data + chunk * kSize, x[k]);
      else
        each_adjacent<kSize>(cut.of_chunk(chunk), place.classes,
                             [&](int i, int r, int c) { tile.data[tile.at(r, c)] = widen(x[k].element[i]); });
    }
  }
  if (static_cast<int>(threadIdx.x) < cut.loose)
    each_adjacent<1>(cut.of_loose(threadIdx.x), place.classes,
                     [&](int, int r, int c) { tile.data[tile.at(r, c)] = widen(data[r * place.classes + c]); });
}

template <typename E, typename T>
__device__ __forceinline__ void store_linear(const Tile<T>& tile, const TilePlace& place, E* data) {
  constexpr int kSize = Cut<E>::kSize;
  const Cut<E> cut(data, place.rows * place.classes);
  const Row<E, E> row(data, cut);
  const bool copies = tile.linear(place.classes) && cut.head == 0;
  for (int chunk = threadIdx.x; chunk < cut.chunks; chunk += blockDim.x) {
    Chunk<E, kSize> out;
    if (copies)
      out = take<kSize, E>(tile.data + chunk * kSize);
    else
      each_adjacent<kSize>(cut.of_chunk(chunk), place.classes,
                           [&](int i, int r, int c) { narrow(tile.data[tile.at(r, c)], out.element[i]); });
    row.store(cut.of_chunk(chunk), out);
  }
  if (static_cast<int>(threadIdx.x) < cut.loose)
    each_adjacent<1>(cut.of_loose(threadIdx.x), place.classes,
                     [&](int, int r, int c) { narrow(tile.data[tile.at(r, c)], data[r * place.classes + c]); });
}

// Rows are adjacent: rows_in_chunks().
template <typename E, typename T>
__device__ __forceinline__ void load_adjacent_rows(const E* data, const TilePlace& place, const Tile<T>& tile) {
  constexpr int kSize = Cut<E>::kSize;
  for (TileWalk<kSize> walk(place); walk.inside();) {
    Chunk<E, kSize> x[kTileLoads];
    int to[kTileLoads];
#pragma unroll
    for (int k = 0; k < kTileLoads; k++, walk.advance()) {
      to[k] = walk.inside() ? tile.at(walk.r, walk.c) : -1;
      if (to[k] >= 0) {
        const int4 words = __ldcs(reinterpret_cast<const int4*>(data + walk.offset()));
        memcpy(&x[k], &words, sizeof words);
      }
    }
#pragma unroll
    for (int k = 0; k < kTileLoads; k++)
      if (to[k] >= 0) put<kSize>(tile.data + to[k], x[k]);
  }
}

template <typename E, typename T>
__device__ __forceinline__ void store_adjacent_rows(const Tile<T>& tile, const TilePlace& place, E* data) {
  constexpr int kSize = Cut<E>::kSize;
  for (TileWalk<kSize> walk(place); walk.inside(); walk.advance()) {
    const Chunk<E, kSize> x = take<kSize, E>(tile.data + tile.at(walk.r, walk.c));
    int4 words;
    memcpy(&words, &x, sizeof words);
    __stcs(reinterpret_cast<int4*>(data + walk.offset()), words);
  }
}

// Any strides, one element at a time.
template <typename E, typename T>
__device__ __forceinline__ void load_elements(const E* data, const TilePlace& place, const Tile<T>& tile) {
  for (TileWalk<1> walk(place); walk.inside();) {
    E x[kElementLoads];
    int to[kElementLoads];
#pragma unroll
    for (int k = 0; k < kElementLoads; k++, walk.advance()) {
      to[k] = walk.inside() ? tile.at(walk.r, walk.c) : -1;
      if (to[k] >= 0) x[k] = data[walk.offset()];
    }
#pragma unroll
    for (int k = 0; k < kElementLoads; k++)
      if (to[k] >= 0) tile.data[to[k]] = widen(x[k]);
  }
}

template <typename E, typename T>
__device__ __forceinline__ void store_elements(const Tile<T>& tile, const TilePlace& place, E* data) {
  for (TileWalk<1> walk(place); walk.inside(); walk.advance())
    narrow(tile.data[tile.at(walk.r, walk.c)], data[walk.offset()]);
}

template <typename E, typename T>
__device__ __forceinline__ void load_tile(const E* data, const TilePlace& place, const Tile<T>& tile) {
  if (place.linear())
    load_linear(data, place, tile);
  else if (rows_in_chunks(data, place, tile))
    load_adjacent_rows(data, place, tile);
  else
    load_elements(data, place, tile);
}

template <typename E, typename T>
__device__ __forceinline__ void store_tile(const Tile<T>& tile, const TilePlace& place, E* data) {
  if (place.linear())
    store_linear(tile, place, data);
  else if (rows_in_chunks(data, place, tile))
    store_adjacent_rows(tile, place, data);
  else
    store_elements(tile, place, data);
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

// One row, by one thread: the elements inputs[j][c * pitch] give way to the output.
template <typename Op>
__device__ __forceinline__ void visit_tile_row(const Op& op, typename Op::Context& context,
                                               typename Op::T* const* inputs, int pitch) {
  const int classes = op.layout.classes;
  const auto elements = [&](int c) {
    Elements<Op> x;
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) x.of[j] = inputs[j][c * pitch];
    return x;
  };
  op.decode_target(context);
  op.read_target_logit(context, true, [&](int c) { return inputs[0][c * pitch]; });
  const bool skip_row = op.skip_row(context);
  typename Op::Sums sums;
  if (op.reduces && !skip_row) {
    if constexpr (Op::kMaximum) {
      typename Op::T max = sums.max;
      for (int c = 0; c < classes; c++) max = larger(max, op.logit(elements(c)));
      sums.raise(max);
    }
    for (int begin = 0; begin < classes; begin += kSummedClasses) {
      typename Op::Sums part;
      if constexpr (Op::kMaximum) part.max = sums.max;
      for (int c = begin; c < min(classes, begin + kSummedClasses); c++) op.add(part, context, elements(c), c);
      sums.join(part);
    }
  }
  const auto coefficients = op.finish(context, sums, true);
  if (!op.writes && !op.writes_second) return;
  const bool zero_gradient = op.zero_gradient(context);
  if (op.writes_second && !zero_gradient)
    for (int c = 0; c < classes; c++) op.write_second(context, coefficients, elements(c), c);
  for (int c = 0; c < classes; c++)
    inputs[0][c * pitch] = zero_gradient ? typename Op::T(0) : op.value(context, coefficients, elements(c), c);
  int c;
  typename Op::T value;
  if (op.target_override(context, coefficients, c, value)) inputs[0][c * pitch] = value;
}

template <typename Op>
__global__ void __launch_bounds__(kTileThreads, sizeof(typename Op::T) == 8 ? 1 : kTileBlocks)
    tile_rows(const __grid_constant__ Op op, int rows_per_tile, unsigned tiles) {
  if (op.is_noop()) return;
  const DeviceLayout& layout = op.layout;
  const unsigned outer = blockIdx.x / tiles;
  const int64_t first = static_cast<int64_t>(blockIdx.x - outer * tiles) * rows_per_tile;
  const int rows = static_cast<int>(min(layout.inner - first, static_cast<int64_t>(rows_per_tile)));
  const int classes = layout.classes;
  const auto place = [&](int operand) {
    return TilePlace{layout.class_stride[operand], layout.inner_stride[operand], classes, rows};
  };
  const bool rows_adjacent = place(Op::input_operand(0)).rows_are_nearer();
  const auto tile = [&](int j) {
    typename Op::T* const shared = shared_memory<typename Op::T>();
    return Tile<typename Op::T>(shared + j * rows_per_tile * tile_pitch(classes), rows_adjacent, classes,
                                rows_per_tile);
  };
  const auto fetch = [&](int r) { return op.fetch(locate(layout, outer, first + min(r, rows - 1))); };
  const Position at = locate(layout, outer, first);
  auto context = fetch(threadIdx.x);
#pragma unroll
  for (int j = 0; j < Op::kInputs; j++) load_tile(op.input(j, at), place(Op::input_operand(j)), tile(j));
  __syncthreads();
  for (int r = threadIdx.x; r < rows; r += kTileThreads) {
    const auto next = fetch(r + kTileThreads);
    typename Op::T* inputs[Op::kInputs];
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) inputs[j] = tile(j).data + tile(j).at(r, 0);
    visit_tile_row(op, context, inputs, tile(0).class_pitch);
    context = next;
  }
  __syncthreads();
  if (op.writes) store_tile(tile(0), place(Op::kOutputOperand), op.output(at));
}

}  // namespace cuda
}  // namespace softmax_ext
