// Which kernel takes the rows of a call, by their length and layout, by what is done with them, and by what the device
// can do.
#pragma once

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

Choice choose(const RowShape& shape, const Device& device);

const char* name_of(Kernel kernel);

}  // namespace cuda
}  // namespace softmax_ext
