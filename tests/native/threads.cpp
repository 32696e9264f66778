// torch's parallel_for and number of threads, by which the operators split their work (csrc/ops/cpu/parallel.h), with
// std::thread: a program without libtorch, all of which the sanitizers see. And the version that torch's headers from 2.13
// on ask for before they look up a newer function: the one that all is compiled for, which has none of those.
#include "threads.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace softmax_ext::native {

thread_local int threads_of_caller = 1;

}  // namespace softmax_ext::native

extern "C" uint64_t aoti_torch_abi_version() { return TORCH_TARGET_VERSION; }

extern "C" AOTITorchError torch_get_num_threads(uint32_t* threads) {
  *threads = softmax_ext::native::threads_of_caller;
  return 0;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc function,
                                             void* context) {
  const int64_t most = (end - begin + grain - 1) / grain;
  const int64_t count = std::min<int64_t>(softmax_ext::native::threads_of_caller, std::max<int64_t>(1, most));
  const int64_t share = (end - begin + count - 1) / count;
  std::vector<std::thread> threads;
  for (int64_t at = begin + share; at < end; at += share)
    threads.emplace_back(function, at, std::min(end, at + share), context);
  if (begin < end) function(begin, std::min(end, begin + share), context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}
