// The current device and torch's stream there, apart from the rest because these need a CUDA build of torch.
#pragma once

#include <memory>

#include "../../cuda/kernels.h"
#include "../tensors.h"

namespace softmax_ext {

// Makes the device of a tensor the current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor);
  cuda::Stream stream() const { return stream_; }

 private:
  std::shared_ptr<void> guard_;
  cuda::Stream stream_;
};

}  // namespace softmax_ext
