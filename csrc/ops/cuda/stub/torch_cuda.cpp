// What the CUDA library is linked with in the place of torch's libtorch_cuda.so: the one function of that library that
// it calls, by name. At run time it is torch's own that is in the process.
extern "C" void aoti_torch_get_current_cuda_stream() {}
