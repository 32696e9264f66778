// The parameters of the CPU's kernels, which extend params.h, and the table through which they are called. There is one
// table per instruction set; dispatch.h chooses. No tensors, no threads, no allocations: the caller splits the units of work [0, units) and calls
// a kernel with a range of them and memory to work in.
#pragma once

#include <cstddef>

#include "../params.h"

namespace softmax_ext {

// Readable values behind the last class of `weight`, so that whole vectors can be loaded.
constexpr int64_t kWeightPadding = 64;

// What the CPU's kernels are given besides the parameters.
struct Placement {
  Layout layout;
  bool non_temporal = false;  // results are stored past the caches
};

template <typename T>
struct CrossEntropy : CrossEntropyParams<T>, Placement {};

template <typename T>
struct Softmax : SoftmaxParams, Placement {};

template <typename T>
struct SoftmaxBackward : SoftmaxBackwardParams, Placement {};

struct ScaleRows : ScaleRowsParams, Placement {};

// A look at class indices: how many are not ignored, and whether one of those is not in [0, classes).
struct ClassScan {
  int64_t live;
  bool out_of_range;
};

// `scratch` has as many bytes as scratch_bytes(params) says, aligned as a Scratch wants it (scratch.h). No other call
// may use that memory meanwhile.
template <typename Params, typename Result>
struct KernelFunctions {
  size_t (*scratch_bytes)(const Params&);
  Result (*run)(const Params&, int64_t begin, int64_t end, void* scratch);
};

struct KernelTable {
  const char* isa;
  // Forward: the sum of the losses of the range, in a fixed order. Backward: 0.
  KernelFunctions<CrossEntropy<float>, double> cross_entropy_float;
  KernelFunctions<CrossEntropy<double>, double> cross_entropy_double;
  KernelFunctions<Softmax<float>, void> softmax_float;
  KernelFunctions<Softmax<double>, void> softmax_double;
  KernelFunctions<SoftmaxBackward<float>, void> softmax_backward_float;
  KernelFunctions<SoftmaxBackward<double>, void> softmax_backward_double;
  ClassScan (*scan_classes)(const int64_t* index, int64_t n, int64_t classes, int64_t ignore_index);
  ClassScan (*scan_classes_u8)(const uint8_t* index, int64_t n, int64_t classes, int64_t ignore_index);
  void (*scale_rows)(const ScaleRows&, int64_t begin, int64_t end);
  // y[i] = exp(x[i]) with the kernels' own exponential, for the test of its error.
  void (*exp_float)(const float* x, float* y, int64_t n);

  const auto& of(const CrossEntropy<float>&) const { return cross_entropy_float; }
  const auto& of(const CrossEntropy<double>&) const { return cross_entropy_double; }
  const auto& of(const Softmax<float>&) const { return softmax_float; }
  const auto& of(const Softmax<double>&) const { return softmax_double; }
  const auto& of(const SoftmaxBackward<float>&) const { return softmax_backward_float; }
  const auto& of(const SoftmaxBackward<double>&) const { return softmax_backward_double; }
};

}  // namespace softmax_ext
