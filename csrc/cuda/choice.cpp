// The choice among the kernels; see choice.h and docs/performance.md.
#include "choice.h"

#include <algorithm>

namespace softmax_ext {
namespace cuda {

namespace {

constexpr int kMostThreads = 1024;    // of a block
constexpr int kClusterThreads = 512;  // of a block of a cluster, so that two fit on a multiprocessor

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int whole_warps(int64_t threads) { return static_cast<int>(divide_up(threads, 32) * 32); }

}  // namespace

Choice choose(const RowShape& shape, const Device& device) {
  if (shape.kind == LayoutKind::kColumns) return {shape.classes <= kSmallClasses ? Kernel::kTile : Kernel::kColumns};
  if (shape.register_chunks == 0) return {Kernel::kTwoPass};
  const int64_t threads = divide_up(shape.classes * shape.element_bytes / 16, shape.register_chunks);
  for (int lanes = 8; lanes <= 32; lanes *= 2)
    if (threads <= lanes) return {Kernel::kWarp, lanes};
  if (threads <= kClusterThreads) return {Kernel::kBlock, whole_warps(threads)};
  if (device.capability >= 90) {
    int cluster = 2;
    while (cluster < device.cluster_blocks && cluster * kClusterThreads < threads) cluster *= 2;
    const int most_threads = cluster > kPortableCluster ? kClusterThreads : kMostThreads;
    if (threads <= cluster * most_threads) return {Kernel::kCluster, whole_warps(divide_up(threads, cluster)), cluster};
  }
  if (threads <= kMostThreads) return {Kernel::kBlock, whole_warps(threads)};
  return {Kernel::kTwoPass};
}

const char* name_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kTile: return "tile";
    case Kernel::kColumns: return "columns";
    case Kernel::kWarp: return "warp";
    case Kernel::kBlock: return "block";
    case Kernel::kCluster: return "cluster";
    case Kernel::kTwoPass: return "two_pass";
  }
  return "";
}

}  // namespace cuda
}  // namespace softmax_ext
