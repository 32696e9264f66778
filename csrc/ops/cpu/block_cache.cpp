// A cache of the memory of large results; see block_cache.h.
//
// malloc returns large memory to the system as soon as it is freed (glibc everything beyond 32 MiB). The next step's
// result is mapped, cleared and faulted in anew, page by page, which takes longer than computing it. A cached block
// costs nothing of that. Its pages are given up with MADV_FREE: the system takes them whenever it is short of memory,
// before it swaps or refuses anything. Until then they are written again without a fault.
#include "block_cache.h"

#include <sys/mman.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <utility>

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_HUGEPAGE)
#define SOFTMAX_EXT_CACHES_BLOCKS
#endif

namespace softmax_ext {

#ifdef SOFTMAX_EXT_CACHES_BLOCKS

namespace {

constexpr size_t kHugePage = 2 << 20;

void unmap(const MemoryBlock& block) {
  if (block.address) munmap(block.address, block.bytes);
}

// A new mapping that begins on a huge page. `bytes` is a multiple of one.
MemoryBlock map(size_t bytes) {
  const size_t mapped = bytes + kHugePage;
  void* address = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return {};
  char* const begin = static_cast<char*>(address);
  const size_t before = -reinterpret_cast<uintptr_t>(begin) % kHugePage, after = kHugePage - before;
  if (before) munmap(begin, before);
  munmap(begin + before + bytes, after);
  madvise(begin + before, bytes, MADV_HUGEPAGE);
  return {begin + before, bytes};
}

// The cached blocks, the last freed first. Who finds the lock taken does without them, so that a process forked while
// another thread held it is not stuck.
class BlockCache {
 public:
  // The smallest that has `bytes` and no more than twice as many; or none.
  MemoryBlock take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    MemoryBlock* best = nullptr;
    if (lock)
      for (MemoryBlock& block : blocks_)
        if (block.bytes >= bytes && block.bytes <= 2 * bytes && (!best || block.bytes < best->bytes)) best = &block;
    return best ? std::exchange(*best, {}) : MemoryBlock{};
  }

  void drop() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock)
      for (MemoryBlock& block : blocks_) unmap(std::exchange(block, {}));
  }

  // Caches the block, and returns the one that has to go for it.
  MemoryBlock put(MemoryBlock block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock)
      for (MemoryBlock& cached : blocks_) {
        std::swap(cached, block);
        if (!block.address) break;
      }
    return block;
  }

 private:
  std::mutex mutex_;
  std::array<MemoryBlock, kCachedBlocks> blocks_{};
};

// Never destroyed: tensors may be freed after this file's statics.
BlockCache& cache() {
  static BlockCache& blocks = *new BlockCache;
  return blocks;
}

}  // namespace

MemoryBlock acquire_block(size_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  const MemoryBlock block = cache().take(bytes);
  if (block.address) return block;
  const MemoryBlock fresh = map(bytes);
  if (fresh.address) return fresh;
  cache().drop();  // cached blocks count where the address space is limited
  return map(bytes);
}

void release_block(const MemoryBlock& block) {
  // Where the system does not know MADV_FREE, cached memory would be lost to it.
  unmap(madvise(block.address, block.bytes, MADV_FREE) == 0 ? cache().put(block) : block);
}

#else

MemoryBlock acquire_block(size_t) { return {}; }
void release_block(const MemoryBlock&) {}

#endif

}  // namespace softmax_ext
