// The kernel for rows of many classes that are not adjacent in memory: lane_rows, in which the lanes of a warp are
// adjacent rows. Op is as in rows.cuh.
#pragma once

#include "rows.cuh"

namespace softmax_ext {
namespace cuda {

// Merges the sums of the warps of a block, a power of two, lane by lane, through `shared` [warps, kWarp].
template <typename V>
__device__ __forceinline__ void reduce_columns(V& value, V* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  shared[warp * kWarp + lane] = value;
  __syncthreads();
  for (int half = warps / 2; half > 0; half /= 2) {
    if (warp < half) {
      value.merge(shared[(warp + half) * kWarp + lane]);
      shared[warp * kWarp + lane] = value;
    }
    __syncthreads();
  }
  value = shared[lane];
}

// The pointer n elements on. The compiler does not see where it came from: otherwise it would hold the offsets of a
// whole loop, for which it has no registers.
template <typename E>
__device__ __forceinline__ E* advanced(E* pointer, int64_t n) {
  pointer += n;
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(pointer));
#endif
  return pointer;
}

// The row of a lane, of which its thread takes the classes `first`, `first` + step, ..., below `last`.
template <typename Op>
struct Column {
  static constexpr int kClasses = Op::kColumns.classes;
  const typename Op::In* input[Op::kInputs];
  int64_t stride[Op::kInputs];
  int first, last, step;

  __device__ __forceinline__ Column(const Op& op, const Position& at, int first, int last, int step)
      : first(first), last(last), step(step) {
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) {
      input[j] = op.input(j, at);
      stride[j] = op.layout.class_stride[Op::input_operand(j)];
    }
  }
  __device__ __forceinline__ Elements<Op> load_one(int c) const {
    Elements<Op> x;
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) x.of[j] = widen(input[j][c * stride[j]]);
    return x;
  }

  // kClasses of the thread's classes, as they are stored: all are under way before the first is used.
  struct Part {
    typename Op::In element[kClasses][Op::kInputs];

    __device__ __forceinline__ Elements<Op> elements(int k) const {
      Elements<Op> x;
#pragma unroll
      for (int j = 0; j < Op::kInputs; j++) x.of[j] = widen(element[k][j]);
      return x;
    }
  };
  __device__ __forceinline__ Part load(int c) const {
    Part part;
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) {
      const typename Op::In* from = input[j] + c * stride[j];
#pragma unroll
      for (int k = 0; k < kClasses; k++, from = advanced(from, step * stride[j]))
        if (c + k * step < last) part.element[k][j] = *from;
    }
    return part;
  }

  __device__ __forceinline__ void add(const Op& op, const typename Op::Context& context, const Part& part, int c,
                                      typename Op::Sums& sums) const {
    if constexpr (Op::kMaximum) {
      typename Op::T max = sums.max;
#pragma unroll
      for (int k = 0; k < kClasses; k++)
        if (c + k * step < last) max = larger(max, op.logit(part.elements(k)));
      sums.raise(max);
    }
#pragma unroll
    for (int k = 0; k < kClasses; k++)
      if (c + k * step < last) op.add(sums, context, part.elements(k), c + k * step);
  }

  __device__ __forceinline__ void write(const Op& op, const typename Op::Context& context,
                                        const typename Op::Coefficients& coefficients, const Part& part, int c,
                                        bool zero_gradient, typename Op::Out* output, int64_t output_stride) const {
    typename Op::Out* to = output + c * output_stride;
#pragma unroll
    for (int k = 0; k < kClasses; k++, to = advanced(to, step * output_stride)) {
      const int own = c + k * step;
      if (own >= last) break;
      const Elements<Op> x = part.elements(k);
      if (op.writes_second && !zero_gradient) op.write_second(context, coefficients, x, own);
      if (op.writes) narrow(zero_gradient ? typename Op::T(0) : op.value(context, coefficients, x, own), *to);
    }
  }
};

// Rows of few classes stay in registers, others are read again.
template <typename Op>
__global__ void __launch_bounds__(Op::kColumns.warps* kWarp, 2)
    lane_rows(const __grid_constant__ Op op, unsigned tiles) {
  constexpr int kClasses = Op::kColumns.classes;
  if (op.is_noop()) return;
  const DeviceLayout& layout = op.layout;
  const unsigned outer = blockIdx.x / tiles;
  const int64_t inner = static_cast<int64_t>(blockIdx.x - outer * tiles) * kWarp + threadIdx.x % kWarp;
  const bool exists = inner < layout.inner, leader = exists && threadIdx.x < kWarp;
  const Position at = locate(layout, outer, exists ? inner : 0);
  auto context = op.fetch(at);
  const Column<Op> column(op, at, threadIdx.x / kWarp, exists ? layout.classes : 0, blockDim.x / kWarp);
  auto part = column.load(column.first);
  op.decode_target(context);
  op.read_target_logit(context, leader, [&](int c) { return column.load_one(c).of[0]; });
  LongSums<Op> sums;
  if (op.reduces) {
    for (int c = column.first; c < column.last && !op.skip_row(context);) {
      column.add(op, context, part, c, sums.next(kClasses));
      c += kClasses * column.step;
      if (c < column.last) part = column.load(c);
    }
    sums.close();
    reduce_columns(sums.total, shared_memory<typename Op::Sums>());
  }
  const auto coefficients = op.finish(context, sums.total, leader);
  if (!op.writes && !op.writes_second) return;
  if (!op.reduces && op.overwrites()) __syncthreads();  // the leader has read the target's logit
  const bool zero_gradient = op.zero_gradient(context);
  typename Op::Out* const output = op.output(at);
  const int64_t stride = layout.class_stride[Op::kOutputOperand];
  const bool in_registers = !op.reduces || column.last <= kClasses * column.step;
  for (int c = column.first; c < column.last; c += kClasses * column.step) {
    if (!in_registers || c != column.first) part = column.load(c);
    column.write(op, context, coefficients, part, c, zero_gradient, output, stride);
  }
  __syncthreads();
  int c;
  typename Op::T value;
  if (op.writes && leader && op.target_override(context, coefficients, c, value)) narrow(value, output[c * stride]);
}

}  // namespace cuda
}  // namespace softmax_ext
