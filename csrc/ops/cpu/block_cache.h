// A cache of the memory of large results: memory that one has freed serves the next.
#pragma once

#include <cstddef>

namespace softmax_ext {

// Memory from a mapping of its own, on huge pages where the system has them, starting on one. Whoever holds a block
// gives it back with release_block().
struct MemoryBlock {
  void* address;
  size_t bytes;
};

constexpr int kCachedBlocks = 2;  // a result of a forward pass and one of its backward

// A block of at least `bytes`, from the cache if one fits. Its address is null where the system has no memory, or could
// not take back the pages of cached blocks when it is short of memory.
MemoryBlock acquire_block(size_t bytes);

void release_block(const MemoryBlock& block);

}  // namespace softmax_ext
