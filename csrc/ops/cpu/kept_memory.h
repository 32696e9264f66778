// Memory of large results, kept when it is freed for the next result.
#pragma once

#include <cstddef>

namespace softmax_ext {

// Memory from a mapping of its own, on huge pages where the system has them, starting on one. Freed by whoever holds it
// with release_memory(); up to kKeptBlocks freed blocks are kept.
struct Block {
  void* address;
  size_t bytes;
};

constexpr int kKeptBlocks = 2;  // a result of a forward pass and one of its backward

// A block of at least `bytes`, a kept one where one fits; its address is null where the system has none, or cannot take
// back the pages of kept blocks when it is short of memory.
Block acquire_memory(size_t bytes);

void release_memory(const Block& block);

}  // namespace softmax_ext
