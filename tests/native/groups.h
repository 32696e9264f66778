// The run of a kernel over all its groups, as the operators do it (csrc/ops/cpu). Where one thread does it all, the kernel
// works in guarded memory of the size that it asked for.
#pragma once

#include "cpu/dispatch.h"
#include "guarded.h"
#include "ops/cpu/parallel.h"
#include "threads.h"

namespace softmax_ext::native {

// run(kernel, group, begin unit, end unit, scratch).
template <typename Params, typename Run>
void run_groups(const Params& k, const Groups& groups, const Run& run) {
  const auto& kernel = kernels().of(k);
  const size_t bytes = kernel.scratch_bytes(k);
  const Guarded guarded(static_cast<int64_t>(bytes));
  const bool alone = threads_of_caller == 1;
  groups.run(alone ? 0 : bytes, [&](int64_t group, int64_t begin, int64_t end, void* scratch) {
    run(kernel, group, begin, end, alone ? guarded.data() : scratch);
  });
}

}  // namespace softmax_ext::native
