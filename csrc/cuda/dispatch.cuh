// Launches an Op with the kernel that is chosen for its rows.
#pragma once

#include <algorithm>

#include "choice.h"
#include "columns.cuh"
#include "tiles.cuh"

namespace softmax_ext {
namespace cuda {

// The rows of a tile: one for each thread; fewer where their classes do not fit in shared memory; several where they
// are so few that too little would be under way, if that leaves several tiles for each block that runs at a time.
inline int rows_per_tile(const Layout& layout, int64_t row_bytes, const Device& device) {
  constexpr int64_t kMostBytes = 48 << 10, kEnoughBytes = 12 << 10, kTilesEach = 4;
  const int64_t enough_tiles = kTilesEach * kTileBlocks * device.multiprocessors;
  int64_t rows = std::clamp<int64_t>(kMostBytes / row_bytes / kWarp * kWarp, kWarp, kTileThreads);
  while (2 * rows * row_bytes <= kEnoughBytes && layout.inner / (2 * rows) * layout.outer >= enough_tiles) rows *= 2;
  return static_cast<int>(rows);
}

template <typename Op>
void launch_tile(const char* name, const Op& op, const Layout& layout, const Device& device, cudaStream_t stream) {
  using T = typename Op::T;
  const int64_t row_bytes = Op::kInputs * tile_pitch(layout.classes) * sizeof(T);
  const int rows = rows_per_tile(layout, row_bytes, device);
  const int64_t tiles = (layout.inner + rows - 1) / rows;
  launch(name, tile_rows<Op>, {tiles * layout.outer, kTileThreads, 1, static_cast<int>(rows * row_bytes)}, stream, op,
         rows, tiles);
}

// A block has so many warps that each loads its classes at once, as far as it may have.
template <typename Op>
void launch_columns(const char* name, const Op& op, cudaStream_t stream) {
  int warps = 1;
  while (warps < Op::kColumns.warps && warps * Op::kColumns.classes < op.layout.classes) warps *= 2;
  const int64_t tiles = (op.layout.inner + kWarp - 1) / kWarp;
  const int shared = op.reduces ? static_cast<int>(sizeof(typename Op::Sums)) * warps * kWarp : 0;
  launch(name, lane_rows<Op>, {tiles * op.layout.outer, warps * kWarp, 1, shared}, stream, op, tiles);
}

// Into how many parts a row is split where its parts need not wait for each other, so that few rows fill the device.
inline int row_parts(int64_t rows, int64_t chunks_at_once, int64_t chunks, const Device& device) {
  constexpr int64_t kBlocksEach = 4;  // of a multiprocessor
  return static_cast<int>(std::min(kBlocksEach * device.multiprocessors / rows + 1, chunks / chunks_at_once + 1));
}

template <typename Op>
void launch_two_pass(const char* name, const Op& op, const Device& device, cudaStream_t stream) {
  const int64_t chunks = op.layout.classes / InputChunk<Op>::kSize;
  const int threads = static_cast<int>(std::clamp<int64_t>(chunks / kWarp * kWarp, 2 * kWarp, kTwoPassBlock));
  const int parts = op.reduces ? 1 : row_parts(op.layout.outer, threads * Op::kTwoPassChunks, chunks, device);
  launch(name, two_pass_rows<Op>, {op.layout.outer * parts, threads, 1, shared_bytes<typename Op::Sums>(Scope::kBlock)},
         stream, op, parts);
}

template <typename Op>
Grid register_grid(const Choice& choice, Scope scope, int64_t rows) {
  const int64_t rows_per_block = scope == Scope::kWarp ? kWarpBlock / choice.threads : 1;
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block * choice.cluster;
  const int threads = scope == Scope::kWarp ? kWarpBlock : choice.threads;
  return {blocks, threads, choice.cluster, shared_bytes<typename Op::Sums>(scope)};
}

template <typename Op>
void launch_register(const char* name, const Op& op, const Choice& choice, cudaStream_t stream) {
  if constexpr (Op::kRegisterChunks > 0) {
    const int64_t rows = op.layout.outer;
    const auto launch_as = [&](auto kernel, Scope scope) {
      launch(name, kernel, register_grid<Op>(choice, scope, rows), stream, op, choice.threads, rows);
    };
    if (choice.kernel == Kernel::kWarp)
      launch_as(register_rows<Op, Scope::kWarp>, Scope::kWarp);
    else if (choice.kernel == Kernel::kBlock)
      launch_as(register_rows<Op, Scope::kBlock>, Scope::kBlock);
    else
      launch_as(register_rows<Op, Scope::kCluster>, Scope::kCluster);
  }
}

// What the device and the code can do of what the row asks for.
template <typename Op>
Choice choose_for(const RowShape& shape, Device device) {
  Choice choice = choose(shape, device);
  if constexpr (Op::kRegisterChunks > 0) {
    const auto kernel = register_rows<Op, Scope::kCluster>;
    if (choice.kernel == Kernel::kCluster) {
      device.capability = capability_of_code(kernel);
      choice = choose(shape, device);
    }
    if (choice.cluster > kPortableCluster && !fits(kernel, register_grid<Op>(choice, Scope::kCluster, 1))) {
      device.cluster_blocks = kPortableCluster;
      choice = choose(shape, device);
    }
  }
  return choice;
}

// two_passes: the row is read again although it fits into registers.
template <typename Op>
void launch_op(const char* name, const Op& op, const Layout& layout, bool two_passes, cudaStream_t stream) {
  if (op.layout.outer == 0 || op.layout.inner == 0) return;
  constexpr int64_t kMostClasses = INT32_MAX - (1 << 16);  // so that a step beyond the last one is an int
  if (layout.classes > kMostClasses || layout.outer > UINT32_MAX)
    throw std::runtime_error(std::string(name) + ": on CUDA a row may have " + std::to_string(kMostClasses) +
                             " classes, and a tensor 2^32 rows.");
  const Device device = current_device();
  const Choice choice = choose_for<Op>(
      {layout.kind, layout.classes, static_cast<int>(sizeof(typename Op::In)), two_passes ? 0 : Op::kRegisterChunks},
      device);
  switch (choice.kernel) {
    case Kernel::kTile: return launch_tile(name, op, layout, device, stream);
    case Kernel::kColumns: return launch_columns(name, op, stream);
    case Kernel::kTwoPass: return launch_two_pass(name, op, device, stream);
    default: return launch_register(name, op, choice, stream);
  }
}

}  // namespace cuda
}  // namespace softmax_ext
