// Which results are stored past the caches.
#pragma once

#include "../tensors.h"

namespace softmax_ext {

// Beyond this a result has left the caches before anybody reads it; the largest last-level caches per core are far
// below.
constexpr int64_t kNonTemporalBytes = 32 << 20;

// Whether `result` is large, and not the memory of `source`, which is in the caches already when it is overwritten.
inline bool is_non_temporal(const Tensor& result, const Tensor& source) {
  return result.numel() * size_of(result.scalar_type()) > kNonTemporalBytes &&
         result.const_data_ptr() != source.const_data_ptr();
}

}  // namespace softmax_ext
