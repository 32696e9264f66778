// In the place of csrc/ops/cuda/cuda_stream.cpp: the emulator has one device, and a launch has run when it returns.
#include "../../csrc/ops/cuda/cuda_stream.h"

namespace softmax_ext {

OnDevice::OnDevice(const Tensor&) : stream_(nullptr) {}

}  // namespace softmax_ext
