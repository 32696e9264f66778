// Memory of large results, kept when it is freed for the next result; see kept_memory.h.
//
// malloc returns large memory to the system as soon as it is freed (glibc everything beyond 32 MiB), and the next step's
// result is mapped, cleared and faulted in anew, page by page, which takes longer than computing it. A block that is
// kept costs nothing of that. Its pages are given up with MADV_FREE: the system takes them whenever it is short of memory,
// before it swaps or refuses anything, and until then they are written again without a fault.
#include "kept_memory.h"

#include <sys/mman.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <utility>

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_HUGEPAGE)
#define SOFTMAX_EXT_KEEPS_MEMORY
#endif

namespace softmax_ext {

#ifdef SOFTMAX_EXT_KEEPS_MEMORY

namespace {

constexpr size_t kHugePage = 2 << 20;

void unmap(const Block& block) {
  if (block.address) munmap(block.address, block.bytes);
}

// A new mapping that begins on a huge page. `bytes` is a multiple of one.
Block map(size_t bytes) {
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

// The kept blocks, the last freed first. Who finds the lock taken does without them, so that a process forked while
// another thread held it is not stuck.
class Kept {
 public:
  // The smallest that has `bytes` and no more than twice as many; or none.
  Block take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    Block* best = nullptr;
    if (lock)
      for (Block& block : blocks_)
        if (block.bytes >= bytes && block.bytes <= 2 * bytes && (!best || block.bytes < best->bytes)) best = &block;
    return best ? std::exchange(*best, {}) : Block{};
  }

  void drop() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock)
      for (Block& block : blocks_) unmap(std::exchange(block, {}));
  }

  // Keeps the block, and returns the one that has to go for it.
  Block put(Block block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock)
      for (Block& kept : blocks_) {
        std::swap(kept, block);
        if (!block.address) break;
      }
    return block;
  }

 private:
  std::mutex mutex_;
  std::array<Block, kKeptBlocks> blocks_{};
};

// Never destroyed: tensors may be freed after this file's statics.
Kept& kept() {
  static Kept& blocks = *new Kept;
  return blocks;
}

}  // namespace

Block acquire_memory(size_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  const Block block = kept().take(bytes);
  if (block.address) return block;
  const Block fresh = map(bytes);
  if (fresh.address) return fresh;
  kept().drop();  // which count where the address space is limited
  return map(bytes);
}

void release_memory(const Block& block) {
  // Where the system does not know MADV_FREE, kept memory would be lost to it.
  unmap(madvise(block.address, block.bytes, MADV_FREE) == 0 ? kept().put(block) : block);
}

#else

Block acquire_memory(size_t) { return {}; }
void release_memory(const Block&) {}

#endif

}  // namespace softmax_ext
