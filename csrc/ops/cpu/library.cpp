// The registration of the operators, and of their implementations for CPU tensors.
#include "../operators.h"

STABLE_TORCH_LIBRARY(softmax_ext, m) { softmax_ext::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(softmax_ext, CPU, m) {
  softmax_ext::add_cross_entropy(m);
  softmax_ext::add_softmax(m);
}
