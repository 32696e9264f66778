// The kernels of one instruction set, as its units define them and its table collects them.
#pragma once

#include "kernel_table.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {

size_t scratch_bytes(const CrossEntropy<float>&);
size_t scratch_bytes(const CrossEntropy<double>&);
size_t scratch_bytes(const Softmax<float>&);
size_t scratch_bytes(const Softmax<double>&);
size_t scratch_bytes(const SoftmaxBackward<float>&);
size_t scratch_bytes(const SoftmaxBackward<double>&);
double cross_entropy_float(const CrossEntropy<float>&, int64_t begin, int64_t end, void* scratch);
double cross_entropy_double(const CrossEntropy<double>&, int64_t begin, int64_t end, void* scratch);
void softmax_float(const Softmax<float>&, int64_t begin, int64_t end, void* scratch);
void softmax_double(const Softmax<double>&, int64_t begin, int64_t end, void* scratch);
void softmax_backward_float(const SoftmaxBackward<float>&, int64_t begin, int64_t end, void* scratch);
void softmax_backward_double(const SoftmaxBackward<double>&, int64_t begin, int64_t end, void* scratch);
ClassScan scan_classes(const int64_t* index, int64_t n, int64_t classes, int64_t ignore_index);
ClassScan scan_classes_u8(const uint8_t* index, int64_t n, int64_t classes, int64_t ignore_index);
void scale_rows(const ScaleRows&, int64_t begin, int64_t end);
void exp_float(const float* x, float* y, int64_t n);

}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
