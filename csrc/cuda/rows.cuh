// The kernels for rows whose classes are adjacent in memory. register_rows holds a row in registers between its
// reduction and its output. two_pass_rows reads it a second time.
//
// Both, and those of columns.cuh and tiles.cuh, are written over an Op, which says what is reduced and what is written:
//
//   In, Out, T            type of the inputs' elements, of the output's, and of the arithmetic
//   kInputs               how many inputs of the row's length there are
//   kMaximum              whether Sums have a maximum, which is to be raised before anything is added
//   kTwoPassChunks        16-byte chunks of each input that two_pass_rows loads at once
//   kRegisterChunks       16-byte chunks of each input that a thread can hold; 0: the row is always read again
//   kColumns              the shape of lane_rows (columns.cuh)
//   Sums                  what the reduction collects; they merge as in sums.cuh
//   Context               what is known of one row
//   Coefficients          what the output is computed from
//   layout                DeviceLayout
//   reduces, writes       whether there is a reduction, and an output
//   writes_second         whether there is a second output; register_rows has none
//
// Functions that say what a call needs:
//
//   never_in_registers()  false in every launch of register_rows; lets the compiler drop what hangs on it
//   is_noop()             whether the output is there already
//   overwrites()          whether the output takes the memory that read_target_logit() reads
//
// and those of one row, in the order in which they are called. Loads take long, so that whatever does not need what is
// loaded comes first.
//
//   input(i, at), output(at)                   where the row begins
//   fetch(at) -> Context                       loads the row's target and state; nothing waits for them yet
//   [the loads of the row's first chunks are issued here]
//   decode_target(context)                     waits for the target
//   skip_row(context)                          whether the row is not read, and its output is 0
//   [the loads of its other chunks]
//   read_target_logit(context, leader, value)  the leader alone reads value(y), the logit of the target class, now: the
//                                              output may overwrite it
//   logit(x)                                   of the elements x of all inputs: what the maximum is taken of
//   add(sums, context, x, c)                   adds class c; sums.max is no smaller than its logit
//   finish(context, sums, leader) -> Coefficients
//                                              the leader writes what there is of the row besides the output
//   zero_gradient(context)                     whether the output is 0, even if the row was read
//   value(context, coefficients, x, c)         the output of class c
//   target_override(context, coefficients, &c, &value)
//                                              whether one class has another output, which is computed with more care
//   write_second(context, coefficients, x, c)  writes the second output of class c
#pragma once

#include "group.cuh"
#include "sums.cuh"

namespace softmax_ext {
namespace cuda {

// Of lane_rows: classes that a thread loads at once, and the most warps of a block. Two such blocks fit on a
// multiprocessor: a thread of a block of eight warps has twice the registers of one of sixteen.
struct ColumnShape {
  int classes, warps;
};

// The elements of one class in all inputs.
template <typename Op>
struct Elements {
  typename Op::T of[Op::kInputs];
};

// Adjacent classes of all inputs.
template <typename Op>
struct InputChunk {
  static constexpr int kSize = Cut<typename Op::In>::kSize;
  Chunk<typename Op::In, kSize> input[Op::kInputs];

  __device__ __forceinline__ Elements<Op> elements(int i) const {
    Elements<Op> x;
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) x.of[j] = widen(input[j].element[i]);
    return x;
  }
  __device__ __forceinline__ void hide() {
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) input[j].hide();
  }
};

// Where the inputs and the output of a row lie, cut in the same places.
template <typename Op>
struct RowOperands {
  Cut<typename Op::In> cut;
  Row<const typename Op::In, typename Op::In> inputs[Op::kInputs];
  Row<typename Op::Out, typename Op::In> output;

  __device__ __forceinline__ RowOperands(const Op& op, const Position& at, int n)
      : cut(op.input(0, at), n), output(op.output(at), cut) {
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) inputs[j] = {op.input(j, at), cut};
    inputs[0].aligned = true;  // the cuts are its own
  }

  template <bool kAgain>
  __device__ __forceinline__ InputChunk<Op> load(int chunk) const {
    InputChunk<Op> loaded;
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) loaded.input[j] = inputs[j].template load<kAgain>(cut.of_chunk(chunk));
    return loaded;
  }
  __device__ __forceinline__ Elements<Op> load_one(int c) const {
    Elements<Op> x;
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) x.of[j] = widen(inputs[j].data[c]);
    return x;
  }
};

// Adds the first n of kCount elements; element(i) is the i-th, class_of(i) its class.
template <int kCount, typename Op, typename Element, typename ClassOf>
__device__ __forceinline__ void add_elements(const Op& op, const typename Op::Context& context, typename Op::Sums& sums,
                                             const Element& element, const ClassOf& class_of) {
  if constexpr (Op::kMaximum) {
    typename Op::T max = sums.max;
#pragma unroll
    for (int i = 0; i < kCount; i++) max = larger(max, op.logit(element(i)));
    sums.raise(max);
  }
#pragma unroll
  for (int i = 0; i < kCount; i++) op.add(sums, context, element(i), class_of(i));
}

template <typename Op>
__device__ __forceinline__ void add_one(const Op& op, const typename Op::Context& context, typename Op::Sums& sums,
                                        const Elements<Op>& x, int c) {
  add_elements<1>(op, context, sums, [&](int) { return x; }, [&](int) { return c; });
}

// The sums of a thread's many elements, in parts of a few, so that roundings do not add up.
template <typename Op>
struct LongSums {
  static constexpr int kElements = 32;
  typename Op::Sums total, part;
  int count = 0;

  // Before `n` elements are added to the part.
  __device__ __forceinline__ typename Op::Sums& next(int n) {
    if (count + n > kElements) close();
    count += n;
    return part;
  }
  __device__ __forceinline__ void close() {
    total.merge(part);
    part = typename Op::Sums();
    count = 0;
  }
};

template <typename Op>
__device__ __forceinline__ void write_one(const Op& op, const typename Op::Context& context,
                                          const typename Op::Coefficients& coefficients, const RowOperands<Op>& row,
                                          const Elements<Op>& x, int c) {
  if (op.writes_second) op.write_second(context, coefficients, x, c);
  if (op.writes) narrow(op.value(context, coefficients, x, c), row.output.data[c]);
}

template <typename Op>
__device__ __forceinline__ void write_chunk(const Op& op, const typename Op::Context& context,
                                            const typename Op::Coefficients& coefficients, const RowOperands<Op>& row,
                                            const InputChunk<Op>& chunk, int at) {
  constexpr int kSize = InputChunk<Op>::kSize;
  if (op.writes_second)
    for (int i = 0; i < kSize; i++) op.write_second(context, coefficients, chunk.elements(i), at + i);
  if (!op.writes) return;
  Chunk<typename Op::Out, kSize> out;
#pragma unroll
  for (int i = 0; i < kSize; i++) narrow(op.value(context, coefficients, chunk.elements(i), at + i), out.element[i]);
  row.output.store(at, out);
}

// Writes 0 to the chunks first, first + step, ... of a row, up to `last`.
template <typename Op>
__device__ __forceinline__ void zero_chunks(const RowOperands<Op>& row, int first, int last, int step) {
  Chunk<typename Op::Out, InputChunk<Op>::kSize> zero;
#pragma unroll
  for (int i = 0; i < InputChunk<Op>::kSize; i++) clear(zero.element[i]);
  for (int chunk = first; chunk < last; chunk += step) row.output.store(row.cut.of_chunk(chunk), zero);
}

// Writes the output of the class that has an override, if it is one of [first, last).
template <typename Op>
__device__ __forceinline__ void write_target_override(const Op& op, const typename Op::Context& context,
                                                      const typename Op::Coefficients& coefficients,
                                                      typename Op::Out* output, int first, int last) {
  int c;
  typename Op::T value;
  if (op.target_override(context, coefficients, c, value) && c >= first && c < last) narrow(value, output[c]);
}

// What an Op without context need not define: its rows are all read and written.
template <typename Arithmetic>
struct SimpleOp {
  using T = Arithmetic;
  struct Context {};
  static constexpr bool reduces = true, writes = true, writes_second = false;

  __device__ __forceinline__ bool never_in_registers() const { return false; }
  __device__ __forceinline__ bool is_noop() const { return false; }
  __device__ __forceinline__ bool overwrites() const { return false; }
  __device__ __forceinline__ Context fetch(const Position&) const { return {}; }
  template <typename C>
  __device__ __forceinline__ void decode_target(C&) const {}
  template <typename C, typename Value>
  __device__ __forceinline__ void read_target_logit(C&, bool, const Value&) const {}
  template <typename C>
  __device__ __forceinline__ bool skip_row(const C&) const {
    return false;
  }
  template <typename C>
  __device__ __forceinline__ bool zero_gradient(const C&) const {
    return false;
  }
  template <typename C, typename K>
  __device__ __forceinline__ bool target_override(const C&, const K&, int&, T&) const {
    return false;
  }
  template <typename C, typename K, typename X>
  __device__ __forceinline__ void write_second(const C&, const K&, const X&, int) const {}
};

// ---- a row in registers --------------------------------------------------------------------------------------------

constexpr int kWarpBlock = 128;  // threads of a block whose warps have rows of their own

// A thread's part of a row: chunks thread, thread + size, ..., and loose elements in the same way. kThreads: the fewest
// that share a row.
template <typename Op, int kThreads>
struct RegisterRow {
  static constexpr int kChunks = Op::kRegisterChunks, kFirst = kChunks / 2, kSize = InputChunk<Op>::kSize;
  static constexpr int kLoose = (2 * kSize - 2 + kThreads - 1) / kThreads;
  InputChunk<Op> chunk[kChunks];
  Elements<Op> loose[kLoose];

  // In two halves. The loads of the first are issued before it is known whether the row is ignored. All are issued
  // before the first value is used.
  __device__ __forceinline__ void load_half(int half, const RowOperands<Op>& row, int thread, int size) {
#pragma unroll
    for (int k = half == 0 ? 0 : kFirst; k < (half == 0 ? kFirst : kChunks); k++)
      if (thread + k * size < row.cut.chunks) chunk[k] = row.template load<false>(thread + k * size);
    if (half == 0) return;
#pragma unroll
    for (int k = 0; k < kLoose; k++)
      if (thread + k * size < row.cut.loose) loose[k] = row.load_one(row.cut.of_loose(thread + k * size));
  }

  __device__ __forceinline__ void add(const Op& op, const typename Op::Context& context, const RowOperands<Op>& row,
                                      int thread, int size, typename Op::Sums& sums) {
    if constexpr (Op::kMaximum) {
      typename Op::T max = sums.max;
#pragma unroll
      for (int k = 0; k < kChunks; k++)
        if (thread + k * size < row.cut.chunks) {
#pragma unroll
          for (int i = 0; i < kSize; i++) max = larger(max, op.logit(chunk[k].elements(i)));
          chunk[k].hide();
        }
      sums.raise(max);
    }
#pragma unroll
    for (int k = 0; k < kChunks; k++)
      if (thread + k * size < row.cut.chunks) {
        const int at = row.cut.of_chunk(thread + k * size);
#pragma unroll
        for (int i = 0; i < kSize; i++) op.add(sums, context, chunk[k].elements(i), at + i);
        chunk[k].hide();
      }
#pragma unroll
    for (int k = 0; k < kLoose; k++)
      if (thread + k * size < row.cut.loose) add_one(op, context, sums, loose[k], row.cut.of_loose(thread + k * size));
  }

  // One by one: chunks of zeros would take registers that the values need.
  __device__ __forceinline__ void clear(const RowOperands<Op>& row, int thread, int size) const {
    for (int c = thread; c < row.cut.n; c += size) cuda::clear(row.output.data[c]);
  }

  __device__ __forceinline__ void write(const Op& op, const typename Op::Context& context,
                                        const typename Op::Coefficients& coefficients, const RowOperands<Op>& row,
                                        int thread, int size) const {
#pragma unroll
    for (int k = 0; k < kChunks; k++)
      if (thread + k * size < row.cut.chunks)
        write_chunk(op, context, coefficients, row, chunk[k], row.cut.of_chunk(thread + k * size));
#pragma unroll
    for (int k = 0; k < kLoose; k++)
      if (thread + k * size < row.cut.loose)
        write_one(op, context, coefficients, row, loose[k], row.cut.of_loose(thread + k * size));
  }
};

// Six blocks fit on a multiprocessor where each row has a warp or less. The others have no bound on blocks (0): with
// one, nvcc spills.
template <typename Op, Scope kScope>
__global__ void __launch_bounds__(kScope == Scope::kWarp ? kWarpBlock : 1024, kScope == Scope::kWarp ? 6 : 0)
    register_rows(const __grid_constant__ Op op, int threads_per_row, unsigned rows) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr bool kRuns = true;
#else
  constexpr bool kRuns = kScope != Scope::kCluster;
#endif
  if constexpr (kRuns) {
    if (op.never_in_registers()) __builtin_unreachable();
    const Group<kScope> group(threads_per_row);
    const bool exists = group.row < rows, leader = exists && group.thread == 0;
    const Position at = locate(op.layout, exists ? group.row : 0, 0);
    auto context = op.fetch(at);
    const RowOperands<Op> row(op, at, exists ? op.layout.classes : 0);
    RegisterRow<Op, kScope == Scope::kWarp ? 8 : kWarp> in_registers;
    in_registers.load_half(0, row, group.thread, group.size);
    op.decode_target(context);
    const bool skip_row = op.skip_row(context);
    if (!skip_row) in_registers.load_half(1, row, group.thread, group.size);
    op.read_target_logit(context, leader, [&](int c) { return row.load_one(c).of[0]; });
    typename Op::Sums sums;
    if (op.reduces) {
      if (!skip_row) in_registers.add(op, context, row, group.thread, group.size, sums);
      group.reduce(sums);
    }
    const auto coefficients = op.finish(context, sums, leader);
    if (!op.reduces && op.overwrites()) group.sync();  // the leader has read the target's logit
    if (op.writes && op.zero_gradient(context))
      in_registers.clear(row, group.thread, group.size);
    else if (op.writes)
      in_registers.write(op, context, coefficients, row, group.thread, group.size);
    group.sync();
    if (op.writes && leader) write_target_override(op, context, coefficients, row.output.data, 0, op.layout.classes);
  }
}

// ---- a row read again ----------------------------------------------------------------------------------------------

constexpr int kTwoPassBlock = 512;

// A block for each row. Without a reduction a row may have several blocks, one for each of its `parts`. The leader of
// each reads the target's logit, which another part may have overwritten by then: only the part that holds class y uses
// it.
template <typename Op>
__global__ void __launch_bounds__(kTwoPassBlock, 1) two_pass_rows(const __grid_constant__ Op op, unsigned parts) {
  constexpr int kChunks = Op::kTwoPassChunks, kSize = InputChunk<Op>::kSize;
  if (op.is_noop()) return;
  const unsigned outer = blockIdx.x / parts;
  const int last_part = static_cast<int>(parts) - 1, part = static_cast<int>(blockIdx.x - outer * parts);
  const Position at = locate(op.layout, outer, 0);
  const bool leader = threadIdx.x == 0;
  auto context = op.fetch(at);
  op.decode_target(context);
  const RowOperands<Op> row(op, at, op.layout.classes);
  op.read_target_logit(context, leader, [&](int c) { return row.load_one(c).of[0]; });
  const int share = row.cut.chunks / parts + 1, begin = min(row.cut.chunks, part * share);
  const int end = min(row.cut.chunks, begin + share), first = begin + threadIdx.x, step = blockDim.x;
  const int loose = threadIdx.x;
  const bool skip_row = op.skip_row(context);
  const bool has_loose = loose < row.cut.loose && part == (loose < row.cut.head ? 0 : last_part);
  LongSums<Op> sums;
  if (op.reduces) {
    if (!skip_row) {
      int chunk = first;
      for (; chunk + (kChunks - 1) * step < end; chunk += kChunks * step) {
        InputChunk<Op> chunks[kChunks];
#pragma unroll
        for (int k = 0; k < kChunks; k++) chunks[k] = row.template load<true>(chunk + k * step);
        add_elements<kChunks * kSize>(
            op, context, sums.next(kChunks * kSize), [&](int i) { return chunks[i / kSize].elements(i % kSize); },
            [&](int i) { return row.cut.of_chunk(chunk + i / kSize * step) + i % kSize; });
      }
      for (; chunk < end; chunk += step) {
        const InputChunk<Op> one = row.template load<true>(chunk);
        add_elements<kSize>(
            op, context, sums.next(kSize), [&](int i) { return one.elements(i); },
            [&](int i) { return row.cut.of_chunk(chunk) + i; });
      }
      if (has_loose) {
        const int c = row.cut.of_loose(loose);
        add_one(op, context, sums.next(1), row.load_one(c), c);
      }
    }
    sums.close();
    reduce_block(sums.total, shared_memory<typename Op::Sums>());
  }
  const auto coefficients = op.finish(context, sums.total, leader);
  if (!op.reduces && op.overwrites()) __syncthreads();  // the leader has read the target's logit
  if (!op.writes && !op.writes_second) return;
  const int first_class = part == 0 ? 0 : row.cut.of_chunk(begin);
  const int last_class = part == last_part ? row.cut.n : row.cut.of_chunk(end);
  if (op.zero_gradient(context)) {
    zero_chunks(row, first, end, step);
    if (has_loose) clear(row.output.data[row.cut.of_loose(loose)]);
  } else {
    int chunk = first;
    for (; chunk + (kChunks - 1) * step < end; chunk += kChunks * step) {
      InputChunk<Op> chunks[kChunks];
#pragma unroll
      for (int k = 0; k < kChunks; k++) chunks[k] = row.template load<false>(chunk + k * step);
#pragma unroll
      for (int k = 0; k < kChunks; k++)
        write_chunk(op, context, coefficients, row, chunks[k], row.cut.of_chunk(chunk + k * step));
    }
    for (; chunk < end; chunk += step)
      write_chunk(op, context, coefficients, row, row.template load<false>(chunk), row.cut.of_chunk(chunk));
    if (has_loose) {
      const int c = row.cut.of_loose(loose);
      write_one(op, context, coefficients, row, row.load_one(c), c);
    }
  }
  __syncthreads();
  if (op.writes && leader) write_target_override(op, context, coefficients, row.output.data, first_class, last_class);
}

}  // namespace cuda
}  // namespace softmax_ext
