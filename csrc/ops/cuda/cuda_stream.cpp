// See cuda_stream.h.
#include "cuda_stream.h"

#include <torch/csrc/stable/accelerator.h>

// In libtorch_cuda. Torch's own declaration asks for the CUDA headers; torch::stable has the stream's handle from 2.13
// on.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace softmax_ext {

OnDevice::OnDevice(const Tensor& tensor) {
  const int32_t index = tensor.get_device_index();
  guard_ = std::make_shared<torch::stable::accelerator::DeviceGuard>(index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  stream_ = static_cast<cuda::Stream>(stream);
}

}  // namespace softmax_ext
