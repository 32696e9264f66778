// The registration of the operators for CUDA tensors, and what `python -m softmax_ext` asks about the kernels. The
// schemas are in the other library, which is loaded first.
//
// SOFTMAX_EXT_CUDA_KEY is the dispatch key. A build of the kernels that runs on the CPU gives another.
#include <string>

#include "../../cuda/kernels.h"
#include "../../export.h"
#include "../operators.h"

#ifndef SOFTMAX_EXT_CUDA_KEY
#define SOFTMAX_EXT_CUDA_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(softmax_ext, SOFTMAX_EXT_CUDA_KEY, m) {
  softmax_ext::add_cross_entropy(m);
  softmax_ext::add_softmax(m);
}

// The architectures that were compiled: "75;80;86".
SOFTMAX_EXT_EXPORT const char* softmax_ext_cuda_architectures() { return softmax_ext::cuda::compiled_architectures(); }

// The kernel for rows of class indices on the current device; null if the device cannot be asked. `type` counts as
// DType does. Valid until the thread's next call.
SOFTMAX_EXT_EXPORT const char* softmax_ext_cuda_kernel_for(int64_t classes, int32_t type) try {
  thread_local std::string name;
  name = softmax_ext::cuda::kernel_for(classes, static_cast<softmax_ext::DType>(type));
  return name.c_str();
} catch (...) {
  return nullptr;
}
