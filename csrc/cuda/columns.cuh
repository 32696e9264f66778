// The kernels for rows whose classes are apart in memory, or too few for more than a thread: tile_rows, which takes a tile
// of rows through shared memory, a thread to each row, and stream_columns, where the lanes of a warp are adjacent rows.
// Op is as in rows.cuh.
#pragma once

#include "rows.cuh"

namespace softmax_ext {
namespace cuda {

// How the rows of a tile lie in one operand, from class 0 of its first row on.
struct TilePlace {
  int64_t class_stride, row_stride;
  int classes, rows;

  // All elements follow one another.
  __device__ __forceinline__ bool linear() const { return class_stride == 1 && row_stride == classes; }
};

// ---- a thread to a row ---------------------------------------------------------------------------------------------

constexpr int kTileRows = 128;
constexpr int kSummedClasses = 16;  // between two merges of a row's sums, so that roundings do not add up

// The tile in shared memory: [rows, classes] of T, the rows an odd number of elements apart, so that neither a warp's rows
// nor its classes share a bank.
__host__ __device__ inline int tile_pitch(int64_t classes) { return static_cast<int>(classes) | 1; }

// A thread's way over the elements of a tile that is not linear, blockDim.x at a time, the nearer ones in memory first.
// Without a division for each element, which would take longer than its load.
class TileWalk {
 public:
  int r, c;

  __device__ __forceinline__ explicit TileWalk(const TilePlace& place)
      : along_classes_(place.class_stride < place.row_stride),
        place_(place),
        fast_(max(1, along_classes_ ? place.classes : place.rows)),
        slow_step_(blockDim.x / fast_),
        fast_step_(blockDim.x - slow_step_ * fast_) {
    const int slow = threadIdx.x / fast_;
    move_to(slow, threadIdx.x - slow * fast_);
  }

  __device__ __forceinline__ bool inside() const { return r < place_.rows && c < place_.classes; }
  __device__ __forceinline__ int64_t offset() const { return c * place_.class_stride + r * place_.row_stride; }
  __device__ __forceinline__ void advance() {
    const int fast = (along_classes_ ? c : r) + fast_step_, over = fast >= fast_;
    move_to((along_classes_ ? r : c) + slow_step_ + over, over ? fast - fast_ : fast);
  }

 private:
  __device__ __forceinline__ void move_to(int slow, int fast) {
    r = along_classes_ ? slow : fast;
    c = along_classes_ ? fast : slow;
  }

  bool along_classes_;
  TilePlace place_;
  int fast_, slow_step_, fast_step_;
};

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

template <typename E, typename T>
__device__ __forceinline__ void load_tile(const E* data, const TilePlace& place, T* tile) {
  const int pitch = tile_pitch(place.classes);
  if (!place.linear()) {
    constexpr int kAtOnce = 8;  // loads that are under way before the first value is used
    for (TileWalk walk(place); walk.inside();) {
      E x[kAtOnce];
      int to[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++, walk.advance()) {
        to[k] = walk.inside() ? walk.r * pitch + walk.c : -1;
        if (to[k] >= 0) x[k] = data[walk.offset()];
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; k++)
        if (to[k] >= 0) tile[to[k]] = widen(x[k]);
    }
    return;
  }
  const Cut<E> cut(data, place.rows * place.classes);
  const Row<const E, E> row(data, cut);
  for (int chunk = threadIdx.x; chunk < cut.chunks; chunk += blockDim.x) {
    const auto loaded = row.template load<false>(cut.of_chunk(chunk));
    each_adjacent<Cut<E>::kSize>(cut.of_chunk(chunk), place.classes,
                                 [&](int i, int r, int c) { tile[r * pitch + c] = widen(loaded.element[i]); });
  }
  if (static_cast<int>(threadIdx.x) < cut.loose)
    each_adjacent<1>(cut.of_loose(threadIdx.x), place.classes,
                     [&](int, int r, int c) { tile[r * pitch + c] = widen(data[r * place.classes + c]); });
}

template <typename E, typename T>
__device__ __forceinline__ void store_tile(const T* tile, const TilePlace& place, E* data) {
  const int pitch = tile_pitch(place.classes);
  if (!place.linear()) {
    for (TileWalk walk(place); walk.inside(); walk.advance())
      narrow(tile[walk.r * pitch + walk.c], data[walk.offset()]);
    return;
  }
  const Cut<E> cut(data, place.rows * place.classes);
  const Row<E, E> row(data, cut);
  for (int chunk = threadIdx.x; chunk < cut.chunks; chunk += blockDim.x) {
    Chunk<E, Cut<E>::kSize> out;
    each_adjacent<Cut<E>::kSize>(cut.of_chunk(chunk), place.classes,
                                 [&](int i, int r, int c) { narrow(tile[r * pitch + c], out.element[i]); });
    row.store(cut.of_chunk(chunk), out);
  }
  if (static_cast<int>(threadIdx.x) < cut.loose)
    each_adjacent<1>(cut.of_loose(threadIdx.x), place.classes,
                     [&](int, int r, int c) { narrow(tile[r * pitch + c], data[r * place.classes + c]); });
}

// One row of the tile, by one thread: the elements give way to the output.
template <typename Op>
__device__ __forceinline__ void visit_tile_row(const Op& op, const Position& at, typename Op::T* const* inputs) {
  const int classes = op.layout.classes;
  const auto elements = [&](int c) {
    Elements<Op> x;
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) x.of[j] = inputs[j][c];
    return x;
  };
  auto context = op.begin(at);
  op.keep(context, true, [&](int c) { return inputs[0][c]; });
  const bool skips = op.skips(context);
  typename Op::Sums sums;
  if (op.reduces && !skips) {
    if constexpr (Op::kMaximum) {
      typename Op::T max = sums.max;
      for (int c = 0; c < classes; c++) max = larger(max, op.level(elements(c)));
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
  if (!op.writes && !op.has_extra) return;
  const bool clears = op.clears(context);
  if (op.has_extra && !clears)
    for (int c = 0; c < classes; c++) op.extra(context, coefficients, elements(c), c);
  for (int c = 0; c < classes; c++)
    inputs[0][c] = clears ? typename Op::T(0) : op.value(context, coefficients, elements(c), c);
  int c;
  typename Op::T value;
  if (op.apart(context, coefficients, c, value)) inputs[0][c] = value;
}

template <typename Op>
__global__ void __launch_bounds__(kTileRows)
    tile_rows(const __grid_constant__ Op op, int rows_per_tile, unsigned tiles) {
  if (op.idle()) return;
  const DeviceLayout& layout = op.layout;
  const unsigned outer = blockIdx.x / tiles;
  const int64_t first = static_cast<int64_t>(blockIdx.x - outer * tiles) * rows_per_tile;
  const int rows = static_cast<int>(min(layout.inner - first, static_cast<int64_t>(rows_per_tile)));
  const int classes = layout.classes, pitch = tile_pitch(classes);
  const Position at = locate(layout, outer, first);
  const auto place = [&](int operand) {
    return TilePlace{layout.class_stride[operand], layout.inner_stride[operand], classes, rows};
  };
  typename Op::T* const shared = shared_memory<typename Op::T>();
#pragma unroll
  for (int j = 0; j < Op::kInputs; j++)
    load_tile(op.input(j, at), place(Op::input_operand(j)), shared + j * rows_per_tile * pitch);
  __syncthreads();
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    typename Op::T* inputs[Op::kInputs];
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) inputs[j] = shared + (j * rows_per_tile + r) * pitch;
    visit_tile_row(op, locate(layout, outer, first + r), inputs);
  }
  __syncthreads();
  if (op.writes) store_tile(shared, place(Op::kOutputOperand), op.output(at));
}

// ---- a lane to a row -----------------------------------------------------------------------------------------------

constexpr int kColumnWarps = 16;

// Merges the sums of the warps of a block lane by lane, through `shared` [kColumnWarps, kWarp].
template <typename V>
__device__ __forceinline__ void reduce_columns(V& value, V* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  shared[warp * kWarp + lane] = value;
  __syncthreads();
  for (int half = kColumnWarps / 2; half > 0; half /= 2) {
    if (warp < half) {
      value.merge(shared[(warp + half) * kWarp + lane]);
      shared[warp * kWarp + lane] = value;
    }
    __syncthreads();
  }
  value = shared[lane];
}

// The row of a lane.
template <typename Op>
struct Column {
  const typename Op::In* input[Op::kInputs];
  int64_t stride[Op::kInputs];

  __device__ __forceinline__ Column(const Op& op, const Position& at) {
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) {
      input[j] = op.input(j, at);
      stride[j] = op.layout.class_stride[Op::input_operand(j)];
    }
  }
  __device__ __forceinline__ Elements<Op> load(int c) const {
    Elements<Op> x;
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) x.of[j] = widen(input[j][c * stride[j]]);
    return x;
  }
};

template <typename Op>
__global__ void __launch_bounds__(kColumnWarps* kWarp, 1)
    stream_columns(const __grid_constant__ Op op, unsigned tiles) {
  constexpr int kClasses = Op::kStreamChunks;
  if (op.idle()) return;
  const DeviceLayout& layout = op.layout;
  const unsigned outer = blockIdx.x / tiles;
  const int64_t inner = static_cast<int64_t>(blockIdx.x - outer * tiles) * kWarp + threadIdx.x % kWarp;
  const bool exists = inner < layout.inner, leader = exists && threadIdx.x < kWarp;
  const Position at = locate(layout, outer, exists ? inner : 0);
  auto context = op.begin(at);
  const bool skips = op.skips(context);
  const Column<Op> column(op, at);
  op.keep(context, leader, [&](int c) { return column.load(c).of[0]; });
  const int first = threadIdx.x / kWarp, last = exists ? layout.classes : 0;
  LongSums<Op> sums;
  if (op.reduces) {
    int c = skips ? last : first;
    for (; c + (kClasses - 1) * kColumnWarps < last; c += kClasses * kColumnWarps) {
      Elements<Op> x[kClasses];
#pragma unroll
      for (int k = 0; k < kClasses; k++) x[k] = column.load(c + k * kColumnWarps);
      add_elements<kClasses>(
          op, context, sums.next(kClasses), [&](int k) { return x[k]; }, [&](int k) { return c + k * kColumnWarps; });
    }
    for (; c < last; c += kColumnWarps) add_one(op, context, sums.next(1), column.load(c), c);
    sums.close();
    reduce_columns(sums.total, shared_memory<typename Op::Sums>());
  } else {
    __syncthreads();
  }
  const auto coefficients = op.finish(context, sums.total, leader);
  if (!op.writes && !op.has_extra) return;
  const bool clears = op.clears(context);
  typename Op::Out* const output = op.output(at);
  const int64_t stride = layout.class_stride[Op::kOutputOperand];
#pragma unroll 4
  for (int c = first; c < last; c += kColumnWarps) {
    const Elements<Op> x = column.load(c);
    if (op.has_extra && !clears) op.extra(context, coefficients, x, c);
    if (op.writes) narrow(clears ? typename Op::T(0) : op.value(context, coefficients, x, c), output[c * stride]);
  }
  __syncthreads();
  int c;
  typename Op::T value;
  if (op.writes && leader && op.apart(context, coefficients, c, value)) narrow(value, output[c * stride]);
}

}  // namespace cuda
}  // namespace softmax_ext
