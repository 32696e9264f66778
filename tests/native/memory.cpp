// The cache of large blocks of memory (csrc/ops/cpu/block_cache.cpp), taken from and given back to by many threads at once.
#include <vector>

#include "ops/cpu/block_cache.h"
#include "trial.h"

namespace softmax_ext::native {

void try_block_cache() {
  constexpr int kThreads = 6, kRounds = 300;
  constexpr size_t kMegabyte = 1 << 20;
  trial = "block cache";
  std::vector<std::string> wrong(kThreads);
  at_once(kThreads, [&](int k) {
    Random random(k);
    for (int round = 0; round < kRounds; round++) {
      const size_t bytes = (1 + random.below(6)) * kMegabyte + random.below(100);
      const MemoryBlock block = acquire_block(bytes);
      char* const begin = static_cast<char*>(block.address);
      if (!begin || block.bytes < bytes) {
        wrong[k] = text("a block of ", block.bytes, " bytes for ", bytes);
        return;
      }
      // Nobody else has it: what is written stays.
      const size_t step = 300 * 1024;
      const char mark = static_cast<char>(1 + k);
      for (size_t i = 0; i < bytes; i += step) begin[i] = mark;
      begin[bytes - 1] = mark;
      for (size_t i = 0; i < bytes; i += step)
        if (begin[i] != mark) wrong[k] = "two threads have one block";
      release_block(block);
    }
  });
  for (const std::string& what : wrong)
    if (!what.empty()) fail(what);
}

}  // namespace softmax_ext::native
