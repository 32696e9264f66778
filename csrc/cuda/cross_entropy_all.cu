// Cross entropy with probability targets, and all of it in double.
#include "cross_entropy_launch.cuh"

namespace softmax_ext {
namespace cuda {

template void launch_kind<Kind::kAll>(const CrossEntropyParams<float>&, const Layout&, const LossSum*, Stream);
template void launch_kind<Kind::kAll>(const CrossEntropyParams<double>&, const Layout&, const LossSum*, Stream);

}  // namespace cuda
}  // namespace softmax_ext
