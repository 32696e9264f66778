// What the kernels of rows are told to compute: an Op. There are three such kernels: kept_rows, streamed_rows, which runs
// every Op, and thread_rows.
//
//   In, Out, T             type of the inputs' elements, of the output's, and of the arithmetic
//   kInputs                how many inputs of the row's length there are
//   kMaximum               whether the sums are relative to a maximum
//   kHasTotal              whether the losses may be summed: LossTotal total
//   kPredicts              whether the class of the largest logit may be asked for; the logits may be transformed then
//   kKeptChunks            16-byte chunks of each input that a thread of kept_rows holds; 0: no such kernel
//   kKeptThreads           the most threads of its block
//   kMostInThread          the most classes of thread_rows; 0: no such kernel. There is none in double
//   kStreamedChunks        16-byte chunks of each input that a thread of streamed_rows has under way
//   Sums                   what is collected (sums.cuh)
//   Row, Coefficients      what is known of a row beforehand; what its output is computed from
//   layout                 DeviceLayout
//   reduces                whether anything is collected
//   is_done()              whether the output is there already; kept_rows does not ask
//   has_total()            whether the losses of all rows are summed (totals.cuh)
//   input(j), output()     the pointers, and input_operand(j), kOutputOperand: their places in the layout
//
// and of one row, in the order of the calls:
//
//   row(at)                                what is known of it beforehand: target, saved state
//   target(row)                            a class whose logit is wanted and whose output is overwritten, or -1
//   is_skipped(row)                        nothing of the row is read, and its output is 0
//   logit(x), sign()                       of an element; -1 where a larger element has a smaller logit
//   add(sums, max, row, held, c, count)    adds classes c, c + 1, ...: the first `count` elements of a chunk
//   wants_prediction()                     whether Outcome::prediction is to be found; asked where kPredicts
//   finish(row, sums, outcome, x, leader, share) -> Coefficients
//                                          the leader, which has the target's element x, writes what the row has besides
//                                          its output; `share` is the row's in the total of the losses
//   add_to_total(share, unit, has)         totals.cuh
//   writes_anything()                      whether there is an output
//   is_zero(row)                           the output is 0, even if the row was read
//   compute(row, coefficients, held, c, count, values)
//                                          the output of classes c, c + 1, ...; writes what the classes have besides
//   write_target(row, coefficients, to)    overwrites the output of the target class
#pragma once

#include "chunks.cuh"
#include "group.cuh"
#include "layout.cuh"
#include "sums.cuh"
#include "totals.cuh"

namespace softmax_ext {
namespace cuda {

// ---- the operands of a row -----------------------------------------------------------------------------------------

// kStrided: classes are apart in memory; chunks are single elements then.
template <typename Op, bool kStrided = false>
struct RowPointers {
  using In = typename Op::In;
  using Out = typename Op::Out;
  const In* input[Op::kInputs];
  Out* output;
  int64_t stride[kStrided ? Op::kInputs : 1], output_stride;

  DEVICE RowPointers(const Op& op, const Position& at) : output(op.output() + at.offset[Op::kOutputOperand]) {
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) {
      input[j] = op.input(j) + at.offset[Op::input_operand(j)];
      if (kStrided) stride[j] = op.layout.class_stride[Op::input_operand(j)];
    }
    if (kStrided) output_stride = op.layout.class_stride[Op::kOutputOperand];
  }

  DEVICE const In* input_at(int j, int c) const { return input[j] + (kStrided ? c * stride[j] : c); }
  DEVICE Out* output_at(int c) const { return output + (kStrided ? c * output_stride : c); }

  template <bool kLast, int kSize>
  DEVICE InputChunk<Op, kSize> load(int c) const {
    InputChunk<Op, kSize> chunk;
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) chunk.input[j] = load_chunk<kLast, kSize>(input_at(j, c));
    return chunk;
  }
  template <int kSize>
  DEVICE void zero(int c) const {
    const typename Op::T zeros[kSize] = {};
    store_chunk(output_at(c), rounded<typename Op::Out>(zeros));
  }
};

// Of the threads of a row, the one whose chunk, or loose element, holds a class.
template <int kSize>
DEVICE int owner(const Cut<kSize>& cut, int c, int threads) {
  const int chunk = cut.chunk_of(c);
  if (chunk < 0 || chunk >= cut.chunks) return cut.loose_of(c);
  // chunk % threads. The quotient is small and no closer to a whole number than 1 / (2 threads).
  return chunk - threads * static_cast<int>(__fdividef(chunk + 0.5f, static_cast<float>(threads)));
}

// ---- work on a chunk -----------------------------------------------------------------------------------------------

template <typename Op, typename Chunk>
DEVICE typename Op::T sum_without_max(const Op& op, const Chunk& held, typename Op::T max, int count) {
  typename Op::T sum = 0;
#pragma unroll
  for (int i = 0; i < Chunk::kElements; i++) {
    const auto z = op.logit(held.at(i).of[0]);
    if (i < count && z != max) sum += exp_nonpositive(z - max);
  }
  return sum;
}

// Where a row is peaked, what the threads of a warp had of its sum, but without the largest logit: `own` of the others,
// and the elements of the thread that holds it once more, from memory, shared out among the warp's lanes of the group.
// That thread has the chunks `thread`, thread + threads, ..., below `end`, and perhaps a loose element.
template <int kSize, typename Op, typename Data, typename T, Scope kScope>
DEVICE T rest_in_warp(const Op& op, const Data& data, const Cut<kSize>& cut, int end, const Group<kScope>& group,
                      bool holds, int loose_class, T max, T own) {
  const unsigned holders = __ballot_sync(kAllLanes, holds) & group.lanes();
  const int lane = threadIdx.x % kWarp, holder = __ffs(static_cast<int>(holders)) - 1;
  T rest = holds ? T(0) : own;
  if (holders == 0) return rest;
  const int lanes = __popc(group.lanes()), first = __ffs(static_cast<int>(group.lanes())) - 1;
#pragma unroll 1
  for (int i = group.thread + holder - lane + (lane - first) * group.size; i < end; i += lanes * group.size)
    rest += sum_without_max(op, data.template load<false, kSize>(cut.of_chunk(i)), max, kSize);
  if (holds && loose_class >= 0) rest += sum_without_max(op, data.template load<false, 1>(loose_class), max, 1);
  return rest;
}

// The state's rest: in all threads of the group, of the threads' own largest logits and sums and those of the row.
template <int kSize, typename Op, typename Data, typename T, typename Sums, Scope kScope>
DEVICE T rest_of_row(const Op& op, const Data& data, const Cut<kSize>& cut, int end, int loose_class,
                     const Group<kScope>& group, const Largest<T>& own, const Largest<T>& all, const Sums& own_sums,
                     const Sums& sums) {
  const bool peaked = is_peaked(sums.sum);
  if (!__any_sync(kAllLanes, peaked)) return rest_of(sums.sum);
  const bool holds = peaked && own.value == all.value;
  Sum<T> rest{rest_in_warp(op, data, cut, end, group, holds, loose_class, all.value, own_sums.sum)};
  group.template reduce<Sums>(rest, kRestSlot);
  return peaked ? rest.value : rest_of(sums.sum);
}

// The class that a prediction names: the first whose logit is NaN, or the first of largest logit. As numbers, those that
// are NaN come before all others.
template <typename T>
struct Prediction {
  static constexpr int64_t kBehindNaN = int64_t{1} << 32;
  T max;

  // Of the first `count` elements of a chunk from class c on.
  template <typename Op, typename Chunk>
  DEVICE First in(const Op& op, const Chunk& held, int c, int count) const {
    First first;
#pragma unroll
    for (int i = 0; i < Chunk::kElements; i++) {
      const T z = op.logit(held.at(i).of[0]);
      if (i < count && !(z < max)) first.merge({z != z ? c + i : kBehindNaN + c + i});
    }
    return first;
  }
  // As Outcome has it; 0 where there is no class.
  DEVICE static int64_t of(const First& first) {
    if (first.value == INT64_MAX) return 0;
    return first.value < kBehindNaN ? -1 - first.value : first.value - kBehindNaN;
  }
};

// The output of a chunk from class c on.
template <typename Op, typename Row, typename Data, int kSize, template <typename, int> class Chunk>
DEVICE void write(const Op& op, const Row& row, const typename Op::Coefficients& coefficients, const Data& data,
                  const Chunk<Op, kSize>& held, int c) {
  typename Op::T values[kSize];
  op.compute(row, coefficients, held, c, kSize, values);
  if (op.output()) store_chunk(data.output_at(c), rounded<typename Op::Out>(values));
}

// ---- simple Ops ----------------------------------------------------------------------------------------------------

// What an Op without targets and losses need not define: its rows are all read and written.
template <typename R>
struct SimpleOp {
  using Row = R;
  static constexpr bool reduces = true, kPredicts = false, kHasTotal = false;
  static constexpr int kKeptThreads = 1024;
  static constexpr int64_t kMostInThread = kSmallClasses;

  DEVICE bool is_done() const { return false; }
  DEVICE bool has_total() const { return false; }
  DEVICE void add_to_total(const Totals&, unsigned, bool) const {}
  DEVICE R row(const Position&) const { return {}; }
  DEVICE int target(const R&) const { return -1; }
  DEVICE bool is_skipped(const R&) const { return false; }
  DEVICE bool is_zero(const R&) const { return false; }
  DEVICE bool writes_anything() const { return true; }
  DEVICE float sign() const { return 1; }
  template <typename T>
  DEVICE T logit(T x) const {
    return x;
  }
  template <typename K, typename Out>
  DEVICE void write_target(const R&, const K&, Out*) const {}
};
struct NoRow {};

}  // namespace cuda
}  // namespace softmax_ext
