// Which kernel takes the rows of a call, by their length and layout, by what is done with them, and by what the device
// can do.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace softmax_ext {
namespace cuda {

enum class Kernel { kThread, kWarp, kBlock, kCluster, kStream, kLanes };

struct Choice {
  Kernel kernel;
  int threads = 0;  // kWarp: for each row; kBlock, kCluster: of a block
  int cluster = 1;  // blocks
};

// What the choice depends on.
struct RowShape {
  LayoutKind kind;
  int64_t classes;
  int element_bytes;       // of the inputs
  int kept_chunks;         // of 16 bytes, that a thread can hold of each input; 0: none
  int kept_threads;        // the most of a block then
  int64_t most_in_thread;  // classes that a thread can hold; 0: no such kernel
  bool keeps;              // there are both a reduction and an output, so that a row would have to be read twice
  bool congruent;          // the operands of a row begin at the same place within 16 bytes
};

// Figures are percent of what a copy moves in the same time (docs/performance.md).

inline int whole_warps(int64_t threads) { return static_cast<int>(divide_up(threads, 32) * 32); }

// Those that hold a row in registers, shortest rows first. `threads`: the most that take one row, each with as many
// chunks as it can hold; with few, it is `half` of them.
struct Line {
  Kernel kernel;
  int threads, cluster;
  bool half;
};

constexpr Line kKept[] = {
    // A lane with four chunks has enough under way, and does not reduce more often than it must. Not of half types: 14
    // elements may lie before and behind the chunks.
    {Kernel::kWarp, 8, 1, true},
    // 1000 classes of bfloat16: 32 lanes with 4 chunks 91 %, 16 lanes with 8 87 %.
    {Kernel::kWarp, 16, 1, true},
    // No barrier. 1000 classes of float32, 8 chunks a lane: 93 %.
    {Kernel::kWarp, 32, 1, false},
    // 32000 classes: 96 % with 512 threads (bfloat16), 97 % with 1024 (float32); clusters of 2: 83 % and 64 %.
    {Kernel::kBlock, 1024, 1, false},
    // 128256 classes of bfloat16: 8 blocks of 256 82 %, 4 of 512 78 %, 2 of 1024 74 %; two passes 73 %.
    {Kernel::kCluster, 512, 8, false},
};

inline Choice choose(const RowShape& shape, const Device& device) {
  if (shape.kind == LayoutKind::kColumns) {
    const bool fits = shape.most_in_thread > 0 && shape.classes <= shape.most_in_thread;
    return {fits ? Kernel::kThread : Kernel::kLanes};
  }
  const int64_t chunks = shape.classes * shape.element_bytes / 16;
  if (shape.kept_chunks == 0 || !shape.congruent) return {Kernel::kStream};
  for (const Line& line : kKept) {
    // Long rows that are read once anyway: 256 threads with four chunks under way reach the card's limit (98 to 106 %).
    if (line.kernel != Kernel::kWarp && !shape.keeps) break;
    if (line.cluster > 1 && device.capability < 90) continue;
    if (line.threads < 16 && shape.element_bytes == 2) continue;
    const int held = line.half ? shape.kept_chunks / 2 : shape.kept_chunks;
    const int64_t threads = divide_up(std::max<int64_t>(chunks, 1), held);
    if (threads > int64_t{std::min(line.threads, shape.kept_threads)} * line.cluster) continue;
    if (line.kernel == Kernel::kWarp) return {line.kernel, line.threads};
    return {line.kernel, whole_warps(divide_up(threads, line.cluster)), line.cluster};
  }
  return {Kernel::kStream};
}

}  // namespace cuda
}  // namespace softmax_ext
