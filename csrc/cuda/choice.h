// Which kernel takes the rows of a call, by their length and layout and by what the device can do.
#pragma once

#include "kernels.h"
#include "launch.h"

namespace softmax_ext {
namespace cuda {

enum class Kernel { kTile, kColumns, kWarp, kBlock, kCluster, kTwoPass };

struct Choice {
  Kernel kernel;
  int threads = 0;  // for each row in a warp; of a block otherwise
  int cluster = 1;
};

// What the choice depends on. Chunks are of 16 bytes of the inputs.
struct RowShape {
  LayoutKind kind;
  int64_t classes;
  int element_bytes;
  int register_chunks;  // that a thread can keep of each input; 0: none
};

Choice choose(const RowShape& shape, const Device& device);

const char* name_of(Kernel kernel);

}  // namespace cuda
}  // namespace softmax_ext
