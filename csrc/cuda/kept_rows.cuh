// The kernel that keeps a row in registers between its reduction and its output: it reads and writes a row once. Rows
// have adjacent classes. A row is taken by 8, 16 or 32 lanes of a warp, by a block, or by a cluster of blocks; each of
// their threads holds up to Op::kKeptChunks chunks of 16 bytes of each input (with 8: 256 chunks in a warp, 8192 in a
// block of 1024 threads, 32768 in a cluster of 8 blocks of 512).
//
//   1. Each thread loads its chunks: thread, thread + size, ... The first half is under way before the target is known;
//      the second half, and all use of them, is left out where the row is skipped (ignored, and nothing wanted of it).
//      Up to 14 elements are in no chunk; each of the first threads, which are no fewer, takes one of these.
//   2. The group finds the largest logit, and sums exponentials relative to it, that of the largest too. Where that makes
//      up most of the sum, `rest`, the sum without it, is added up anew (sums.cuh): one warp reads one thread's chunks
//      once more.
//   3. Each thread computes the output of its chunks from what it kept. One thread, the leader, also writes what the row
//      has besides (loss, state), and overwrites the target class, whose gradient takes more care. It is the thread that
//      holds that class: so it needs no barrier, in place neither. Without a target it is the first.
//
// hide() keeps the compiler from holding a half type's values twice, as they are and widened. Without a reduction
// (backward) step 2 is left out; short rows come here for that too. What an Op is: op.cuh.
#pragma once

#include "op.cuh"

namespace softmax_ext {
namespace cuda {

constexpr int kWarpBlock = 128;  // threads of a block whose warps have rows of their own

// In warps five blocks are to fit on a multiprocessor, with options four; there rows_each rows are taken one after the
// other, so that a warp adds to the total of the losses once for all its rows.
template <typename Op, Scope kScope>
__global__ void __launch_bounds__(kScope == Scope::kWarp ? kWarpBlock : Op::kKeptThreads,
                                  kScope == Scope::kWarp ? (Op::kPredicts ? 4 : 5) : 1)
    kept_rows(const __grid_constant__ Op op, int lanes, unsigned rows, unsigned rows_each) {
  using T = typename Op::T;
  using Sums = typename Op::Sums;
  constexpr bool kWarps = kScope == Scope::kWarp;
  constexpr int kChunks = Op::kKeptChunks, kFirst = (kChunks + 1) / 2, kSize = 16 / sizeof(typename Op::In);
  const Group<kScope> group(lanes);
  Totals total;
  for (unsigned i = 0; i < (kWarps ? rows_each : 1); i++) {
    const unsigned number = kWarps ? group.row * rows_each + i : group.row;
    const bool exists = number < rows;
    const Position at = locate(op.layout, exists ? number : 0, 0);
    const RowPointers<Op> data(op, at);
    const Cut<kSize> cut(data.input[0], exists ? op.layout.classes : 0);

    // ---- 1. load
    InputChunk<Op, kSize> held[kChunks];
    const auto load = [&](int k, int chunks) {
      const int chunk = group.thread + k * group.size;
      if (chunk < chunks) held[k] = data.template load<true, kSize>(cut.of_chunk(chunk));
    };
#pragma unroll
    for (int k = 0; k < kFirst; k++) load(k, cut.chunks);
    const auto row = op.row(at);
    const int target = op.target(row);
    const bool leader = exists && group.thread == (target < 0 ? 0 : owner(cut, target, group.size));
    const bool skipped = op.is_skipped(row);
    const int chunks = skipped ? 0 : cut.chunks, loose = skipped ? 0 : cut.loose;
#pragma unroll
    for (int k = kFirst; k < kChunks; k++) load(k, chunks);
    InputChunk<Op, 1> held_loose;
    const int loose_class = cut.of_loose(group.thread);
    const bool has_loose = group.thread < loose;
    if (has_loose) held_loose = data.template load<true, 1>(loose_class);
    const T target_element = leader && target >= 0 ? widen(data.input[0][target]) : T(0);

    const auto each_chunk = [&](const auto& visit) {
#pragma unroll
      for (int k = 0; k < kChunks; k++) {
        const int chunk = group.thread + k * group.size;
        if (chunk < chunks) visit(k, cut.of_chunk(chunk));
      }
    };

    // ---- 2. reduce
    Sums sums;
    Outcome<T> outcome;
    if (op.reduces) {
      Largest<T> own, all;
      if constexpr (Op::kMaximum) {
        each_chunk([&](int k, int) {
          own.value = larger(own.value, largest_logit<1>(op, held + k));
          held[k].hide();
        });
        if (has_loose) own.value = larger(own.value, largest_logit<1>(op, &held_loose));
        all = own;
        group.template reduce<Sums>(all, kMaxSlot);
      }
      each_chunk([&](int k, int c) {
        op.add(sums, all.value, row, held[k], c, kSize);
        held[k].hide();
      });
      if (has_loose) op.add(sums, all.value, row, held_loose, loose_class, 1);
      const auto own_sums = sums;
      group.template reduce<Sums>(sums, kSumSlot);
      if constexpr (Op::kMaximum) {
        const int loose_or_none = has_loose ? loose_class : -1;
        outcome.max = all.value;
        outcome.rest = rest_of_row(op, data, cut, chunks, loose_or_none, group, own, all, own_sums, sums);
      }
      if constexpr (Op::kPredicts) {
        if (op.wants_prediction()) {
          First first;
          const Prediction<T> prediction{all.value};
          each_chunk([&](int k, int c) { first.merge(prediction.in(op, held[k], c, kSize)); });
          if (has_loose) first.merge(prediction.in(op, held_loose, loose_class, 1));
          group.template reduce<Sums>(first, kPredictionSlot);
          outcome.prediction = prediction.of(first);
        }
      }
    }

    // ---- 3. write
    Totals share;
    const auto coefficients = op.finish(row, sums, outcome, target_element, leader, share);
    if (op.writes_anything() && op.is_zero(row)) {
#pragma unroll 1
      for (int k = group.thread; k < cut.chunks; k += group.size) data.template zero<kSize>(cut.of_chunk(k));
      if (group.thread < cut.loose) data.template zero<1>(loose_class);
    } else if (op.writes_anything()) {
      each_chunk([&](int k, int c) { write(op, row, coefficients, data, held[k], c); });
      if (has_loose) write(op, row, coefficients, data, held_loose, loose_class);
    }
    if (leader && target >= 0) op.write_target(row, coefficients, data.output + target);
    if (kWarps)
      total.merge(share);
    else
      op.add_to_total(share, number, leader);
  }
  if (kWarps && op.has_total()) {
    reduce_warp(total);
    op.add_to_total(total, blockIdx.x * (kWarpBlock / kWarp) + threadIdx.x / kWarp, threadIdx.x % kWarp == 0);
  }
  group.leave();
}

}  // namespace cuda
}  // namespace softmax_ext
