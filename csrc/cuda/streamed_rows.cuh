// The kernel that reads a row as often as it needs it: once for its sums, once more for its output. The second time
// most of a row comes from the cache. It takes what kept_rows cannot hold, what is computed in double, and, of rows longer
// than a warp can hold, each of forward and backward by itself.
//
// A block takes a row (Scope::kBlock), or a part of it where there is nothing to reduce; or it takes 32 rows whose
// classes are apart in memory, one for each lane, of which its eight warps have every eighth class (Scope::kLanes).
//
//   1. Each thread loads kStreamedChunks chunks at once, and adds their exponentials relative to the largest logit that
//      it has seen. At the end the threads agree on the largest, and merge.
//   2. Each thread loads its chunks again, and writes their output. The thread that holds the target class, the leader,
//      also writes what the row has besides (loss, state) and overwrites that class, whose gradient takes more care.
//
// kSize: elements of a chunk. It is 16 bytes of them; or one, in lanes, and where the operands of a row do not begin at
// the same place within 16 bytes. What an Op is: op.cuh.
#pragma once

#include "op.cuh"

namespace softmax_ext {
namespace cuda {

constexpr int kStreamThreads = 256;

// That a thread has under way: of single elements, enough for the latency, and few sums to merge.
template <typename Op, int kSize>
constexpr int kStreamedChunks = kSize > 1 ? Op::kStreamedChunks : (sizeof(typename Op::T) == 8 ? 4 : 8) / Op::kInputs;

// Of a part of a row without a reduction.
template <typename Op, int kSize>
constexpr int kPartChunks = kStreamedChunks<Op, kSize> * kStreamThreads;

template <typename Op, int kSize, Scope kScope>
__global__ void __launch_bounds__(kStreamThreads, Op::kPredicts || sizeof(typename Op::T) == 8 ? 2 : 4)
    streamed_rows(const __grid_constant__ Op op, unsigned slots) {
  using T = typename Op::T;
  using Sums = typename Op::Sums;
  constexpr bool kLanes = kScope == Scope::kLanes;
  constexpr int kChunks = kStreamedChunks<Op, kSize>, kThreads = kLanes ? kStreamThreads / kWarp : kStreamThreads;
  if (op.is_done()) return;
  const Group<kScope> group(0);
  const unsigned outer = blockIdx.x / slots, slot = blockIdx.x - outer * slots;
  const int64_t inner = kLanes ? static_cast<int64_t>(slot) * kWarp + threadIdx.x % kWarp : 0;
  const bool exists = inner < op.layout.inner;
  const Position at = locate(op.layout, outer, exists ? inner : 0);
  const auto row = op.row(at);
  const RowPointers<Op, kLanes> data(op, at);
  const Cut<kSize> cut(data.input[0], exists ? op.layout.classes : 0);

  // The thread's chunks: first, first + kThreads, ..., below end; and one loose element at most.
  const bool whole = kLanes || slots == 1;
  const int begin = whole ? 0 : min(cut.chunks, static_cast<int>(slot) * kPartChunks<Op, kSize>);
  const int end = whole ? cut.chunks : min(cut.chunks, begin + kPartChunks<Op, kSize>), first = begin + group.thread;
  const int loose_class = cut.of_loose(group.thread);
  const bool has_loose = group.thread < cut.loose && (whole || slot == (group.thread < cut.head ? 0 : slots - 1));
  const int target = op.target(row), target_chunk = cut.chunk_of(target);
  const bool in_chunks = target >= 0 && target_chunk >= begin && target_chunk < end;
  const bool leader = exists && (target < 0  ? group.thread == 0
                                 : in_chunks ? (target_chunk - begin) % kThreads == group.thread
                                             : has_loose && loose_class == target);
  const T target_element = leader && target >= 0 ? widen(*data.input_at(0, target)) : T(0);

  // visit(chunks, class of the first, how many)
  const auto each_group = [&](int from, int to, auto last, const auto& visit) {
    constexpr bool kLast = decltype(last)::value;
    int i = from;
    for (; i + (kChunks - 1) * kThreads < to; i += kChunks * kThreads) {
      InputChunk<Op, kSize> chunks[kChunks];
#pragma unroll
      for (int k = 0; k < kChunks; k++) chunks[k] = data.template load<kLast, kSize>(cut.of_chunk(i + k * kThreads));
      visit(chunks, i, std::integral_constant<int, kChunks>());
    }
    if (i >= to) return;
    InputChunk<Op, kSize> chunks[kChunks];
#pragma unroll
    for (int k = 0; k < kChunks; k++)
      if (i + k * kThreads < to) chunks[k] = data.template load<kLast, kSize>(cut.of_chunk(i + k * kThreads));
#pragma unroll
    for (int k = 0; k < kChunks; k++)
      if (i + k * kThreads < to) visit(chunks + k, i + k * kThreads, std::integral_constant<int, 1>());
  };

  // ---- 1. reduce
  Sums sums;
  Outcome<T> outcome;
  if (op.reduces) {
    Largest<T> own, all;
    int seen = first;  // the group of chunks in which the thread has found its largest logit
    if (!op.is_skipped(row)) {
      const auto add = [&](auto* raw, int chunk, int c, auto count) {
        constexpr int n = decltype(count)::value, kElements = std::decay_t<decltype(*raw)>::kElements;
        if constexpr (Op::kMaximum) {
          const T max = larger(own.value, largest_logit<n>(op, raw));
          sums.lower(own.value - max);
          if (Op::kPredicts && max > own.value) seen = chunk;
          own.value = max;
        }
        Sums part;
#pragma unroll
        for (int k = 0; k < n; k++) {
          raw[k].hide();
          op.add(part, own.value, row, raw[k], c + k * kThreads * kElements, kElements);
        }
        sums.merge(part);
      };
      each_group(first, end, std::false_type(),
                 [&](auto* raw, int i, auto count) { add(raw, i, cut.of_chunk(i), count); });
      if (has_loose) {
        InputChunk<Op, 1> raw = data.template load<false, 1>(loose_class);
        add(&raw, seen, loose_class, std::integral_constant<int, 1>());
      }
    }
    if constexpr (Op::kMaximum) {
      all = own;
      group.template reduce<Sums>(all, kMaxSlot);
      sums.lower(own.value - all.value);
    }
    const Sums own_sums = sums;
    group.template reduce<Sums>(sums, kSumSlot);
    if constexpr (Op::kMaximum) {
      const int loose_or_none = has_loose ? loose_class : -1;
      outcome.max = all.value;
      outcome.rest = rest_of_row(op, data, cut, end, loose_or_none, group, own, all, own_sums, sums);
      if constexpr (Op::kPredicts) {
        if (op.wants_prediction()) {
          const Prediction<T> prediction{all.value};
          // A NaN may be anywhere, and so may the largest logit where that is what a maximum begins with.
          const bool anywhere =
              sums.sum != sums.sum || all.value <= larger(lowest<T>(), op.logit(op.sign() * lowest<T>()));
          First found;
          if (!op.is_skipped(row) && (anywhere || own.value == all.value)) {
            const int to = anywhere ? end : min(end, seen + kChunks * kThreads);
            for (int i = anywhere ? first : seen; i < to; i += kThreads)
              found.merge(prediction.in(op, data.template load<false, kSize>(cut.of_chunk(i)), cut.of_chunk(i), kSize));
            if (has_loose) found.merge(prediction.in(op, data.template load<false, 1>(loose_class), loose_class, 1));
          }
          group.template reduce<Sums>(found, kPredictionSlot);
          outcome.prediction = prediction.of(found);
        }
      }
    }
  }

  // ---- 2. write
  Totals share;
  const auto coefficients = op.finish(row, sums, outcome, target_element, leader, share);
  op.add_to_total(share, static_cast<unsigned>(at.offset[kRow]), leader);
  if (!op.writes_anything()) return;
  if (op.is_zero(row)) {
    for (int i = first; i < end; i += kThreads) data.template zero<kSize>(cut.of_chunk(i));
    if (has_loose) data.template zero<1>(loose_class);
  } else {
    each_group(first, end, std::true_type(), [&](const auto* raw, int i, auto count) {
#pragma unroll
      for (int k = 0; k < decltype(count)::value; k++)
        write(op, row, coefficients, data, raw[k], cut.of_chunk(i + k * kThreads));
    });
    if (has_loose) write(op, row, coefficients, data, data.template load<true, 1>(loose_class), loose_class);
  }
  if (leader && target >= 0) op.write_target(row, coefficients, data.output_at(target));
}

}  // namespace cuda
}  // namespace softmax_ext
