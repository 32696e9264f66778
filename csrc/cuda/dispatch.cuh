// Launches an Op with the kernel that is chosen for its rows.
#pragma once

#include <algorithm>

#include "choice.h"
#include "kept_rows.cuh"
#include "streamed_rows.cuh"
#include "thread_rows.cuh"

namespace softmax_ext {
namespace cuda {

template <typename Op>
constexpr int64_t kMostInThread = sizeof(typename Op::T) == 4 ? Op::kMostInThread : 0;

// Tells the Op where its total is summed, and by how many units; the counters begin at 0.
template <typename Op>
void prepare_total(Op& op, const LossSum* sum, int64_t units, cudaStream_t stream) {
  if constexpr (Op::kHasTotal) {
    if (!sum) return;
    if (units > INT32_MAX) throw std::runtime_error("softmax_ext: on CUDA the losses of 2^31 rows cannot be summed.");
    LossTotal& total = op.total;
    total.to = *sum;
    total.units = static_cast<unsigned>(units);
    total.group_size = total_group_size(units);
    total.groups = static_cast<unsigned>(divide_up(units, total.group_size));
    total.shares = static_cast<Totals*>(sum->scratch);
    total.counters = reinterpret_cast<unsigned*>(total.shares + units + total.groups);
    check(cudaMemsetAsync(total.counters, 0, (total.groups + 1) * sizeof(unsigned), stream), "cudaMemsetAsync");
  }
}

// ---- whether a kernel can take the operands ------------------------------------------------------------------------

// Whether all operands of a row begin at the same place within `elements`, in every row.
template <typename Op>
bool are_congruent(const Op& op, const Layout& layout, int elements) {
  const auto place = [&](const void* data, int bytes) { return reinterpret_cast<uintptr_t>(data) / bytes % elements; };
  const auto same_steps = [&](int operand) {
    for (int d = 0; d < layout.outer_dims; d++)
      if ((layout.dims[d].stride[operand] - layout.dims[d].stride[Op::input_operand(0)]) % elements != 0 &&
          layout.dims[d].size > 1)
        return false;
    return true;
  };
  const auto first = place(op.input(0), sizeof(typename Op::In));
  for (int j = 1; j < Op::kInputs; j++)
    if (place(op.input(j), sizeof(typename Op::In)) != first || !same_steps(Op::input_operand(j))) return false;
  return !op.output() || (place(op.output(), sizeof(typename Op::Out)) == first && same_steps(Op::kOutputOperand));
}

// Whether all operands lie as rows that follow one another.
template <typename Op>
bool rows_are_adjacent(const Op& op, const Layout& layout) {
  const auto adjacent = [&](int operand) {
    return layout.class_stride[operand] == 1 && layout.inner_stride[operand] == layout.classes;
  };
  for (int j = 0; j < Op::kInputs; j++)
    if (!adjacent(Op::input_operand(j))) return false;
  return !op.output() || adjacent(Op::kOutputOperand);
}

// ---- one launch for each kernel ------------------------------------------------------------------------------------

template <typename Op, int kMost, bool kStaged>
void launch_threads_as(const char* name, Op op, const Layout& layout, const LossSum* sum, cudaStream_t stream) {
  constexpr int64_t kMostBytes = 48 << 10;
  int shared = 0;
  int rows = 2 * kRowThreads;  // two for each thread, so that the copies of one row run beside another's work
  if (kStaged) {
    const int in = static_cast<int>(layout.classes * sizeof(typename Op::In));
    const int out = op.output() ? static_cast<int>(layout.classes * sizeof(typename Op::Out)) : 0;
    const auto bytes = [&] { return Op::kInputs * Tile::size(rows, in) + (out ? Tile::size(rows, out) : 0); };
    while (rows > kWarp && bytes() > kMostBytes) rows /= 2;
    shared = bytes();
  }
  const int64_t tiles = divide_up(layout.inner, rows), blocks = tiles * layout.outer;
  prepare_total(op, sum, blocks, stream);
  shared = std::max(shared, static_cast<int>(sizeof(Totals)) * kWarp);
  launch(name, thread_rows<Op, kMost, kStaged>, {blocks, kRowThreads, 1, shared}, stream, op, rows,
         static_cast<unsigned>(tiles));
}

template <typename Op>
void launch_threads(const char* name, const Op& op, const Layout& layout, const LossSum* sum, cudaStream_t stream) {
  constexpr int64_t kMost = kMostInThread<Op>, kHalf = kSmallClasses / 2;
  const auto launch_staged_or_not = [&](auto most) {
    constexpr int kClasses = decltype(most)::value;
    rows_are_adjacent(op, layout) ? launch_threads_as<Op, kClasses, true>(name, op, layout, sum, stream)
                                  : launch_threads_as<Op, kClasses, false>(name, op, layout, sum, stream);
  };
  if constexpr (kMost >= kHalf)
    if (layout.classes <= kHalf) return launch_staged_or_not(std::integral_constant<int, kHalf>());
  if constexpr (kMost > kHalf) launch_staged_or_not(std::integral_constant<int, kMost>());
}

template <typename Op>
void launch_streamed(const char* name, Op op, const Layout& layout, bool lanes, bool congruent, const LossSum* sum,
                     cudaStream_t stream) {
  constexpr int kSize = 16 / sizeof(typename Op::In);
  prepare_total(op, sum, layout.outer * layout.inner, stream);
  const Scope scope = lanes ? Scope::kLanes : Scope::kBlock;
  const int64_t part = congruent ? kSize * kPartChunks<Op, kSize> : kPartChunks<Op, 1>;
  const int64_t parts = op.reduces ? 1 : std::max<int64_t>(1, divide_up(layout.classes, part));
  const int64_t slots = lanes ? divide_up(layout.inner, kWarp) : parts;
  const Grid grid{layout.outer * slots, kStreamThreads, 1,
                  op.reduces ? kSlots * slot_bytes<typename Op::Sums>(scope, kStreamThreads) : 0};
  const auto launch_as = [&](auto kernel) { launch(name, kernel, grid, stream, op, static_cast<unsigned>(slots)); };
  if (lanes)
    launch_as(streamed_rows<Op, 1, Scope::kLanes>);
  else if (congruent)
    launch_as(streamed_rows<Op, kSize, Scope::kBlock>);
  else
    launch_as(streamed_rows<Op, 1, Scope::kBlock>);
}

template <typename Op>
Grid kept_grid(const Choice& choice, Scope scope, int64_t rows) {
  const int64_t rows_of_block = scope == Scope::kWarp ? kWarpBlock / choice.threads : 1;
  const int threads = scope == Scope::kWarp ? kWarpBlock : choice.threads;
  return {divide_up(rows, rows_of_block) * choice.cluster, threads, choice.cluster,
          kSlots * slot_bytes<typename Op::Sums>(scope, threads)};
}

// Of rows that part of a warp takes one after the other: as many as leave the device several blocks at a time.
template <typename Op>
int rows_each(const Choice& choice, int64_t rows, const Device& device) {
  constexpr int64_t kMost = 4, kBlocksAtATime = 5, kTimes = 4;
  const int64_t blocks = kept_grid<Op>(choice, Scope::kWarp, rows).blocks;
  return static_cast<int>(std::clamp<int64_t>(blocks / (kBlocksAtATime * kTimes * device.multiprocessors), 1, kMost));
}

template <typename Op>
void launch_kept(const char* name, Op op, const Layout& layout, const Choice& choice, const Device& device,
                 const LossSum* sum, cudaStream_t stream) {
  if constexpr (Op::kKeptChunks > 0) {
    const int64_t rows = layout.outer;
    const auto launch_as = [&](auto kernel, const Grid& grid, int64_t units, int each) {
      prepare_total(op, sum, units, stream);
      launch(name, kernel, grid, stream, op, choice.threads, static_cast<unsigned>(rows), static_cast<unsigned>(each));
    };
    if (choice.kernel == Kernel::kWarp) {
      const int each = sum ? rows_each<Op>(choice, rows, device) : 1;
      const Grid grid = kept_grid<Op>(choice, Scope::kWarp, divide_up(rows, each));
      launch_as(kept_rows<Op, Scope::kWarp>, grid, grid.blocks * (kWarpBlock / kWarp), each);
    } else {
      launch_as(kept_rows<Op, Scope::kCluster>, kept_grid<Op>(choice, Scope::kCluster, rows), rows, 1);
    }
  }
}

// ---- the choice ----------------------------------------------------------------------------------------------------

// What the device and the code can do of what the row asks for.
template <typename Op>
Choice choose_for(const RowShape& shape, Device device) {
  Choice choice = choose(shape, device);
  if constexpr (Op::kKeptChunks > 0) {
    const auto kernel = kept_rows<Op, Scope::kCluster>;
    if (choice.kernel == Kernel::kCluster) {
      device.capability = capability_of_code(kernel);
      choice = choose(shape, device);
    }
  }
  return choice;
}

// writes: whether there is an output. sum: of the losses, or null.
template <typename Op>
void launch_op(const char* name, const Op& op, const Layout& layout, bool writes, const LossSum* sum,
               cudaStream_t stream) {
  if (op.layout.outer == 0 || op.layout.inner == 0) return;
  constexpr int64_t kMostClasses = INT32_MAX - (1 << 16);  // so that a step beyond the last one is an int
  constexpr int64_t kMostRows = UINT32_MAX - (1 << 17);    // so that the last block's rows have numbers too
  if (layout.classes > kMostClasses || layout.outer > kMostRows)
    throw std::runtime_error(std::string(name) + ": on CUDA a row may have " + std::to_string(kMostClasses) +
                             " classes, and a tensor " + std::to_string(kMostRows) + " rows.");
  const Device device = current_device();
  constexpr int kBytes = sizeof(typename Op::In);
  const bool congruent = are_congruent(op, layout, 16 / kBytes);
  const Choice choice = choose_for<Op>({layout.kind, layout.classes, kBytes, Op::kKeptChunks, Op::kKeptThreads,
                                        kMostInThread<Op>, op.reduces && writes, congruent},
                                       device);
  switch (choice.kernel) {
    case Kernel::kThread: return launch_threads(name, op, layout, sum, stream);
    case Kernel::kStream: return launch_streamed(name, op, layout, false, congruent, sum, stream);
    case Kernel::kLanes: return launch_streamed(name, op, layout, true, false, sum, stream);
    default: return launch_kept(name, op, layout, choice, device, sum, stream);
  }
}

}  // namespace cuda
}  // namespace softmax_ext
